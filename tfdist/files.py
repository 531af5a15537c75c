"""Files that can be trusted: those that appear under their name when they are whole and on the disk, or not at all; those of
folders from elsewhere, read without being led astray; their checksums. No TensorFlow."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tfdist.cluster.link import supervisor

_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
MOST_JSON_BYTES = 64 << 20  # of a manifest of 100,000 arrays, which has 3 million values
_MOST_JSON_VALUES = 4 << 20  # each takes many times the memory of its text


# ---- writing ----


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """The file to write to; it has its name once the block is left without an error. Raises `OSError` with the name."""
    aside = temporary(path)
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """All of the content or none: a reader never sees half of it."""
    with whole_file(path) as file:
        file.write(content)


def temporary(path: Path) -> Path:
    """A new name beside it. Of this call alone: processes of other hosts and containers, which may have the number of this
    one, write the same at once, and one that was killed may still write."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


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


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Deletes a folder, or whatever else has the name: of a link the link alone, and a pipe without waiting for it, as
    `shutil.rmtree` would."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
        shutil.rmtree(path, ignore_errors) if is_folder else os.unlink(path)
    except OSError:
        if not ignore_errors:
            raise


# ---- reading ----


def is_plain_name(name: Any) -> bool:
    """Whether a file of that name lies directly inside its folder, whatever system reads it."""
    return isinstance(name, str) and bool(_PLAIN_NAME.fullmatch(name)) and name not in (".", "..")


_FLAGS = {"rb": os.O_RDONLY, "r+b": os.O_RDWR, "a+b": os.O_RDWR | os.O_APPEND | os.O_CREAT}


def open_inside(folder: Path, name: str, mode: str = "rb") -> IO[bytes]:
    """Opens a regular file that lies directly inside a folder. A link, a pipe, a device or a path is an `OSError`, and none
    is waited for. `mode`: rb, r+b or a+b (without a buffer)."""
    path = folder / name
    if not is_plain_name(name):
        raise OSError(errno.EINVAL, "expected a file directly inside its folder", str(path))
    try:
        descriptor = os.open(path, _FLAGS[mode] | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _no_regular_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_regular_file(path)
    return open(descriptor, mode, buffering=0 if mode == "a+b" else -1)


def _no_regular_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "expected a regular file", str(path))


def read_inside(folder: Path, name: str, at_most: int = MOST_JSON_BYTES) -> bytes:
    """The content of a file as `open_inside` has it. More than `at_most` bytes are an `OSError`."""
    with open_inside(folder, name) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"expected at most {at_most} bytes", str(folder / name))
    return content


def read_json(folder: Path, name: str) -> Any:
    """The value in a file as `open_inside` has it. Raises `OSError`, or `ValueError` for what is no JSON."""
    content = read_inside(folder, name)
    if sum(map(content.count, (b"{", b"[", b","))) > _MOST_JSON_VALUES:
        raise ValueError(f"more than {_MOST_JSON_VALUES:,} values")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number, not negative, that fits 64 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def is_digest(value: Any) -> bool:
    """Whether it is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The same with `sha256`: of everything else in it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def is_sealed(content: dict[str, Any]) -> bool:
    """Whether it is as `sealed` left it."""
    return content.get("sha256") == sealed(content)["sha256"]


def sha256(path: Path) -> str:
    """Of a file of any size, as `open_inside` has it."""
    digest = hashlib.sha256()
    with open_inside(path.parent, path.name) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            supervisor().tick()
    return digest.hexdigest()
