"""What cells of training give on each strategy: computed once for a tree, in forks, and kept on disk for every process and
every call of pytest. `.results/` has a folder for each state of the product and of the program with the cells."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from processes import run_forked, run_forked_cluster, session_folder

HERE = Path(__file__).parent
KEPT = HERE.parent / ".results"
KEPT_FOR_S = 24 * 3600.0
LIMIT_S = 120.0  # of a process, and of each of its cells
PACKAGES = ("tensorflow", "keras", "numpy", "keras-hub")


def results(program: str, strategy: str, dtype: str, cells: Sequence[str]) -> dict[str, np.ndarray]:
    """By `cell|name`. The cells that nobody has computed yet run together, in one process or cluster.

    Variables have a leading axis of all replicas of all workers.
    """
    folder = _of_this_tree(program) / f"{strategy}-{dtype}".replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if missing := [cell for cell in cells if not _is_there(folder, cell)]:
            for cell in sorted(missing):  # in one order: nobody waits in a circle
                stack.enter_context(_locked(folder / f"{cell}.lock"))
            missing = [cell for cell in missing if not _is_there(folder, cell)]
        while missing:
            _compute(program, strategy, dtype, missing, folder)
            missing = [cell for cell in missing if not _is_there(folder, cell)]
    found = {}
    for cell in cells:
        error = _error_of(folder, cell)
        assert not error.exists(), f"{cell} on {strategy} in {dtype}:\n{error.read_text()}"
        found |= {f"{cell}|{name}": value for name, value in _read_once(folder / f"{cell}.npz").items()}
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


_read_once = functools.cache(_read)


def _is_there(folder: Path, cell: str) -> bool:
    return (folder / f"{cell}.npz").exists() or _error_of(folder, cell).exists()


def _error_of(folder: Path, cell: str) -> Path:
    """Of this session alone: the next one tries again, while in this one a cell that fails is not run for each test."""
    return session_folder() / f"{folder.parent.name}-{folder.name}-{cell}.error"


@contextlib.contextmanager
def _locked(path: Path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compute(program: str, strategy: str, dtype: str, cells: Sequence[str], folder: Path) -> None:
    """Stores what each cell gives. The first one that gives nothing has an error, and those behind it are left out."""
    kind, _, shape = strategy.partition(":")
    sizes = [int(n) for n in shape.split("x")] if shape else []
    limit_s = LIMIT_S * (1 + len(cells))
    with tempfile.TemporaryDirectory() as out:
        command = [str(HERE / program), strategy, dtype, out, *cells]
        try:
            if kind == "multi_worker":
                ended = run_forked_cluster(command, workers=sizes[0], limit_s=limit_s)
            elif kind == "parameter_server":
                ended = run_forked_cluster(command, workers=sizes[0], servers=sizes[1], limit_s=limit_s)
            else:
                ended = [run_forked(command, limit_s=limit_s)]
            error = "".join(f"exit code {done.returncode}\n{done.stderr[-4000:]}" for done in ended if done.returncode)
        except AssertionError as killed:
            error = str(killed)[-6000:]
        workers = sizes[0] if kind == "multi_worker" else 1
        for cell in cells:
            files = [Path(out) / f"{cell}.{worker}.npz" for worker in range(workers)]
            if not all(file.exists() for file in files):
                _error_of(folder, cell).write_text(error or "no results were written")
                break
            if error and cell == cells[-1]:  # it crashed when all was written
                _error_of(folder, cell).write_text(error)
                break
            try:
                _store(folder / f"{cell}.npz", _put_together([_read(file) for file in files], program == "fit_cells.py"))
            except AssertionError as differ:
                _error_of(folder, cell).write_text(str(differ))


def _put_together(workers: list[dict[str, np.ndarray]], all_alike: bool) -> dict[str, np.ndarray]:
    """One copy of each variable for each replica of each worker; of what all know, the first worker's. `all_alike`: whether
    every worker is to have the same of all the rest."""
    whole = dict(workers[0])
    for key in whole:
        if "|var/" in f"|{key}":
            whole[key] = np.concatenate([worker[key] for worker in workers])
        elif key == "eval" or key.endswith("|eval") or all_alike:
            same = all(np.array_equal(worker[key], whole[key], equal_nan=True) for worker in workers)
            assert same, f"every worker has the same {key}"
    return whole


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(f"{path}.new", "wb") as file:
        np.savez(file, **arrays)
    os.rename(f"{path}.new", path)


@functools.cache
def _of_this_tree(program: str) -> Path:
    """The folder for this state of the product, of the program, and of what both run on. Those of other states go."""
    files = [*sorted((HERE.parent / "tfdist").rglob("*.py")), HERE / "results.py", HERE / "processes.py", HERE / "zygote.py"]
    state = hashlib.sha256()
    for path in (*files, HERE / program):
        state.update(path.read_bytes())
    versions = {name: _version(name) for name in PACKAGES}
    state.update(json.dumps([sys.version, versions, os.cpu_count()]).encode())
    folder = KEPT / f"{program.removesuffix('.py')}-{state.hexdigest()[:16]}"
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for other in KEPT.iterdir():
            if time.time() - other.stat().st_mtime > KEPT_FOR_S:
                shutil.rmtree(other, ignore_errors=True)
    return folder


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
