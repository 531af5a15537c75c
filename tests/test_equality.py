"""The numerics contract: cells on strategies equal one device, in float64 and in float32. Which: pairs.py."""

import numpy as np
import pairs
import pytest
from cells import CELLS
from conftest import STRATEGIES, computed_together
from oracle import PROGRAM, assert_equal_to_one_device, cells_of
from results import results
from test_support import FEATURES

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
SERVERS = ("rows_of_embeddings_with_sgd_and_adagrad", "several_inputs_and_outputs_with_their_own_weights")
DTYPES = ("float64", "float32")
QUICK = {
    ("mirrored:2", "float64"): TWO_REPLICAS, ("mirrored:2", "float32"): FLOAT32, ("mirrored:4", "float64"): FLOAT32,
    ("multi_worker:2x1", "float64"): TWO_WORKERS,
    ("parameter_server:1x2", "float64"): SERVERS,  # variables in parts on two servers, one worker, no staleness
}  # fmt: skip
SERVER_COLUMNS = [("parameter_server:1x2", "float64"), ("parameter_server:2x2x2", "float64")]
# every cell on every strategy, in both precisions
MATRIX = {column: cells_of(*column) for column in [*((s, d) for s in STRATEGIES for d in DTYPES), *SERVER_COLUMNS]}
XLA_OF_A_WHOLE_MODEL = "llama_parts_dropout_recompute_and_clipping_with_xla"
CHOSEN = pairs.chosen(STRATEGIES, lambda name: cells_of(name, "float64"), FEATURES, cost={XLA_OF_A_WHOLE_MODEL: 9.0})
REST = {(s, "float64"): tuple(cell for layout, cell in CHOSEN if layout == s) for s in STRATEGIES} | {
    column: cells_of(*column) for column in [("mirrored:2", "float32"), *SERVER_COLUMNS]
}


def pytest_generate_tests(metafunc):
    if metafunc.function in (test_a_cross_section, test_every_cell):
        whole = MATRIX if metafunc.config.getoption("--matrix") else REST
        computed_together(metafunc, QUICK if metafunc.function is test_a_cross_section else whole)


def test_a_cross_section(strategy, dtype, cell, together):
    assert_equal_to_one_device(cell, strategy, dtype, together)


@pytest.mark.slow
@pytest.mark.timeout(900)  # whose turn it is computes the cells of a process, and perhaps waits for who computes the oracle
def test_every_cell(strategy, dtype, cell, together):
    assert_equal_to_one_device(cell, strategy, dtype, together)


def test_no_promised_pair_is_missing():
    float64 = lambda name: cells_of(name, "float64")  # noqa: E731
    run = [(strategy, cell) for (strategy, dtype), cells in REST.items() if dtype == "float64" for cell in cells]
    assert pairs.missing(run, STRATEGIES, float64, FEATURES) == []
    for feature, shown in FEATURES.items():  # one that is left out on one layout is noticed
        for layout in STRATEGIES:
            if set(shown) & set(float64(layout)):
                without = [pair for pair in run if pair[0] != layout or pair[1] not in shown]
                assert f"{feature} on {layout}" in pairs.missing(without, STRATEGIES, float64, FEATURES)
    assert len(set(run)) == len(run) and all(set(cells) <= set(MATRIX[column]) for column, cells in REST.items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mirrored:2", "multi_worker:2x1"])
def test_every_other_optimizer_on_two_replicas(strategy):
    assert_equal_to_one_device("every_other_optimizer", strategy, "float64")


def one_device():
    return results(PROGRAM, "one_device", "float64", TWO_REPLICAS)


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
        arrays = results(PROGRAM, strategy, "float64", TWO_REPLICAS)
        assert list(arrays[f"{cell}|skipped"]) == [4, 9, 14, 19]
        assert set(arrays[f"{cell}|who"]) == {f"the loss|{replica}"}, "row 7 of 8"
        assert arrays[f"{cell}|var/optimizer/iterations"][0] == 16


@pytest.mark.parametrize("strategy", ["one_device", "mirrored:2"])
def test_an_overflow_on_one_replica_halves_the_scale_once_for_all(strategy):
    arrays = results(PROGRAM, strategy, "float64", TWO_REPLICAS)
    cell = "mixed_float16_with_an_overflow_on_one_replica"
    assert list(arrays[f"{cell}|skipped"]) == [5]
    expected = [1024] * 4 + [512] * 6 + [1024] * 6 + [2048] * 4  # after each step
    assert list(arrays[f"{cell}|scales"]) == expected
    assert arrays[f"{cell}|var/optimizer/inner_optimizer/iterations"][0] == 19


@pytest.mark.parametrize(("strategy", "replicas"), [("mirrored:2", 2), ("multi_worker:2x1", 1)])
def test_one_trace_for_each_replica_and_one_collective_for_all_variables(strategy, replicas):
    """Of this process: two batch sizes, 20 steps, and one reduction of the gradients and the step's numbers."""
    cells = TWO_WORKERS if strategy == "multi_worker:2x1" else TWO_REPLICAS
    arrays, cell = results(PROGRAM, strategy, "float64", cells), "frozen_layers_missing_gradients_and_averaged_evaluation"
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
    arrays = results(PROGRAM, "mirrored:2", "float64", TWO_REPLICAS)
    one, other = (arrays[f"stock_dropout_differs_between_replicas|mask_{row}"] for row in (0, 1))
    assert (one != other).sum() > 10 and 16 < one.sum() < 48 and 16 < other.sum() < 48
