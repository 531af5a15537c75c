"""Self-verifying checkpoint directories: written aside, fsynced, renamed; the manifest is the last file in.

A directory `step-00000500` holds `manifest.json` and the values. An array is a list of slices (offset, shape, file,
byte_offset), so that a later sharded save needs no new format; today each has one slice. Only the chief writes.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from absl import logging

from tfdist import files
from tfdist.cluster.link import supervisor
from tfdist.errors import CheckpointError

FORMAT = 1
_MANIFEST = "manifest.json"
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
        data = {name: np.memmap(self.path / name, np.uint8, "r") for name in self.manifest["files"]}
        return {key: _assemble(entry, data) for key, entry in self.manifest["arrays"].items()}


def save(folder: Path, step: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Path:
    """Writes `folder/step-N`. `facts` (seed, config hash, versions) go into the manifest.

    Raises `CheckpointError` when the disk does not take it; what was there before is untouched then.
    """
    final = folder / folder_name(step)
    if final.exists() and is_good(final):  # a stop right after a restore: this step is safe already
        return final
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=folder))
        entries, checksum, size = _write_values(temporary / _VALUES, arrays)
        manifest = {
            "format": FORMAT,
            "step": step,
            **facts,
            "arrays": entries,
            "files": {_VALUES: {"size": size, "sha256": checksum}},
        }
        manifest["sha256"] = _manifest_checksum(manifest)
        files.write(temporary / _MANIFEST, json.dumps(manifest, indent=1).encode())
        files.sync_folder(temporary)
        temporary.chmod(0o755)  # mkdtemp's are for the owner alone
        if final.exists():  # damaged
            shutil.rmtree(final)
        os.rename(temporary, final)
        files.sync_folder(folder)
        _checksums[_stamp(final / _VALUES)] = checksum
        return final
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
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
            logging.warning("skipping a damaged checkpoint: %s", error)
    if found:
        raise CheckpointError(
            f"checkpoint: expected a usable checkpoint in {folder}, found {len(found)} damaged ones; "
            "--fresh starts at step 0 and keeps them aside"
        )
    return None


def steps(folder: Path) -> list[int]:
    """Steps with a finished directory, in no order, good or not. Raises `CheckpointError` when that cannot be known."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith("step-")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot read {folder}: {error.strerror}") from error
    return [int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()]


def verify(path: Path) -> Checkpoint:
    """Reads the manifest and checks every file's size and SHA-256. Raises `CheckpointError` with file and reason."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        step, checksum = manifest["step"], manifest["sha256"]
        expected_files = {name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path / _MANIFEST}: missing") from None
    except PermissionError as error:
        raise _unreadable(path / _MANIFEST, error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / _MANIFEST}: not a manifest ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / _MANIFEST}: expected format {FORMAT}, found {manifest.get('format')!r}")
    if checksum != _manifest_checksum(manifest) or path.name != folder_name(step):
        raise CheckpointError(f"{path / _MANIFEST}: does not match its own SHA-256 or its folder")
    for name, (expected_size, expected_checksum) in expected_files.items():
        try:
            size = (path / name).stat().st_size
            if size != expected_size:
                raise CheckpointError(f"{path / name}: expected {expected_size} bytes, found {size}")
            checksum = _checksum(path / name)
        except PermissionError as error:
            raise _unreadable(path / name, error) from error
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
        if checksum != expected_checksum:
            raise CheckpointError(f"{path / name}: SHA-256 does not match the manifest")
    return Checkpoint(path, step, manifest)


def _unreadable(path: Path, error: OSError) -> Unreadable:
    return Unreadable(f"checkpoint: cannot read {path}: {error.strerror}; make it readable, or move its folder away")


def is_good(path: Path) -> bool:
    """Whether it verifies."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _checksum(path: Path) -> str:
    stamp = _stamp(path)
    if stamp not in _checksums:
        _checksums[stamp] = files.sha256(path)
    return _checksums[stamp]


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed save left behind."""
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Of everything else in the manifest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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


def _assemble(entry: dict[str, Any], data: Mapping[str, np.ndarray]) -> np.ndarray:
    dtype = np.dtype(entry["dtype"])
    whole = np.empty(entry["shape"], dtype)
    for piece in entry["slices"]:
        count = int(np.prod(piece["shape"], dtype=np.int64)) * dtype.itemsize
        raw = np.array(data[piece["file"]][piece["byte_offset"] : piece["byte_offset"] + count])
        place = tuple(slice(o, o + n) for o, n in zip(piece["offset"], piece["shape"], strict=True))
        whole[place] = raw.view(dtype).reshape(piece["shape"])
    return whole
