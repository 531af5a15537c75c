"""The folder that a build writes into, `OUT.building`: made, held by one process, and at the end named OUT.

A file in it says that it is a build's, and is its lock; what else lies beside OUT, whatever its name, is left alone.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tfdist import files
from tfdist.cluster.link import supervisor
from tfdist.errors import DataError

_PLAN = "plan.json"
_MARK, _MARK_TEXT = ".tfdist-build", b"This folder is of a build of `tfdist data build`, or of a cache of tokens.\n"
_IN_BETWEEN = r"piece-\d+\.json|.+\.[0-9a-f]{16}\.tmp"  # what does not become part of the dataset
_OWN = re.compile(rf"{_IN_BETWEEN}|(train|validation)-\d+-\d+(\.documents)?\.npy|(tokenizer|dataset|plan)\.json")


@contextlib.contextmanager
def held(folder: Path, finished: Path) -> Iterator[bool]:
    """Holds the folder, and makes it first where there is none; False: another process has `finished` the dataset.

    Raises `DataError` where something else has the folder's name.
    """
    while not finished.exists():
        if not os.path.lexists(folder):
            _make(folder)
        with contextlib.ExitStack() as stack:
            file = _open_mark(folder, stack)
            if file is None:
                if finished.exists() or not os.path.lexists(folder):  # another process came to its end meanwhile
                    continue
                raise DataError(
                    f"data: expected {folder} to be free, or of an earlier build, found something else; move it away, or "
                    "build into another folder"
                )
            _lock(file)
            if _is_there(file, folder / _MARK):  # else it waited for a build that is over
                yield True
                return
    yield False


def _make(folder: Path) -> None:
    """With its mark in it from the first moment on."""
    made = files.temporary(folder)
    made.mkdir()
    (made / _MARK).write_bytes(_MARK_TEXT)
    try:
        os.rename(made, folder)
    except OSError as error:
        shutil.rmtree(made)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # these: something has the name by now
            raise


def _open_mark(folder: Path, stack: contextlib.ExitStack) -> IO[bytes] | None:
    """None: the folder is not of a build."""
    try:
        file = stack.enter_context(files.open_inside(folder, _MARK, "r+b"))
    except PermissionError:
        raise
    except OSError:
        return None
    return None if folder.is_symlink() or file.read(len(_MARK_TEXT) + 1) != _MARK_TEXT else file


def _lock(file: IO[bytes]) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            supervisor().tick()  # another process builds: that is no standstill
            time.sleep(0.2)


def _is_there(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except OSError:
        return False


def start(folder: Path, facts: str) -> None:
    """Keeps what an earlier call with the same plan and unchanged files has finished."""
    try:
        if files.read_inside(folder, _PLAN, len(facts.encode())) == facts.encode():
            return
    except OSError:
        pass  # there is none
    for path in folder.iterdir():
        if _OWN.fullmatch(path.name):
            path.unlink()
    files.write(folder / _PLAN, facts.encode())


def finish(folder: Path, out: Path) -> None:
    """Gives a whole dataset its name. Its plan goes last: a build that is killed before is still known to be whole."""
    for path in folder.iterdir():
        if re.fullmatch(_IN_BETWEEN, path.name):
            path.unlink()
    files.sync_folder(folder)
    with contextlib.suppress(OSError):  # a folder without an index: left by hand, and empty
        out.rmdir()
    os.rename(folder, out)
    files.sync_folder(out.parent)
    for name in (_PLAN, _MARK):
        (out / name).unlink(missing_ok=True)


def piece_record(folder: Path, number: int) -> Path:
    """The file that says that a piece is finished, and how."""
    return folder / f"piece-{number:05d}.json"
