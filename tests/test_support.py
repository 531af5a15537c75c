"""The support table says nothing that no test shows: each `yes` names the cells of the matrix, or the tests, behind it."""

import importlib

import pytest
from cells import CELLS

from tfdist.errors import UserError
from tfdist.strategies import support

STRATEGIES = ("OneDevice", "Mirrored", "MultiWorkerMirrored", "ParameterServer")
LLAMA = "llama_parts_dropout_recompute_and_clipping_with_xla"
XLA = "a_small_model_compiled_by_xla_with_dropout_and_accumulation"
RECOMPUTE = "workers_of_unequal_speed_with_dropout_recompute_and_accumulation"
ACCUMULATION = "accumulation_dropout_weights_and_a_step_without_any"
EMPTY = "empty_replicas_dropout_clip_by_norm_and_ema"
DENSE = "dense_model_with_l2_momentum_and_clip_by_value"
CONVOLUTION = "convolution_with_batch_norm_accumulation_and_adafactor"
BATCH_NORM = "batch_norm_with_empty_replicas_and_added_losses"
RECURRENT = "recurrent_with_sparse_embedding_and_lion"
# feature -> cells of the matrix, or tests (module:name) where equality with one device is not the question
SHOWN = {
    "train, with every Keras optimizer": [DENSE, RECURRENT, "muon_on_hidden_layers", CONVOLUTION, "every_other_optimizer"],
    "token-weighted loss": [ACCUMULATION],
    "dict inputs, several outputs with their own losses and weights": ["several_inputs_and_outputs_with_their_own_weights"],
    "accumulation": [ACCUMULATION, CONVOLUTION],
    "clipping (norm, global norm, value)": [EMPTY, LLAMA, DENSE],
    "uneven last batch, empty replica, step without weight": [EMPTY, ACCUMULATION],
    "pipelines that end at different steps: all finish together": ["pipelines_that_end_at_different_steps"],
    "dropout of tfdist models, equal to one device": [EMPTY, ACCUMULATION, LLAMA, RECOMPUTE, XLA],
    "stock Keras random layers (differ between replicas, not equal to one device)": [
        "test_equality:test_replicas_draw_different_masks_in_stock_layers",
        "test_trainer:test_stock_dropout_differs_between_steps_and_is_the_same_again",
        "test_verify:test_a_model_alone_is_enough",  # on a cluster it looks at the seeds
    ],
    "batch normalisation, synchronised (without XLA on several replicas)": [BATCH_NORM, CONVOLUTION],
    "L2 and add_loss (of the data: the mean over the replicas, by weight)": [DENSE, "added_losses_and_what_layers_count"],
    "statistics of other layers (the mean over the replicas, by rows)": ["added_losses_and_what_layers_count"],
    "frozen layers, variables without gradient": ["frozen_layers_missing_gradients_and_averaged_evaluation"],
    "sparse gradients of embeddings (reduced as dense ones)": [RECURRENT, "rows_of_embeddings_with_sgd_and_adagrad"],
    "recurrent and convolution layers": [RECURRENT, CONVOLUTION],
    "label smoothing, z-loss": [ACCUMULATION],
    "activation recompute": [LLAMA, RECOMPUTE],
    "XLA inside the replica": [LLAMA, XLA],
    "mixed_bfloat16 (equal within 16 bits)": ["mixed_bfloat16"],
    "mixed_float16 with dynamic loss scaling (equal within 16 bits)": ["mixed_float16_with_an_overflow_on_one_replica"],
    "steps that are not finite: skipped by all, named": ["a_step_that_is_not_finite_is_skipped_by_all"],
    "EMA of the weights, swapped in for evaluation": ["frozen_layers_missing_gradients_and_averaged_evaluation", EMPTY],
    "exact evaluation and metrics": [ACCUMULATION, "several_inputs_and_outputs_with_their_own_weights"],
    "checkpoint and resume": [
        "test_trainer:test_a_stopped_run_goes_on_bit_by_bit",
        "test_cluster_training:test_killed_and_restarted_again_and_again",
    ],
    "gradients reduced in bfloat16 (not equal to one device)": [
        "test_trainer:test_gradients_in_bfloat16_and_counts_exact",
        "test_cluster_training:test_gradients_in_bfloat16_and_in_packs_train_nearly_the_same",
    ],
    "Keras `fit`, `evaluate`, `predict`, with the numbers of stock Keras on one device": ["test_fit:test_every_cell"],
    "`fit`: the optimizer's own clipping, accumulation, averages, loss scale, decay, schedules": [
        f"fit_cells:{cell}"
        for cell in (
            "accumulation_averages_decay_and_schedule",
            "averages_swapped_for_evaluation",
            "single_batches",
            "loss_scale_with_an_overflow_on_one_replica",
            "a_fixed_loss_scale_frozen_layers_and_missing_gradients",
        )
    ],
    "`fit`: masks, sample and class weights, every reduction of losses, uneven batches": [
        f"fit_cells:{cell}"
        for cell in (
            "masked_tokens_of_ragged_lengths",
            "dicts_several_outputs_and_their_weights",
            "numpy_with_sample_weights_validation_and_uneven_batches",
            "convolution_with_batch_norm_class_weight_and_validation_split",
            "a_subclass_that_computes_its_own_loss_and_metrics",
            "losses_and_metrics_that_are_no_sum_over_rows",
        )
    ],
    "`fit`: a `train_step` of one's own (losses: means or sums over rows; gradients: of the global batch)": [
        "fit_cells:a_train_step_of_its_own",
        "fit_cells:gradients_changed_by_hand",
        "fit_cells:losses_of_a_train_step_in_many_forms",
        "fit_cells:masked_language_model",
    ],
    "`fit`: a `train_step` that computes again after an update (GANs)": [
        "fit_cells:generative_adversarial_network",
        "fit_cells:two_optimizers_in_a_train_step",
    ],
    "`fit`: models without `call`, logs of any name (results of metrics are those of all replicas)": [
        "fit_cells:variational_autoencoder",
        "fit_cells:logs_computed_from_results",
    ],
    "`fit`: tables under adaptive optimizers, where each look-up of a row counts by itself": [
        f"fit_cells:{cell}"
        for cell in (
            "positions_that_each_replica_looks_up",
            "tokens_that_repeat_and_rows_that_are_equal_by_chance",
            "one_table_used_both_ways",
            "tables_compiled_by_xla_or_run_eagerly",
            "tables_looked_up_in_a_function_and_by_sparse_ids",
        )
    ],
    "`fit`: XLA (not with masks, batch normalisation or a `train_step` of one's own on several replicas)": [
        "fit_cells:compiled_by_xla",
        "fit_cells:compiled_by_xla_but_it_communicates",
    ],
    "`fit`: callbacks; files and lines are the chief's, decisions everybody's": [
        "fit_cells:callbacks_that_decide",
        "fit_cells:learning_rate_scheduler_and_a_stop_at_nan",
        "test_fit:test_what_a_cluster_promises",
    ],
    "`fit`: tfdist.fit.Checkpoint and SwapEMAWeights": [
        "fit_cells:averages_swapped_for_evaluation",
        "test_fit_checkpoint:test_interrupted_anywhere_it_ends_like_one_that_was_not",
        "test_fit_checkpoint:test_a_cluster_is_stopped_and_goes_on",
    ],
    "`fit`: PyDataset, generators": ["fit_cells:sequences_and_generators"],
}
# what cells of the matrix show; which of them run on which layouts: pairs.py
FEATURES = {
    feature: tuple(name for name in shown if ":" not in name)
    for feature, shown in SHOWN.items()
    if any(":" not in name for name in shown)
}


@pytest.mark.parametrize("feature", support.TABLE)
def test_every_feature_is_shown_or_refused(feature):
    row = support.TABLE[feature]
    if any(row[name] == support.YES for name in STRATEGIES):
        for shown in SHOWN[feature]:
            module, colon, test = shown.partition(":")
            assert hasattr(importlib.import_module(module), test) if colon else shown in CELLS, shown
    for name, reason in row.items():
        if reason:
            with pytest.raises(UserError) as refusal:
                support.refuse(feature, name)
            assert reason in str(refusal.value)
