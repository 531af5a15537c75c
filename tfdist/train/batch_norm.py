"""Batch normalisation over the global micro-batch: every replica normalises with the statistics of all real rows.

As in arXiv:1802.07876 (synchronised statistics), with padding rows left out, so that a batch that splits unevenly has the
statistics of one device. Keras' own `synchronized=True` weighs all replicas alike and counts padding.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.patches.layers import all_layers, batch_norm_moments

# a context in which a collective may stand in the middle of a forward pass
Suspended = Callable[[], AbstractContextManager]


def layers_of(model: keras.Layer) -> list[keras.layers.BatchNormalization]:
    """The layers that take statistics of the batch; a frozen one uses its moving statistics."""
    return [layer for layer in all_layers(model) if _is_batch_norm(layer) and layer.trainable]


def _is_batch_norm(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


@contextlib.contextmanager
def over_replicas(layers: list, rows: tf.Tensor, places: int, suspended: Suspended | None):
    """Inside, the `layers` of a forward pass take the statistics of the first `rows` of `places` rows of each replica.

    `suspended` None: there is one replica, and nothing to reduce.
    """
    real = tf.range(places) < tf.cast(rows, tf.int32)  # [places]

    def real_rows(layer, inputs):
        if inputs.shape[0] is not None and inputs.shape[0] != real.shape[0]:
            raise UserError(
                f"batch normalisation ({layer.path}): expected inputs with the {real.shape[0]} rows of the batch first, "
                f"found shape {inputs.shape}, where rows that only fill up a share cannot be told apart; normalise before "
                "reshaping"
            )
        return real

    with statistics(layers, real_rows, _sum_over_replicas(suspended) if suspended else lambda t: t):
        yield


@contextlib.contextmanager
def statistics(layers: list, real_rows: Callable, total: Callable[[tf.Tensor], tf.Tensor], epsilon: float = 0.0):
    """Inside, the `layers` take the statistics of `real_rows(layer, inputs)`, bool [rows], of all that `total` sums up.

    `epsilon` is added to the number of places where a mask leaves some out, as Keras does.
    """
    if not layers:
        yield
        return

    def moments(layer, inputs, mask):
        return _moments(layer, inputs, mask, real_rows(layer, inputs), total, epsilon)

    with batch_norm_moments(moments):
        yield


def _moments(layer, inputs, mask, real: tf.Tensor, total: Callable, epsilon: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance [channels] over all replicas; those so far, if no row anywhere is real."""
    rank, axis = inputs.shape.rank, layer.axis % inputs.shape.rank
    counted = tf.reshape(real, [-1] + [1] * (rank - 1))
    if mask is not None:
        counted = tf.logical_and(counted, tf.cast(mask, tf.bool)[..., None])
    counted = tf.broadcast_to(counted, tf.shape(inputs))
    axes = [i for i in range(rank) if i != axis]
    # the mean first: E[x^2] - E[x]^2 in one reduction would cancel where the mean is large
    shape = [-1 if i == axis else 1 for i in range(rank)]
    sums = [tf.where(counted, inputs, tf.zeros_like(inputs)), tf.cast(counted, inputs.dtype)]
    first, count = tf.unstack(total(tf.stack([tf.reduce_sum(t, axes) for t in sums])))
    divisor = tf.maximum(count, 1) if mask is None else tf.maximum(count, 1) + tf.cast(epsilon, count.dtype)
    mean = first / divisor
    apart = tf.where(counted, inputs - tf.reshape(mean, shape), tf.zeros_like(inputs))
    variance = total(tf.reduce_sum(tf.square(apart), axes)) / divisor
    so_far = [tf.stop_gradient(tf.cast(v.value, inputs.dtype)) for v in (layer.moving_mean, layer.moving_variance)]
    return tf.where(count > 0, mean, so_far[0]), tf.where(count > 0, variance, so_far[1])


def _sum_over_replicas(suspended: Suspended) -> Callable[[tf.Tensor], tf.Tensor]:
    def reduce(tensor):
        with suspended():
            return tf.distribute.get_replica_context().all_reduce("SUM", tensor)

    @tf.custom_gradient
    def total(tensor):
        return reduce(tensor), reduce  # the gradient of a sum over all is the sum of all gradients

    return total
