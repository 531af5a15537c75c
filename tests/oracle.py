"""The one-device run is the oracle: the same cells on another strategy must give its losses and variables."""

import functools
import math
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cells import ALONE, CELLS, NOT_IN_PARTS, NOT_ON_SERVERS, ON_TWO_REPLICAS_ONLY, SIXTEEN_BITS, ZERO_GRADIENT
from processes import run

OWN = ("|traces", "|collectives")  # of a strategy, as is a stock layer's mask
EXACT = ("tokens", "skipped", "who", "scales")  # equal whatever the precision


# in float32 on more than two replicas: what rounds most, and one of each kind of layer
IN_FLOAT32 = (
    "accumulation_dropout_weights_and_a_step_without_any",
    "batch_norm_with_empty_replicas_and_added_losses",
    "convolution_with_batch_norm_accumulation_and_adafactor",
    "recurrent_with_sparse_embedding_and_lion",
    "dense_model_with_l2_momentum_and_clip_by_value",
)


def cells_of(strategy: str, dtype: str) -> tuple[str, ...]:
    """The cells that run together on a strategy: those in 16 bits in one precision only, some on two replicas only."""
    if dtype == "float32" and strategy in ("mirrored:4", "multi_worker:2x2", "multi_worker:3x1"):
        return IN_FLOAT32
    alone = ALONE | (set() if strategy in ("one_device", "mirrored:2") else ON_TWO_REPLICAS_ONLY)
    if strategy.startswith("parameter_server"):
        alone = alone | (NOT_IN_PARTS if strategy.count("x") > 1 else NOT_ON_SERVERS)
    return tuple(cell for cell in CELLS if cell not in alone and not (dtype == "float32" and cell in SIXTEEN_BITS))


def results(strategy: str, dtype: str, cells: tuple[str, ...], program: str = "cells.py") -> dict[str, np.ndarray]:
    """The results of the cells on one strategy, computed once per session in a process, or a cluster, of its own.

    Variables have a leading axis of all replicas of all workers.
    """
    found = _results_or_error(strategy, dtype, cells, program)
    assert not isinstance(found, str), found
    return found


@functools.cache
def _results_or_error(strategy: str, dtype: str, cells: tuple[str, ...], program: str) -> dict[str, np.ndarray] | str:
    """An error is kept too: a cell that fails must not run again for each of the others."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.npz"
        program = [str(Path(__file__).parent / program), strategy, dtype, str(out), *cells]
        kind, _, shape = strategy.partition(":")
        if kind == "multi_worker":
            launch = ["-m", "tfdist.cli", "launch", f"--workers={shape.partition('x')[0]}", f"--log_dir={folder}"]
            program = [*launch, "--", "python", *program]
        if kind == "parameter_server":
            workers, servers, *_ = shape.split("x")
            launch = ["-m", "tfdist.cli", "launch", f"--workers={workers}", f"--ps={servers}", f"--log_dir={folder}"]
            program = [*launch, "--", "python", *program]
        try:
            done = run(program, limit_s=600)
        except AssertionError as error:  # killed
            return str(error)[-4000:]
        if done.returncode != 0:  # with the stacks of a process that was frozen or stuck, which its log alone has
            logs = [path.read_text(errors="replace") for path in sorted(Path(folder).glob("*.log"))]
            return done.stderr[-4000:] + "".join(log[-6000:] for log in logs if "most recent call first" in log)
        workers = []
        for path in sorted(Path(folder).glob("results.npz.*")):
            with np.load(path) as arrays:
                workers.append(dict(arrays))
        if not workers:
            return "no results were written"
    for key in workers[0]:
        if "|var/" in key:
            workers[0][key] = np.concatenate([worker[key] for worker in workers])
        elif key.endswith("|eval"):
            assert all((worker[key] == workers[0][key]).all() for worker in workers), "every worker has the same evaluation"
    return workers[0]


def run_two_at_a_time(keys: Iterable[tuple]) -> None:
    """`results` of each, for those who ask later. Of runs of one process each, which leaves a core idle."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda key: _results_or_error(*key), dict.fromkeys(keys)))


def columns_of(session, module) -> list[tuple[str, str]]:
    """The columns of the matrix that `test_every_cell` of a module is about to go through and that are one process each."""
    items = [item for item in session.items if item.module is module and item.originalname == "test_every_cell"]
    found = dict.fromkeys((item.callspec.params["strategy"], item.callspec.params["dtype"]) for item in items)
    return [column for column in found if column[0].partition(":")[0] in ("one_device", "mirrored")]


def assert_equal_to_one_device(cell: str, strategy: str, dtype: str, cells: tuple[str, ...] = ()) -> None:
    """Equal: float64 to 1e-9; float32: loss to 1e-6, variables to 2e-5 of max(largest entry, 1e-3). `cells`: those that
    run together with it in one process; default: all of the strategy."""
    cells = cells or cells_of(strategy, dtype)
    together = cells_of("one_device", dtype) if cells == cells_of(strategy, dtype) else cells
    with ThreadPoolExecutor(2) as pool:
        expected, found = pool.map(lambda run: results(*run), (("one_device", dtype, together), (strategy, dtype, cells)))
    keys = [key for key in expected if key.startswith(f"{cell}|")]
    assert keys and keys == [key for key in found if key.startswith(f"{cell}|")]
    for key in keys:
        if key.endswith(OWN) or any(name in key for name in ZERO_GRADIENT) or "|mask_" in key:
            continue
        one, copies = expected[key], found[key]
        name = key.rpartition("|")[2]
        if name in EXACT:
            if name == "who":  # the oracle has one replica
                one, copies = ([text.rpartition("|")[0] for text in values] for values in (one, copies))
            assert list(one) == list(copies), (key, one, copies)
            continue
        if "|var/" in key:
            shape = strategy.partition(":")[2].split("x")
            expected_copies = 1 if strategy.startswith("parameter_server") else math.prod(map(int, shape))
            assert len(copies) == expected_copies, "one copy per replica"
            one = one[0]
            worst = np.abs(copies.astype(np.float64) - one).max() / max(np.abs(one).max(), 1e-3)
        else:
            apart = ~((copies == one) | (np.isnan(copies) & np.isnan(one)))  # a step may be not finite in both
            one, copies = one[apart], copies[apart]
            worst = (np.abs(copies - one) / np.maximum(np.abs(one), 1.0)).max(initial=0.0)
        tolerance = {"float64": 1e-9, "float32": 2e-5 if "|var/" in key else 1e-6}[dtype]
        tolerance = SIXTEEN_BITS.get(cell, tolerance)
        assert worst <= tolerance, f"{key}: differs by {worst:.3g} of its largest entry, {one}, {copies}"
