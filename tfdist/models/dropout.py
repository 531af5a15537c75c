"""Dropout whose mask is a function of (seed, step, layer, global sample index), so that it is the same on any number
of replicas, after a restart, with and without XLA.

The random words are Philox's: TensorFlow and XLA give the same ones, where their default generators differ. The floats are
made of the words here, because TensorFlow takes a word's low 23 bits for a float and XLA its high 23.

The caller of the model says where in the run it is: `with sample_position(SamplePosition(...)): model(x, ...)`.
The model itself knows nothing of replicas.
"""

import contextlib
import contextvars
import hashlib
import math
from typing import NamedTuple

import keras
import tensorflow as tf

_PHILOX = 1  # the `alg` of StatelessRandomUniformFullIntV2
_WORDS_PER_COUNT = 4  # one Philox counter value yields four 32-bit words
_FRACTION_BITS = 23  # of a float32: multiples of 2**-23 below 1 are exact


class SamplePosition(NamedTuple):
    """Where in the run the rows of this call stand. `step` and `first_row` may be scalar tensors."""

    seed: int
    step: tf.Tensor  # the optimizer step
    first_row: tf.Tensor  # index within the global batch of this call's row 0; rows are consecutive


_position: contextvars.ContextVar[SamplePosition | None] = contextvars.ContextVar("sample_position", default=None)


@contextlib.contextmanager
def sample_position(position: SamplePosition | None):
    """Calls of `Dropout` inside use this position. Read when the graph is traced."""
    token = _position.set(position)
    try:
        yield
    finally:
        _position.reset(token)


def current_position() -> SamplePosition | None:
    return _position.get()


def uniform_rows(position: SamplePosition, layer: str, shape: tuple[int, ...]) -> tf.Tensor:
    """Uniform float32 numbers in [0, 1) of `shape` [rows, ...]; row i depends on (seed, layer, step, first_row + i)."""
    return rows_of_stream(stream_key(position.seed, layer), position.step, position.first_row, shape)


def stream_key(seed: int, layer: str) -> tf.Tensor:
    """The Philox key of a layer's stream: [1], uint64."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    return tf.constant([int.from_bytes(digest[:8], "little")], tf.uint64)


def rows_of_stream(key: tf.Tensor, step, first_row, shape: tuple[int, ...]) -> tf.Tensor:
    """`uniform_rows` of the stream that has this key."""
    row_size = math.prod(shape[1:])
    counts_per_row = -(-row_size // _WORDS_PER_COUNT)
    first_count = tf.cast(first_row, tf.uint64) * tf.constant(counts_per_row, tf.uint64)
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[shape[0], counts_per_row * _WORDS_PER_COUNT],
        key=key,
        counter=tf.stack([first_count, tf.cast(step, tf.uint64)]),
        alg=_PHILOX,
        dtype=tf.uint32,
    )
    high_bits = tf.bitwise.right_shift(words[:, :row_size], tf.constant(32 - _FRACTION_BITS, tf.uint32))
    return tf.reshape(tf.cast(high_bits, tf.float32) * 2.0**-_FRACTION_BITS, shape)


@keras.saving.register_keras_serializable(package="tfdist")
class Dropout(keras.layers.Layer):
    """Inverted dropout at `rate` (JMLR 15, Srivastava et al. 2014).

    Inside `sample_position` masks are those of the position, the same on every strategy. Elsewhere (a model of ours in
    a plain Keras `fit`) it draws from a Keras `SeedGenerator` like the stock layer. `stream` names this layer's own
    random stream and must differ between the dropout layers of a model.
    """

    def __init__(self, rate: float, stream: str, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.stream = rate, stream
        self.fallback = keras.layers.Dropout(rate) if rate else None

    def call(self, x, training=None):
        if not training or not self.rate:
            return x
        position = current_position()
        if position is None:
            return self.fallback(x, training=True)
        shape = tuple(x.shape[1:])
        if None in shape:
            raise ValueError(f"Dropout needs a static shape but for the rows, got {x.shape}")
        keep = uniform_rows(position, self.stream, (tf.shape(x)[0] if x.shape[0] is None else x.shape[0], *shape))
        return tf.where(keep >= self.rate, x * tf.cast(1.0 / (1.0 - self.rate), x.dtype), tf.zeros_like(x))

    def get_config(self):
        return super().get_config() | {"rate": self.rate, "stream": self.stream}
