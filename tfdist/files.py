"""Files that can be trusted: they appear under their name when they are whole and on the disk, or not at all; their
checksums. No TensorFlow."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tfdist.cluster.link import supervisor


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """The file to write to; it has its name once the block is left without an error. Raises `OSError` with the name."""
    aside = temporary(path)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """All of the content or none: a reader never sees half of it."""
    with whole_file(path) as file:
        file.write(content)


def temporary(path: Path) -> Path:
    """Of this process alone: one that does the same, or did and was killed, may still write."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """What was written to a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """What was renamed in a folder is so on the disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            supervisor().tick()
    return digest.hexdigest()
