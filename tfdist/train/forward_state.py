"""What the forward pass itself writes: moving statistics, counters of a user's layer. All replicas must agree on it, and a
step that is skipped puts it back."""

import keras
import tensorflow as tf


def contributions(variables: list[keras.Variable], before: list, rows: tf.Tensor, first: bool) -> list[tf.Tensor]:
    """This replica's part of what all agree on: the sums over the replicas go into `agreed`.

    By the variable's `aggregation`: "sum" adds up the changes; "only_first_replica", and whole numbers, take the `first`
    replica's value; others the mean, weighted by the `rows` that each replica saw.
    """
    parts = []
    for variable, value in zip(variables, before, strict=True):
        now, kind = _as_number(variable.value), _kind(variable)
        if kind == "sum":
            parts.append(now - _as_number(value))
        elif kind == "mean":
            now = tf.cast(now, tf.float32) if now.dtype.size < 4 else now  # 16 bits cannot hold the product
            parts.append(tf.where(rows > 0, now * tf.cast(rows, now.dtype), 0))  # without rows it may be anything
        else:
            parts.append(tf.where(first, now, tf.zeros_like(now)))
    return parts


def agreed(variables: list[keras.Variable], before: list, sums: list[tf.Tensor], rows: tf.Tensor) -> list[tf.Tensor]:
    """The values that every replica writes; `rows` of all replicas."""
    values = []
    for variable, value, total in zip(variables, before, sums, strict=True):
        kind = _kind(variable)
        if kind == "sum":
            total += _as_number(value)
        elif kind == "mean":
            total = tf.where(rows > 0, total / tf.cast(tf.maximum(rows, 1), total.dtype), tf.cast(value, total.dtype))
        values.append(tf.cast(total, value.dtype))
    return values


def _kind(variable: keras.Variable) -> str:
    if variable.aggregation in ("sum", "only_first_replica"):
        return variable.aggregation
    return "mean" if tf.as_dtype(variable.dtype).is_floating else "only_first_replica"


def _as_number(value) -> tf.Tensor:
    """Whole numbers as float64, exact up to 2**53: TensorFlow keeps small integers on the host, out of reach of a collective
    of the devices."""
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, tf.float64)
