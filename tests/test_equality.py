"""The numerics contract: every cell on every strategy equals one device, in float64 and in float32."""

import numpy as np
import pytest
from cells import CELLS
from conftest import STRATEGIES
from oracle import assert_equal_to_one_device, cells_of, columns_of, results, run_two_at_a_time

# a cross-section for the ordinary test run; all cells on all columns are slow
TWO_REPLICAS = (
    "accumulation_dropout_weights_and_a_step_without_any",
    "empty_replicas_dropout_clip_by_norm_and_ema",
    "convolution_with_batch_norm_accumulation_and_adafactor",
    "several_inputs_and_outputs_with_their_own_weights",
    "frozen_layers_missing_gradients_and_averaged_evaluation",
    "a_step_that_is_not_finite_is_skipped_by_all",
    "mixed_float16_with_an_overflow_on_one_replica",
    "stock_dropout_differs_between_replicas",
)
FOUR_REPLICAS = ("dense_model_with_l2_momentum_and_clip_by_value",)
TWO_WORKERS = (
    "batch_norm_with_empty_replicas_and_added_losses",
    "several_inputs_and_outputs_with_their_own_weights",
    "empty_replicas_dropout_clip_by_norm_and_ema",
    "frozen_layers_missing_gradients_and_averaged_evaluation",
)
FLOAT32 = ("dense_model_with_l2_momentum_and_clip_by_value",)
DTYPES = ("float64", "float32")


@pytest.mark.parametrize("cell", TWO_REPLICAS)
def test_two_replicas_in_float64(cell):
    assert_equal_to_one_device(cell, "mirrored:2", "float64", TWO_REPLICAS)


@pytest.mark.parametrize("cell", FLOAT32)
def test_two_replicas_in_float32(cell):
    assert_equal_to_one_device(cell, "mirrored:2", "float32", FLOAT32)


@pytest.mark.parametrize("cell", FOUR_REPLICAS)
def test_four_replicas_in_float64(cell):
    expected, found = results("one_device", "float64", FLOAT32), results("mirrored:4", "float64", FOUR_REPLICAS)
    for key in [key for key in found if not key.endswith(("|who", "|traces", "|collectives"))]:
        np.testing.assert_allclose(found[key][-1:], expected[key][-1:], rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("cell", TWO_WORKERS)
def test_two_workers_in_float64(cell):
    assert_equal_to_one_device(cell, "multi_worker:2x1", "float64", TWO_WORKERS)


SERVERS = ("rows_of_embeddings_with_sgd_and_adagrad", "several_inputs_and_outputs_with_their_own_weights")


@pytest.mark.parametrize("cell", SERVERS)
def test_parameter_servers_in_float64(cell):
    """Variables in parts on two servers, one worker, no staleness."""
    assert_equal_to_one_device(cell, "parameter_server:1x2", "float64", SERVERS)


COLUMNS = [(s, d) for s in STRATEGIES for d in DTYPES] + [
    ("parameter_server:1x2", "float64"), ("parameter_server:2x2x2", "float64"),
]  # fmt: skip
REST = [(s, d, cell) for s, d in COLUMNS for cell in cells_of(s, d)]


@pytest.fixture(scope="module")
def columns_of_one_process(request):
    columns = columns_of(request.session, request.module)
    oracles = [("one_device", dtype) for _, dtype in columns]
    run_two_at_a_time((*column, cells_of(*column), "cells.py") for column in (*oracles, *columns))


@pytest.mark.slow
@pytest.mark.timeout(1900)  # the first one runs all cells of several strategies, or of its own
@pytest.mark.parametrize(("strategy", "dtype", "cell"), REST)
@pytest.mark.usefixtures("columns_of_one_process")
def test_every_cell(strategy, dtype, cell):
    assert_equal_to_one_device(cell, strategy, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mirrored:2", "multi_worker:2x1"])
def test_every_other_optimizer_on_two_replicas(strategy):
    assert_equal_to_one_device("every_other_optimizer", strategy, "float64", ("every_other_optimizer",))


def one_device():
    return results("one_device", "float64", TWO_REPLICAS)


def test_the_cells_do_train():
    """Equality of runs that stand still would prove nothing."""
    for key, losses in one_device().items():
        if key.endswith("|losses"):
            finite = losses[np.isfinite(losses) & (losses != 0)]
            assert len(finite) >= 5 and finite[-3:].mean() < finite[:3].mean(), key


def test_a_step_without_weight_changes_nothing_and_counts():
    arrays, cell = one_device(), "accumulation_dropout_weights_and_a_step_without_any"
    assert (arrays[f"{cell}|losses"][1::3] == 0).all()
    assert arrays[f"{cell}|var/step"][0] == 20
    assert arrays[f"{cell}|var/optimizer/iterations"][0] == 13  # 20 steps less the 7 without weight


def test_a_step_that_is_not_finite_names_variable_and_replica():
    cell = "a_step_that_is_not_finite_is_skipped_by_all"
    for strategy, replica in (("one_device", 0), ("mirrored:2", 1)):
        arrays = results(strategy, "float64", TWO_REPLICAS)
        assert list(arrays[f"{cell}|skipped"]) == [4, 9, 14, 19]
        assert set(arrays[f"{cell}|who"]) == {f"the loss|{replica}"}, "row 7 of 8"
        assert arrays[f"{cell}|var/optimizer/iterations"][0] == 16


@pytest.mark.parametrize("strategy", ["one_device", "mirrored:2"])
def test_an_overflow_on_one_replica_halves_the_scale_once_for_all(strategy):
    arrays = results(strategy, "float64", TWO_REPLICAS)
    cell = "mixed_float16_with_an_overflow_on_one_replica"
    assert list(arrays[f"{cell}|skipped"]) == [5]
    expected = [1024] * 4 + [512] * 6 + [1024] * 6 + [2048] * 4  # after each step
    assert list(arrays[f"{cell}|scales"]) == expected
    assert arrays[f"{cell}|var/optimizer/inner_optimizer/iterations"][0] == 19


@pytest.mark.parametrize(("strategy", "replicas"), [("mirrored:2", 2), ("multi_worker:2x1", 1)])
def test_one_trace_for_each_replica_and_one_collective_for_all_variables(strategy, replicas):
    """Of this process: two batch sizes, 20 steps, and one reduction of the gradients and the step's numbers."""
    cells = TWO_WORKERS if strategy == "multi_worker:2x1" else TWO_REPLICAS
    arrays, cell = results(strategy, "float64", cells), "frozen_layers_missing_gradients_and_averaged_evaluation"
    assert arrays[f"{cell}|traces"] == [replicas]
    assert arrays[f"{cell}|collectives"] == [replicas]


def test_sparse_gradients_are_in_the_matrix():
    """The embedding table of the recurrent cell gets IndexedSlices from TensorFlow."""
    import keras
    import tensorflow as tf

    layer = keras.layers.Embedding(5, 2)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.constant([[1, 2]])))
    assert isinstance(tape.gradient(loss, layer.embeddings.value), tf.IndexedSlices)
    assert "recurrent_with_sparse_embedding_and_lion" in CELLS


def test_replicas_draw_different_masks_in_stock_layers():
    arrays = results("mirrored:2", "float64", TWO_REPLICAS)
    one, other = (arrays[f"stock_dropout_differs_between_replicas|mask_{row}"] for row in (0, 1))
    assert (one != other).sum() > 10 and 16 < one.sum() < 48 and 16 < other.sum() < 48
