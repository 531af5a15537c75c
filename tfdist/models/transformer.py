"""The decoder-only Transformer language model, in Keras 3. It knows nothing of distribution.

Shapes: B rows, T tokens, S cache length, V vocabulary, d model dim, H query heads, K key/value heads, G = H / K,
D = d / H head dim.
"""

import dataclasses
import math

import keras
import tensorflow as tf
from keras import ops

from tfdist.config import ModelConfig
from tfdist.errors import UserError
from tfdist.models import count
from tfdist.models.dropout import Dropout, current_position, sample_position
from tfdist.models.products import Dense, product, together

_INIT_STDDEV = 0.02  # GPT-2


def rotate(x, positions, theta: float):
    """Rotary position embedding (arXiv:2104.09864), halves layout as in Llama. x [B, T, heads, D], positions [T].

    Only differences of positions count, so a document in the middle of a row needs none of its own.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-tf.range(half, dtype=tf.float32) / half)  # [D/2]
    angle = tf.cast(positions, tf.float32)[:, None] * frequency  # [T, D/2]
    cos, sin = (tf.cast(f(angle), x.dtype)[None, :, None, :] for f in (tf.cos, tf.sin))
    a, b = x[..., :half], x[..., half:]
    return tf.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _norm(config: ModelConfig, name: str):
    if config.norm == "rms":
        return keras.layers.RMSNormalization(epsilon=config.norm_epsilon, dtype=config.dtype, name=name)
    return keras.layers.LayerNormalization(epsilon=config.norm_epsilon, dtype=config.dtype, name=name)


def _dense(config: ModelConfig, units: int, name: str, residual: bool = False):
    """A projection. Those that write into the residual stream start smaller, as in GPT-2."""
    stddev = _INIT_STDDEV / math.sqrt(2 * config.num_layers) if residual else _INIT_STDDEV
    init = keras.initializers.RandomNormal(stddev=stddev)
    return Dense(units, use_bias=config.use_bias, kernel_initializer=init, dtype=config.dtype, name=name)


def _embedding(config: ModelConfig, size: int, name: str):
    init = keras.initializers.RandomNormal(stddev=_INIT_STDDEV)
    return keras.layers.Embedding(size, config.model_dim, embeddings_initializer=init, dtype=config.dtype, name=name)


class Attention(keras.layers.Layer):
    """Causal self-attention with grouped queries (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        kv_dim = count.kv_heads(config) * count.head_dim(config)
        self.query = _dense(config, config.model_dim, "query")
        self.key = _dense(config, kv_dim, "key")
        self.value = _dense(config, kv_dim, "value")
        self.output_projection = _dense(config, config.model_dim, "output", residual=True)

    def build(self, shape):
        for layer in (self.query, self.key, self.value, self.output_projection):
            layer.build(shape)

    def call(self, x, cache=None, start=0, documents=None):
        """x [B, T, d]. With a `cache` (keys, values: [B, S, K, D]) writes this call's T entries at `start`, reads all.
        `documents` [B, T]: tokens see those of their own document only; without a cache.

        Returns the output [B, T, d], and the cache after the write (None without one).
        """
        config = self.config
        rows, length, kv, size = tf.shape(x)[0], x.shape[1], count.kv_heads(config), count.head_dim(config)
        group = config.num_heads // kv
        q, k, v = together([self.query, self.key, self.value], x)
        q = tf.reshape(q, [rows, length, config.num_heads, size])
        k, v = (tf.reshape(t, [rows, length, kv, size]) for t in (k, v))
        positions = start + tf.range(length)
        if config.positions == "rotary":
            q, k = rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta)
        if cache is not None:
            k = ops.slice_update(cache[0], [0, start, 0, 0], tf.cast(k, cache[0].dtype))
            v = ops.slice_update(cache[1], [0, start, 0, 0], tf.cast(v, cache[1].dtype))
            cache = (k, v)
        q = tf.transpose(tf.reshape(q * size**-0.5, [rows, length, kv, group, size]), [0, 2, 3, 1, 4])  # [B, K, G, T, D]
        k, v = tf.transpose(k, [0, 2, 1, 3]), tf.transpose(v, [0, 2, 1, 3])  # [B, K, S, D]
        if cache is not None or q.dtype.size < 4:  # 16 bits run op by op on a CPU: more, smaller ops would not pay
            mixed = attend(q, k, v, positions, documents)
        else:  # a block of queries needs no keys behind its own end: with four blocks 3/8 of the work falls away
            blocks = [
                attend(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], positions[start:end], documents)
                for start, end in _query_blocks(length)
            ]
            mixed = tf.concat(blocks, axis=3)
        mixed = tf.reshape(tf.transpose(mixed, [0, 3, 1, 2, 4]), [rows, length, config.model_dim])
        return self.output_projection(mixed), cache


