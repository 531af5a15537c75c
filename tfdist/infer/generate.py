"""Sampling from a language model with a static-shape key/value cache: one compiled loop whatever the length."""

import dataclasses

import numpy as np
import tensorflow as tf

from tfdist.data.tokenizer import ByteTokenizer, Tokenizer
from tfdist.errors import UserError
from tfdist.models.transformer import TransformerLM


@dataclasses.dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. top-p: nucleus sampling (arXiv:1904.09751)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature: expected 0 (greedy) or more, found {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k: expected 0 (off) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected 0 < p <= 1, found {self.top_p}")


def generate_text(
    model: TransformerLM, prompt: str, num_tokens: int, sampling: Sampling, tokenizer: Tokenizer | None = None
) -> str:  # fmt: skip
    """The prompt and up to `num_tokens` more. What does not fit the model's context is left out at the left.

    `tokenizer`: what the model was trained with; default: bytes.
    """
    tokenizer = tokenizer or ByteTokenizer()
    tokens = tokenizer.encode_prompt(prompt)
    text = tokenizer.is_text()  # no specials, nothing from a padded vocabulary
    allowed = tf.constant(np.pad(text, (0, model.config.vocab_size - len(text))))
    room = model.sequence_length - num_tokens
    if room < 1:
        raise UserError(f"num_tokens: expected less than the model's context of {model.sequence_length}, found {num_tokens}")
    new = generate(model, tokens[-room:], num_tokens, sampling, allowed)
    return prompt + tokenizer.decode(new)


def generate(
    model: TransformerLM, prompt: list[int], num_tokens: int, sampling: Sampling, allowed: tf.Tensor | None = None
) -> list[int]:
    """`num_tokens` tokens that follow the prompt. `allowed` [V] masks the vocabulary. The same seed, the same tokens."""
    length = len(prompt) + num_tokens
    if not prompt or length > model.sequence_length:
        raise UserError(
            f"expected a prompt of at least one token, and with the new ones at most {model.sequence_length}, "
            f"found {len(prompt)} + {num_tokens}"
        )
    if allowed is None:
        allowed = tf.ones([model.config.vocab_size], tf.bool)
    return [int(t) for t in _generate(model, tf.constant([prompt]), num_tokens, sampling, allowed)]


def _generate(model, prompt, num_tokens: int, sampling: Sampling, allowed) -> tf.Tensor:
    prompt_length = prompt.shape[1]

    @tf.function(autograph=False)
    def loop():
        logits, caches = model.decode(prompt, model.empty_cache(1, prompt_length + num_tokens), 0)
        token = pick(logits[0, -1], sampling, prompt_length, allowed)
        table = tf.TensorArray(tf.int32, size=num_tokens).write(0, token)

        def body(i, token, caches, table):
            position = prompt_length + i - 1
            logits, caches = model.decode(token[None, None], caches, position)
            token = pick(logits[0, -1], sampling, position + 1, allowed)
            return i + 1, token, caches, table.write(i, token)

        state = (1, token, caches, table)
        *_, table = tf.while_loop(lambda i, *_: i < num_tokens, body, state)
        return table.stack()

    return loop().numpy()


def pick(logits: tf.Tensor, sampling: Sampling, position, allowed: tf.Tensor) -> tf.Tensor:
    """One token from logits [V]; random in (seed, position)."""
    logits = tf.where(allowed, tf.cast(logits, tf.float32), tf.float32.min)
    if sampling.temperature == 0:
        return tf.argmax(logits, output_type=tf.int32)
    logits = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    seed = tf.stack([tf.constant(sampling.seed, tf.int32), tf.cast(position, tf.int32)])
    return tf.random.stateless_categorical(logits[None], 1, seed, dtype=tf.int32)[0, 0]


def truncate(logits: tf.Tensor, top_k: int, top_p: float) -> tf.Tensor:
    """Logits [V] with everything outside the k likeliest, and outside the smallest set of probability p, at minus
    infinity."""
    lowest = tf.constant(float("-inf"), logits.dtype)
    if top_k:
        kept = tf.math.top_k(logits, min(top_k, logits.shape[0])).values[-1]
        logits = tf.where(logits < kept, lowest, logits)
    if top_p < 1:
        ordered = tf.sort(logits, direction="DESCENDING")
        before = tf.cumsum(tf.nn.softmax(ordered), exclusive=True)  # of the likelier ones; the first is always kept
        kept = tf.reduce_min(tf.where(before < top_p, ordered, tf.fill(tf.shape(ordered), float("inf"))))
        logits = tf.where(logits < kept, lowest, logits)
    return logits
