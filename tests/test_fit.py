"""Keras `fit` under a tfdist scope has the numbers of stock Keras on one device: history, predictions, every variable."""

import numpy as np
import pytest
from fit_cells import CELLS, OWN_RANDOMNESS
from oracle import results

ALL = tuple(CELLS)
TWO_WORKERS = (
    "numpy_with_sample_weights_validation_and_uneven_batches",
    "masked_tokens_of_ragged_lengths",
    "accumulation_averages_decay_and_schedule",
)
ALL_CHECKS_INSIDE = ("stock_dropout_differs_between_replicas",)
TOLERANCES = {"float64": 1e-9, "float32": 2e-5}


def assert_equal_to_stock_keras(cell: str, strategy: str, dtype: str, cells: tuple[str, ...] = ALL) -> None:
    """Everything that a cell keeps; of a variable the copy of each replica of each worker."""
    oracle = "one_device" if cell in OWN_RANDOMNESS else "stock"
    found = results(strategy, dtype, cells, "fit_cells.py")
    expected = results(oracle, dtype, ALL, "fit_cells.py")
    keys = [key for key in expected if key.startswith(f"{cell}|")]
    assert cell in ALL_CHECKS_INSIDE or len(keys) > 3
    assert keys == [key for key in found if key.startswith(f"{cell}|")]
    for key in keys:
        one, copies = expected[key], found[key]
        one = one[:1] if "|var/" in key else one
        scale = max(np.abs(one[np.isfinite(one)]).max(initial=0), 1e-3)
        apart = np.where((copies == one) | (np.isnan(copies) & np.isnan(one)), 0, np.abs(copies - one))
        assert apart.max(initial=0) <= TOLERANCES[dtype] * scale, (key, one, copies)


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
    arrays = results("stock", "float64", ALL, "fit_cells.py")
    for cell in ALL:
        losses = [arrays[key] for key in arrays if key.startswith(f"{cell}|history/loss/")]
        assert len(losses) < 2 or (np.isfinite(losses).all() and losses[0] != losses[-1]), cell
