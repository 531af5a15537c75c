"""The one-device run is the oracle: the same cells on another strategy must give its losses and variables."""

import functools
import math
import tempfile
from pathlib import Path

import numpy as np
from cells import CELLS, ZERO_GRADIENT
from processes import run


@functools.cache
def results(strategy: str, dtype: str, cells: tuple[str, ...] = tuple(CELLS)) -> dict[str, np.ndarray]:
    """All results of the cells on one strategy, computed once per session in a process, or a cluster, of its own.

    Variables have a leading axis of all replicas of all workers.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.npz"
        program = [str(Path(__file__).parent / "cells.py"), strategy, dtype, str(out), *cells]
        kind, _, shape = strategy.partition(":")
        if kind == "multi_worker":
            launch = ["-m", "tfdist.cli", "launch", f"--workers={shape.partition('x')[0]}", f"--log_dir={folder}"]
            program = [*launch, "--", "python", *program]
        done = run(program, limit_s=600)
        assert done.returncode == 0, done.stderr[-4000:]
        workers = []
        for path in sorted(Path(folder).glob("results.npz.*")):
            with np.load(path) as arrays:
                workers.append(dict(arrays))
    for key in workers[0]:
        if "|var/" in key:
            workers[0][key] = np.concatenate([worker[key] for worker in workers])
        elif key.endswith("|eval"):
            assert all((worker[key] == workers[0][key]).all() for worker in workers), "every worker has the same evaluation"
    return workers[0]


def assert_equal_to_one_device(cell: str, strategy: str, dtype: str, cells: tuple[str, ...] = tuple(CELLS)) -> None:
    """DESIGN: float64 to 1e-9; float32: loss to 1e-6, variables to 2e-5 of max(largest entry, 1e-3)."""
    expected = results("one_device", dtype, tuple(CELLS) if dtype == "float64" else cells)  # all of them: shared by tests
    found = results(strategy, dtype, cells)
    keys = [key for key in expected if key.startswith(f"{cell}|")]
    assert keys and keys == [key for key in found if key.startswith(f"{cell}|")]
    for key in keys:
        if any(name in key for name in ZERO_GRADIENT):
            continue
        name = key.partition("|")[2]
        if not name.startswith("var/"):
            tolerance = 1e-9 if dtype == "float64" else 1e-6 * np.maximum(np.abs(expected[key]), 1.0)
            assert (np.abs(found[key] - expected[key]) <= tolerance).all(), (key, expected[key], found[key])
            continue
        one, copies = expected[key][0], found[key]
        assert len(copies) == math.prod(map(int, strategy.partition(":")[2].split("x"))), "one copy per replica"
        scale = max(np.abs(one).max(), 1e-3)
        tolerance = 1e-9 if dtype == "float64" else 2e-5
        worst = np.abs(copies.astype(np.float64) - one).max() / scale
        assert worst <= tolerance, f"{key}: differs by {worst:.3g} of its largest entry"
