"""Loss scaling: what keeps gradients of 16 bits from vanishing (arXiv:1710.03740). The optimizer holds the scale."""

import math

import keras
import tensorflow as tf
from absl import logging

from tfdist.patches.layers import all_layers


def with_scale(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """A model that computes in float16 needs a loss scale: wraps an optimizer without one, as Keras' `compile` does. Call
    it under the strategy's scope."""
    half = any(layer.compute_dtype == "float16" for layer in all_layers(model))
    if not half or isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor:
        return optimizer
    logging.info(
        "the model computes in float16: its optimizer gets a dynamic loss scale (keras.optimizers.LossScaleOptimizer)"
    )
    return keras.optimizers.LossScaleOptimizer(optimizer)


def is_dynamic(optimizer: keras.optimizers.Optimizer) -> bool:
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def of(optimizer: keras.optimizers.Optimizer) -> tf.Tensor | None:
    """The scale of the next step; None where the optimizer does not ask for one."""
    if is_dynamic(optimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    return tf.constant(optimizer.loss_scale_factor, tf.float32) if optimizer.loss_scale_factor else None


def of_a_sum(optimizer: keras.optimizers.Optimizer, y, block_rows: tf.Tensor) -> tf.Tensor | None:
    """What to multiply a sum of losses with, where Keras' scale is meant for their mean.

    Divided by a power of two near the number of elements of a whole micro-batch (`block_rows` rows like those of `y`): that
    rounds nothing, gradients overflow at about the scales at which they do in Keras, and it is the same on any strategy.
    """
    scale = of(optimizer)
    if scale is None:
        return None
    per_row = math.prod(size or 1 for size in tf.nest.flatten(y)[0].shape[1:])
    exponent = tf.floor(tf.math.log(tf.cast(block_rows * per_row, tf.float64) + 0.5) / math.log(2.0))
    return scale / tf.cast(tf.pow(tf.constant(2.0, tf.float64), exponent), scale.dtype)


def adjust(optimizer: keras.optimizers.Optimizer, finite: tf.Tensor, counts: tf.Tensor) -> None:
    """Halves a dynamic scale after a step that was not finite, doubles it after `dynamic_growth_steps` that were; a step
    without weight does not count. All replicas pass the same, so it happens once."""
    if not is_dynamic(optimizer):
        return
    scale, good_steps = optimizer.dynamic_scale.value, optimizer.step_counter.value
    grows = tf.logical_and(finite, good_steps >= optimizer.dynamic_growth_steps - 1)
    new_scale = tf.where(finite, tf.where(grows, scale * 2, scale), scale / 2)
    new_good_steps = tf.where(tf.logical_and(finite, tf.logical_not(grows)), good_steps + 1, tf.zeros_like(good_steps))
    optimizer.dynamic_scale.assign(tf.where(counts, new_scale, scale))
    optimizer.step_counter.assign(tf.where(counts, new_good_steps, good_steps))
