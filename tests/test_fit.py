"""Keras `fit` under a tfdist scope has the numbers of stock Keras on one device: history, predictions, every variable."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fit_cells import CELLS, OWN_RANDOMNESS
from oracle import results
from processes import run

ALL = tuple(CELLS)
STOCK = tuple(cell for cell in CELLS if cell not in OWN_RANDOMNESS)
TWO_WORKERS = (
    "numpy_with_sample_weights_validation_and_uneven_batches",
    "masked_tokens_of_ragged_lengths",
    "accumulation_averages_decay_and_schedule",
)
ALL_CHECKS_INSIDE = ("stock_dropout_differs_between_replicas",)
TOLERANCES = {"float64": 1e-9, "float32": 2e-5}
FLOAT32_INSIDE = (
    "keras_hub_gpt2_and_llama",
)  # its normalisation and rotary positions compute in float32 whatever the policy


def assert_equal_to_stock_keras(cell: str, strategy: str, dtype: str, cells: tuple[str, ...] = ALL) -> None:
    """Everything that a cell keeps; of a variable the copy of each replica of each worker."""
    oracle = ("one_device", dtype, tuple(OWN_RANDOMNESS)) if cell in OWN_RANDOMNESS else ("stock", dtype, STOCK)
    with ThreadPoolExecutor(2) as pool:
        expected, found = pool.map(lambda run: results(*run, "fit_cells.py"), (oracle, (strategy, dtype, cells)))
    keys = [key for key in expected if key.startswith(f"{cell}|")]
    assert cell in ALL_CHECKS_INSIDE or len(keys) > 3
    assert keys == [key for key in found if key.startswith(f"{cell}|")]
    tolerance = TOLERANCES["float32" if cell in FLOAT32_INSIDE else dtype]
    for key in keys:
        one, copies = expected[key], found[key]
        one = one[:1] if "|var/" in key else one
        scale = max(np.abs(one[np.isfinite(one)]).max(initial=0), 1e-3)
        apart = np.where((copies == one) | (np.isnan(copies) & np.isnan(one)), 0, np.abs(copies - one))
        assert apart.max(initial=0) <= tolerance * scale, (key, one, copies)


@pytest.mark.parametrize("cell", ALL)
def test_two_replicas(cell):
    assert_equal_to_stock_keras(cell, "mirrored:2", "float64")


@pytest.mark.parametrize("cell", TWO_WORKERS)
def test_two_workers(cell):
    assert_equal_to_stock_keras(cell, "multi_worker:2x1", "float64", TWO_WORKERS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", ALL)
@pytest.mark.parametrize(("strategy", "dtype"), [
    ("one_device", "float64"), ("multi_worker:2x1", "float64"), ("mirrored:4", "float64"), ("mirrored:2", "float32"),
])  # fmt: skip
def test_every_cell(cell, strategy, dtype):
    assert_equal_to_stock_keras(cell, strategy, dtype)


def test_the_cells_do_train():
    arrays = results("stock", "float64", STOCK, "fit_cells.py")
    for cell in STOCK:
        losses = [arrays[key] for key in arrays if "/loss/" in key and key.startswith(f"{cell}|history/")]
        assert len(losses) < 2 or (np.isfinite(losses).all() and losses[0] != losses[-1]), cell


def test_what_a_cluster_promises(tmp_path):
    """Files, decisions, restored backups, refusals, workers that read different batches."""
    program = [str(Path(__file__).parent / "fit_cluster.py"), str(tmp_path)]
    done = run(["-m", "tfdist.cli", "launch", "--workers=2", f"--log_dir={tmp_path / 'logs'}", "--", "python", *program])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("all is well") == 2
    assert "[worker 0] Epoch 1/2" in done.stdout and "[worker 1] Epoch" not in done.stdout
    assert done.stderr.count("BackupAndRestore: a process that is killed") == 2, "said once a fit, by the chief"