def attend(q, k, v, positions, documents=None):
    """Softmax attention of queries [B, K, G, T, D] at `positions` [T] over keys and values [B, K, S, D] up to there, and of
    the same of `documents` [B, positions] where given."""
    rows, (_, kv, group, length, size), keys = tf.shape(q)[0], q.shape, k.shape[2]
    scores = tf.matmul(tf.reshape(q, [rows, kv, group * length, size]), k, transpose_b=True)
    scores = tf.reshape(scores, [rows, kv, group, length, keys])
    visible = tf.range(keys)[None, :] <= positions[:, None]  # [T, S]
    if documents is not None:
        own = documents[:, :keys][:, None, :] == tf.gather(documents, positions, axis=1)[:, :, None]  # [B, T, S]
        visible = (visible & own)[:, None, None]  # [B, 1, 1, T, S]
    wide = scores.dtype if scores.dtype == tf.float64 else tf.float32  # softmax in bfloat16 loses too much
    weights = tf.nn.softmax(tf.where(visible, tf.cast(scores, wide), wide.min))
    weights = tf.reshape(tf.cast(weights, v.dtype), [rows, kv, group * length, keys])
    return tf.reshape(tf.matmul(weights, v), [rows, kv, group, length, size])


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """(start, end) of at most four blocks of at least 32 queries."""
    count = max(1, min(4, length // 32))
    bounds = [round(i * length / count) for i in range(count + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


class MLP(keras.layers.Layer):
    """GELU (tanh form, as in GPT-2) or SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self.up = _dense(config, count.mlp_dim(config), "up")
        self.gate = _dense(config, count.mlp_dim(config), "gate") if config.activation == "swiglu" else None
        self.down = _dense(config, config.model_dim, "down", residual=True)

    def build(self, shape):
        for layer in (self.up, self.gate):
            if layer is not None:
                layer.build(shape)
        self.down.build((*shape[:-1], count.mlp_dim(self.config)))

    def call(self, x):
        if self.gate is None:
            return self.down(tf.nn.gelu(self.up(x), approximate=True))
        return self.down(tf.nn.silu(self.gate(x)) * self.up(x))


class Block(keras.layers.Layer):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, index: int, **kwargs):
        super().__init__(**kwargs)
        self.attention_norm = _norm(config, "attention_norm")
        self.attention = Attention(config, dtype=config.dtype, name="attention")
        self.attention_dropout = Dropout(
            config.dropout, f"block_{index}/attention", dtype=config.dtype, name="attention_dropout"
        )
        self.mlp_norm = _norm(config, "mlp_norm")
        self.mlp = MLP(config, dtype=config.dtype, name="mlp")
        self.mlp_dropout = Dropout(config.dropout, f"block_{index}/mlp", dtype=config.dtype, name="mlp_dropout")

    def build(self, shape):
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            layer.build(shape)

    def call(self, x, cache=None, start=0, documents=None, training=None):
        attended, cache = self.attention(self.attention_norm(x), cache=cache, start=start, documents=documents)
        x = x + self.attention_dropout(attended, training=training)
        x = x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), training=training)
        return x, cache


@keras.saving.register_keras_serializable(package="tfdist")
class TransformerLM(keras.Model):
    """tokens [B, T] (integers) -> logits [B, T, V]. Saves and loads as `.keras`.

    `sequence_length` is the length of the position table (learned positions) and the longest context of `decode`.
    `document_start`: the token that begins a document; with it a row may hold several, and each has the logits that it has
    in a row of its own: no attention over its border, and learned positions begin anew. -1: a row is one text.
    Raises `ValueError` when T is longer than that.
    """

    def __init__(self, config: ModelConfig, sequence_length: int, document_start: int = -1, **kwargs):
        super().__init__(dtype=config.dtype, **kwargs)
        self.config, self.sequence_length, self.document_start = config, sequence_length, document_start
        self.embedding = _embedding(config, config.vocab_size, "embedding")
        self.position_embedding = None
        if config.positions == "learned":
            self.position_embedding = _embedding(config, sequence_length, "position_embedding")
        self.embedding_dropout = Dropout(config.dropout, "embedding", dtype=config.dtype, name="embedding_dropout")
        self.blocks = [Block(config, i, dtype=config.dtype, name=f"block_{i}") for i in range(config.num_layers)]
        self.final_norm = _norm(config, "final_norm")
        self.head = None
        if not config.tie_embeddings:
            init = keras.initializers.RandomNormal(stddev=_INIT_STDDEV)
            self.head = Dense(config.vocab_size, use_bias=False, kernel_initializer=init, dtype=config.dtype, name="head")
        self.build((None, sequence_length))

    def build(self, shape):
        hidden = (None, shape[-1], self.config.model_dim)
        self.embedding.build(shape)
        if self.position_embedding is not None:
            self.position_embedding.build((self.sequence_length,))
        for layer in (*self.blocks, self.final_norm, *([self.head] if self.head is not None else [])):
            layer.build(hidden)
        self.built = True

    def embed(self, tokens, start=0, documents=None):
        x = self.embedding(tokens)  # [B, T, d]
        if self.position_embedding is not None:
            position = start + tf.range(tokens.shape[1])
            if documents is not None:  # counted from the document's own first token
                own = documents[:, None, :] == documents[:, :, None]  # [B, T, T]
                position -= tf.reduce_min(tf.where(own, position, tokens.shape[1]), axis=-1)
            x = x + self.position_embedding(position)
        return x

    def documents(self, tokens):
        """The number of each token's document within its row, [B, T]; None where a row is one text."""
        if self.document_start < 0:
            return None
        return tf.cumsum(tf.cast(tokens == self.document_start, tf.int32), axis=1)

    def logits(self, x):
        x = self.final_norm(x)
        if self.head is not None:
            return self.head(x)
        table = tf.cast(tf.convert_to_tensor(self.embedding.embeddings), x.dtype)  # [V, d]
        return product(x, table, transpose=True)

    def call(self, tokens, training=None):
        tokens = tf.convert_to_tensor(tokens)
        if tokens.shape[1] is not None and tokens.shape[1] > self.sequence_length:
            raise UserError(f"expected at most {self.sequence_length} tokens a row, found {tokens.shape[1]}")
        documents = self.documents(tokens)
        x = self.embedding_dropout(self.embed(tokens, documents=documents), training=training)
        for block in self.blocks:
            if self.config.recompute and training:
                x = _recomputed(block, x, documents)
            else:
                x = block(x, documents=documents, training=training)[0]
        return self.logits(x)

    def empty_cache(self, rows: int, length: int):
        """Keys and values for `length` positions, one pair [rows, length, K, D] per block."""
        shape = [rows, length, count.kv_heads(self.config), count.head_dim(self.config)]
        return [(tf.zeros(shape, self.compute_dtype), tf.zeros(shape, self.compute_dtype)) for _ in self.blocks]

    def decode(self, tokens, caches, start):
        """tokens [B, T] at positions start, start + 1, ... -> logits [B, T, V] and the caches with them written."""
        x, updated = self.embed(tokens, start), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache=cache, start=start)
            updated.append(cache)
        return self.logits(x), updated

    def get_config(self):
        return {
            "name": self.name,
            "config": dataclasses.asdict(self.config),
            "sequence_length": self.sequence_length,
            "document_start": self.document_start,
        }

    @classmethod
    def from_config(cls, config):
        return cls(ModelConfig(**config.pop("config")), **config)


def _recomputed(block, x, documents):
    """The block's output; its activations are computed again in the backward pass instead of kept.

    The backward pass runs the block outside the caller's `sample_position`, so the position goes along.
    """
    position = current_position()

    def call(x):
        with sample_position(position):
            return block(x, documents=documents, training=True)[0]

    return keras.remat(call)(x)


def next_token_loss(labels, logits):
    """Cross-entropy in nats of each token. labels [B, T], logits [B, T, V] -> [B, T], float32 at least."""
    if logits.dtype != tf.float64:
        logits = tf.cast(logits, tf.float32)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def training_loss(label_smoothing: float = 0.0, z_loss: float = 0.0):
    """`next_token_loss` with regularisation; without any, that very function.

    label_smoothing: the share of the target that is spread over the vocabulary (arXiv:1512.00567).
    z_loss: weight of the squared logarithm of the softmax' denominator (arXiv:2204.02311), which keeps it near 1.
    """
    if not label_smoothing and not z_loss:
        return next_token_loss

    def loss(labels, logits):
        if logits.dtype != tf.float64:
            logits = tf.cast(logits, tf.float32)
        log_z = tf.reduce_logsumexp(logits, axis=-1)
        value = (1 - label_smoothing) * next_token_loss(labels, logits)
        if label_smoothing:
            value += label_smoothing * (log_z - tf.reduce_mean(logits, axis=-1))
        return value + z_loss * tf.square(log_z) if z_loss else value

    return loss


def token_accuracy(labels, logits):
    """Whether the likeliest token is the right one, 1.0 or 0.0. labels [B, T], logits [B, T, V] -> [B, T]."""
    right = tf.equal(tf.cast(labels, tf.int64), tf.argmax(logits, axis=-1))
    return tf.cast(right, tf.float64 if logits.dtype == tf.float64 else tf.float32)
