"""The numerics contract: every cell on every strategy equals one device, in float64 and in float32."""

import numpy as np
import pytest
from cells import CELLS
from oracle import assert_equal_to_one_device, results

# a cross-section for the ordinary test run; the rest is slow
FOUR_REPLICAS = ("dense_model_with_l2_momentum_and_clip_by_value",)
TWO_WORKERS = (
    "accumulation_and_dropout",
    "token_weights_uneven_batches_and_a_step_without_weight",
    "empty_replicas_and_dropout",
)
FLOAT32 = ("dense_model_with_l2_momentum_and_clip_by_value",)


@pytest.mark.parametrize("cell", CELLS)
def test_two_replicas_in_float64(cell):
    assert_equal_to_one_device(cell, "mirrored:2", "float64")


@pytest.mark.parametrize("cell", FLOAT32)
def test_two_replicas_in_float32(cell):
    assert_equal_to_one_device(cell, "mirrored:2", "float32", FLOAT32)


@pytest.mark.parametrize("cell", FOUR_REPLICAS)
def test_four_replicas_in_float64(cell):
    expected, found = results("one_device", "float64"), results("mirrored:4", "float64", FOUR_REPLICAS)
    for key in [key for key in expected if key.startswith(f"{cell}|") and "key/bias" not in key]:
        np.testing.assert_allclose(found[key][-1:], expected[key][-1:], rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("cell", TWO_WORKERS)
def test_two_workers_in_float64(cell):
    assert_equal_to_one_device(cell, "multi_worker:2x1", "float64", TWO_WORKERS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell(cell, strategies, dtype):
    assert_equal_to_one_device(cell, strategies, dtype)


def test_the_cells_do_train():
    """Equality of runs that stand still would prove nothing."""
    arrays = results("one_device", "float64")
    for cell in CELLS:
        losses = arrays[f"{cell}|losses"]
        assert np.isfinite(losses).all()
        assert losses[-3:].mean() < losses[:3].mean() or "uneven" in cell, cell


def test_a_step_without_weight_changes_nothing_and_counts():
    arrays = results("one_device", "float64")
    cell = "token_weights_uneven_batches_and_a_step_without_weight"
    assert (arrays[f"{cell}|losses"][1::3] == 0).all()
    assert arrays[f"{cell}|var/step"][0] == 20
    assert arrays[f"{cell}|var/optimizer/iterations"][0] == 13  # 20 steps less the 7 without weight
