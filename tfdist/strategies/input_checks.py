"""What is wrong with a user's dataset, said before the first step. It looks; it reads nothing."""

import tensorflow as tf
from absl import logging

from tfdist.errors import UserError
from tfdist.patches.datasets import calls_python, shuffles_without_seed, upstream
from tfdist.strategies.base import InputContext


def check_length(dataset: tf.data.Dataset, start_step: int, num_steps: int, whole: bool) -> None:
    """Warns of one that ends before `num_steps` (0: not known). Raises `UserError` where the `whole` of an endless one is
    asked for."""
    batches = int(dataset.cardinality())
    if whole and batches == tf.data.INFINITE_CARDINALITY:
        raise UserError(
            "expected a dataset that ends (all of it is to be read), found one that repeats for ever; leave out .repeat(), "
            "use .take(n), or pass max_steps"
        )
    if 0 <= batches < num_steps:
        logging.warning(
            "the dataset has %d batches from step %d on, %d were asked for: this ends at step %d; .repeat() goes on",
            batches, start_step, num_steps, start_step + batches,
        )  # fmt: skip


def check_shapes(dataset: tf.data.Dataset) -> None:
    """Raises `UserError` where a size is not known beforehand: compiled for a TPU, every step has the same shapes."""
    unknown = [spec for spec in tf.nest.flatten(dataset.element_spec) if not spec.shape.is_fully_defined()]
    if unknown:
        raise UserError(
            f"expected elements whose shapes are all known, found {unknown[0].shape}; use .batch(n, drop_remainder=True), "
            "padded_batch with padded_shapes, or tf.ensure_shape"
        )


def check_runs_elsewhere(dataset: tf.data.Dataset) -> None:
    """Raises `UserError` for one that calls Python, where pipelines run in other processes than the program."""
    if any(calls_python(one) for one, _ in upstream(dataset)):
        raise UserError(
            "dataset_fn: expected TensorFlow operations alone under parameter servers, whose workers run the pipeline, "
            "found a call of Python (from_generator, py_function, numpy_function); read files with tf.data, or use Keras "
            "`fit`, for which the chief reads"
        )


def check_order(dataset: tf.data.Dataset, context: InputContext) -> None:
    """Raises `UserError` for a shuffle without a seed that is then sharded: each worker shuffles in its own way, so some
    samples are read twice and others never. Warns of one that is not: a resumed run sees another order."""
    for one, later in upstream(dataset):
        if not shuffles_without_seed(one):
            continue
        if context.pipelines > 1 and any("Shard" in name for name in later):
            raise UserError(
                "expected shuffle(..., seed=...) before shard(), found one without a seed: every worker would shuffle in "
                "its own way and read samples that others read too; give it a seed, or shard first"
            )
        logging.log_first_n(
            logging.WARNING, "the dataset shuffles without a seed: a run that is resumed sees another order than one that "
            "was not stopped; shuffle(..., seed=...)", 1,
        )  # fmt: skip
