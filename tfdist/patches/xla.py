"""An operation of XLA that `tf.raw_ops` does not export (TensorFlow 2.19 to 2.21, `tf2xla/ops/xla_ops.cc`)."""

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops


def optimization_barrier(x: tf.Tensor) -> tf.Tensor:
    """x; XLA moves nothing across it. In compiled functions only."""
    (kept,) = gen_xla_ops.xla_optimization_barrier([x])
    return kept
