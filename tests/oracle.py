"""The one-device run is the oracle: the same cells on another strategy must give its losses and variables."""

import functools
import tempfile
from pathlib import Path

import numpy as np
from cells import CELLS, ZERO_GRADIENT
from processes import run


@functools.cache
def results(strategy: str, dtype: str, cells: tuple[str, ...] = tuple(CELLS)) -> dict[str, np.ndarray]:
    """All results of the cells on one strategy, computed once per session in one process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.npz"
        done = run([str(Path(__file__).parent / "cells.py"), strategy, dtype, str(out), *cells])
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(out) as arrays:
            return dict(arrays)


def assert_equal_to_one_device(cell: str, strategy: str, dtype: str, cells: tuple[str, ...] = tuple(CELLS)) -> None:
    """DESIGN: float64 to 1e-9; float32: loss to 1e-6, variables to 2e-5 of max(largest entry, 1e-3)."""
    expected, found = results("one_device", dtype, cells), results(strategy, dtype, cells)
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
        assert len(copies) == int(strategy.partition(":")[2]), "one copy per replica"
        scale = max(np.abs(one).max(), 1e-3)
        tolerance = 1e-9 if dtype == "float64" else 2e-5
        worst = np.abs(copies.astype(np.float64) - one).max() / scale
        assert worst <= tolerance, f"{key}: differs by {worst:.3g} of its largest entry"
