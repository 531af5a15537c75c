"""Self-verifying checkpoint directories: written aside, fsynced, renamed; the manifest is the last file in.

A directory `step-00000500` holds `manifest.json` and the values. An array is a list of slices (offset, shape, file,
byte_offset), so that a later sharded save needs no new format; today each has one slice. Only the chief writes.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tfdist import files
from tfdist.checkpoint import manifest as manifests
from tfdist.cluster.link import supervisor
from tfdist.errors import CheckpointError, one_line

_VALUES = "values-00000.bin"

# Of files that this process has read or written, by device, inode, size and times: each is hashed once.
_checksums: dict[tuple[int, ...], str] = {}


class Unreadable(CheckpointError):
    """It may be good."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    manifest: dict[str, Any]

    def arrays(self) -> dict[str, np.ndarray]:
        """Every value by its key; call after `verify`."""
        data = {name: _mapped(self.path, name) for name in self.manifest["files"]}
        return {key: _assemble(entry, data) for key, entry in self.manifest["arrays"].items()}


def save(folder: Path, step: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Path:
    """Writes `folder/step-N`. `facts` (seed, config hash, versions) go into the manifest.

    Raises `CheckpointError` when the disk does not take it; what was there before is untouched then.
    """
    strange = [f"{key} of {array.dtype}" for key, array in arrays.items() if array.dtype.name not in manifests.DTYPES]
    if strange:
        raise CheckpointError(f"checkpoint: expected numbers, found {one_line(strange[0])}")
    final = folder / folder_name(step)
    if final.exists() and is_good(final):  # a stop right after a restore: this step is safe already
        return final
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temporary = folder / f"{final.name}.tmp-{secrets.token_hex(8)}"
        temporary.mkdir()
        entries, checksum, size = _write_values(temporary / _VALUES, arrays)
        manifest = {
            "format": manifests.FORMAT,
            "step": step,
            **facts,
            "arrays": entries,
            "files": {_VALUES: {"size": size, "sha256": checksum}},
        }
        content = json.dumps(files.sealed(manifest), indent=1).encode()
        if len(content) > files.MOST_JSON_BYTES:
            raise OSError(errno.EFBIG, f"a manifest of {len(content)} bytes would not be read again")
        files.write(temporary / manifests.NAME, content)
        files.sync_folder(temporary)
        if os.path.lexists(final):  # damaged
            files.remove(final)
        os.rename(temporary, final)
        files.sync_folder(folder)
        _checksums[_stamp((final / _VALUES).stat())] = checksum
        return final
    except OSError as error:
        if temporary is not None:
            files.remove(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint: cannot write {final}: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Makes the folder. Raises `CheckpointError` where nothing can be written: before there is anything to lose."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot write to {folder}: {error.strerror or error}") from error


def latest(folder: Path) -> Checkpoint | None:
    """The newest directory that verifies; damaged ones are skipped with a warning. None if there are no checkpoints.

    Raises `CheckpointError` when there are checkpoints and all of them are damaged, or a newer one or the folder itself may
    not be read.
    """
    found = sorted(steps(folder), reverse=True)
    for step in found:
        path = folder / folder_name(step)
        try:
            return verify(path)
        except Unreadable:
            raise
        except CheckpointError as error:
            logging.warning("skipping a damaged checkpoint: %s", one_line(error))
    if found:
        raise CheckpointError(
            f"checkpoint: expected a usable checkpoint in {folder}, found {len(found)} damaged ones; "
            "--fresh starts at step 0 and keeps them aside"
        )
    return None


def steps(folder: Path) -> list[int]:
    """Steps with a finished directory, in no order, good or not. Raises `CheckpointError` when that cannot be known."""
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch("step-[0-9]{8,18}", name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot read {folder}: {error.strerror}") from error
    found = [int(name.removeprefix("step-")) for name in names]
    return [step for step, name in zip(found, names, strict=True) if folder_name(step) == name]


def verify(path: Path) -> Checkpoint:
    """Reads the manifest and checks every file's size and SHA-256. Raises `CheckpointError` with file and reason."""
    file = path / manifests.NAME
    try:
        manifest = manifests.read(path)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except PermissionError as error:
        raise _unreadable(file, error) from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {one_line(error, 200)}") from error
    if path.name != folder_name(manifest["step"]):
        raise CheckpointError(f"{file}: of step {manifest['step']}, in another folder")
    for name, facts in manifest["files"].items():
        try:
            _check_file(path, name, facts)
        except PermissionError as error:
            raise _unreadable(path / name, error) from error
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
    return Checkpoint(path, manifest["step"], manifest)


def _check_file(path: Path, name: str, facts: Mapping[str, Any]) -> None:
    with files.open_inside(path, name) as file:
        status = os.fstat(file.fileno())
    if status.st_size != facts["size"]:
        raise CheckpointError(f"{path / name}: expected {facts['size']} bytes, found {status.st_size}")
    stamp = _stamp(status)
    if stamp not in _checksums:
        _checksums[stamp] = files.sha256(path / name)
    if _checksums[stamp] != facts["sha256"]:
        raise CheckpointError(f"{path / name}: SHA-256 does not match the manifest")


def _unreadable(path: Path, error: OSError) -> Unreadable:
    return Unreadable(f"checkpoint: cannot read {path}: {error.strerror}; make it readable, or move its folder away")


def is_good(path: Path) -> bool:
    """Whether it verifies."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def is_readable(path: Path) -> bool:
    """Whether it is known if it is good."""
    try:
        verify(path)
    except Unreadable:
        return False
    except CheckpointError:
        pass
    return True


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed save left behind."""
    for path in folder.glob("step-*.tmp-*"):
        if re.fullmatch("step-[0-9]{8,18}[.]tmp-[0-9a-f]{16}", path.name):
            files.remove(path, ignore_errors=True)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _write_values(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], str, int]:
    digest, position, entries = hashlib.sha256(), 0, {}
    with open(path, "wb") as file:
        for key, array in arrays.items():
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.write(raw)
            digest.update(raw)
            supervisor().tick()
            entries[key] = {
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "slices": [{
                    "offset": [0] * array.ndim, "shape": list(array.shape), "file": path.name, "byte_offset": position,
                }],
            }  # fmt: skip
            position += array.nbytes
        file.flush()
        os.fsync(file.fileno())
    return entries, digest.hexdigest(), position


def _mapped(path: Path, name: str) -> np.ndarray:
    """The bytes of a file."""
    with files.open_inside(path, name) as file:
        empty = not os.fstat(file.fileno()).st_size  # which cannot be mapped
        return np.zeros(0, np.uint8) if empty else np.memmap(file, np.uint8, "r")


def _assemble(entry: dict[str, Any], data: Mapping[str, np.ndarray]) -> np.ndarray:
    dtype = manifests.DTYPES[entry["dtype"]]
    whole = np.empty(entry["shape"], dtype)
    for piece in entry["slices"]:
        count = int(np.prod(piece["shape"], dtype=np.int64)) * dtype.itemsize
        raw = np.array(data[piece["file"]][piece["byte_offset"] : piece["byte_offset"] + count])
        place = tuple(slice(o, o + n) for o, n in zip(piece["offset"], piece["shape"], strict=True))
        whole[place] = raw.view(dtype).reshape(piece["shape"])
    return whole
