"""The contents of a dataset's files, checked once on each machine: checksums, token ids, where documents begin."""

import concurrent.futures
import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np

from tfdist import files
from tfdist.data import npy
from tfdist.data.index import documents_of
from tfdist.errors import DataError

FILE = ".verified.json"  # machine -> name -> the state in which a file was found right
_MOST_MACHINES = 16  # whose states are kept
_CHUNK = 1 << 21
_MACHINE_FILES = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id")


def check(path: Path, shards: list[dict], dtype: str, vocab_size: int) -> None:
    """Reads what this machine has not read in its present state, and remembers it where the folder can be written. Raises
    `DataError`. `shards`: of the index."""
    tokens = {shard["file"]: shard for shard in shards}
    documents = {documents_of(shard["file"]): shard for shard in shards}
    expected = {name: shard["sha256"] for name, shard in tokens.items()}
    expected |= {name: shard["documents_sha256"] for name, shard in documents.items()}
    states = {name: [*_state(path / name), checksum, vocab_size] for name, checksum in expected.items()}
    machine, remembered = _machine(), _remembered(path)
    known = remembered.get(machine)
    new = [name for name, state in states.items() if not isinstance(known, dict) or known.get(name) != state]
    if not new:
        return

    def checksum(name: str) -> str:
        if name in tokens:
            _check_tokens(path / name, dtype, tokens[name]["tokens"], vocab_size)
        else:
            _check_documents(path / name, documents[name])
        return files.sha256(path / name)

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing runs outside of Python's lock
        for name, found in zip(new, pool.map(checksum, new), strict=True):
            if found != expected[name]:
                raise DataError(
                    f"data: expected the SHA-256 {expected[name][:12]}... of {path / name}, found {found[:12]}...: the "
                    "file has changed since it was built; build the dataset again"
                )
    others = {name: content for name, content in remembered.items() if name != machine}
    kept = dict(list(others.items())[-_MOST_MACHINES + 1 :]) | {machine: states}
    try:
        files.write(path / FILE, json.dumps(kept).encode())
    except OSError:
        return  # a folder of somebody else's: read again the next time


def _state(path: Path) -> list[int]:
    """Another one after every change, and of every copy: the last of these times is set by the system alone."""
    stat = os.lstat(path)
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _machine() -> str:
    """A name of this machine: what another one has verified came with a copy, or lies on a disk that both see."""
    for name in _MACHINE_FILES:
        try:
            found = Path(name).read_text().strip()
        except OSError:
            continue
        if found:
            return found
    return socket.gethostname()


def _remembered(path: Path) -> dict[str, Any]:
    try:
        found = files.read_json(path, FILE)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_tokens(path: Path, dtype: str, number: int, vocab_size: int) -> None:
    array = npy.read(path, dtype, (number,))
    largest = max(int(array[start : start + _CHUNK].max()) for start in range(0, number, _CHUNK))
    if largest >= vocab_size:
        raise DataError(f"data: expected token ids below its vocabulary of {vocab_size}, found {largest} in {path}")


def _check_documents(path: Path, shard: dict) -> None:
    starts = npy.read(path, "int64", (shard["documents"], 2))[:, 0]
    before = -1
    for first in range(0, len(starts), _CHUNK):
        chunk = np.concatenate([[before], starts[first : first + _CHUNK]])
        if (np.diff(chunk) <= 0).any() or chunk[-1] >= shard["tokens"]:
            raise DataError(
                f"data: expected documents that begin one after the other within {shard['tokens']} tokens in {path}, found "
                "other places; build the dataset again"
            )
        before = int(chunk[-1])
