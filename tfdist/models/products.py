"""Products with kernels in the form that XLA's compiler for CPUs runs fastest. All of it is there for speed alone: the
numbers are those of `keras.layers.Dense`, but for the rounding of sums that run in another order.

XLA's CPU product is a third slower where the contracted dim comes first and the result has more rows than columns (64
GFLOP/s instead of 94), as in the gradient of a tall kernel. That is computed as its transpose here.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from tfdist.patches.xla import optimization_barrier

_is_compiled_for_cpu = contextvars.ContextVar("is_compiled_for_cpu", default=False)


@contextlib.contextmanager
def compiled_for_cpu(whether: bool) -> Iterator[None]:
    """Inside, what is traced is compiled by XLA for a CPU, if `whether`."""
    token = _is_compiled_for_cpu.set(whether)
    try:
        yield
    finally:
        _is_compiled_for_cpu.reset(token)


class Dense(keras.layers.Dense):
    """Keras' own, with `product`."""

    def call(self, inputs, training=None):
        if not _is_compiled_for_cpu.get():
            return super().call(inputs, training)
        y = together([self], inputs)[0]
        return y if self.activation is None else self.activation(y)


def together(layers: Sequence[keras.layers.Dense], x: tf.Tensor) -> list[tf.Tensor]:
    """What each of several built layers gives for x [..., n]: on a CPU by one product. All have a bias, or none; none has an
    activation."""
    if not _is_compiled_for_cpu.get():
        return [layer(x) for layer in layers]
    y = product(x, tf.concat([tf.convert_to_tensor(layer.kernel) for layer in layers], 1))
    if layers[0].use_bias:
        y += tf.concat([tf.convert_to_tensor(layer.bias) for layer in layers], 0)
    return tf.split(y, [layer.units for layer in layers], axis=-1)


def product(x: tf.Tensor, kernel: tf.Tensor, transpose: bool = False) -> tf.Tensor:
    """x [..., n] times kernel [n, m], or [m, n] with `transpose` -> [..., m]."""
    rows = tf.reshape(x, [-1, x.shape[-1]])
    with tf.name_scope("product"):
        multiply = _multiply if _is_compiled_for_cpu.get() else _plain
        y = multiply(rows, kernel, transpose)
    return tf.reshape(y, [*dims(x)[:-1], y.shape[-1]])


def dims(x: tf.Tensor) -> list:
    """The shape, static where known."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def _plain(x, kernel, transpose: bool):
    return tf.matmul(x, kernel, transpose_b=transpose)


def _multiply(x, kernel, transpose: bool):
    scope = tf.get_current_name_scope()

    @tf.custom_gradient
    def multiply(x, kernel):
        def gradient(dy):
            with tf.name_scope(f"gradient_tape/{scope}/"):  # as TensorFlow names its own, for who reads a profile
                to_x = tf.matmul(dy, kernel, transpose_b=not transpose)
                return to_x, _over_rows(dy, x) if transpose else _over_rows(x, dy)

        return _plain(x, kernel, transpose), gradient

    return multiply(x, kernel)


def _over_rows(a, b):
    """a [r, p], b [r, q] -> [p, q]: their product over the rows."""
    if a.shape[1] <= b.shape[1]:
        return tf.matmul(a, b, transpose_a=True)
    return tf.transpose(_kept(tf.matmul(b, a, transpose_a=True)))


@tf.custom_gradient
def _kept(x):
    """x, as it is computed: else XLA would turn the product round again."""
    return optimization_barrier(x), lambda dy: dy
