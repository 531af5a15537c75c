"""The input graph of a language model: pure TensorFlow ops that read the shard files."""

import numpy as np
import tensorflow as tf

from tfdist.data.order import Order
from tfdist.data.shards import Split, TokenDataset
from tfdist.errors import DataError
from tfdist.strategies.base import DatasetFn, InputContext


def num_windows(split: Split, sequence_length: int) -> int:
    """Whole windows of `sequence_length` inputs with their targets; they tile the text, each token is a target once."""
    return (split.tokens - 1) // sequence_length


def train_dataset_fn(
    dataset: TokenDataset, *, sequence_length: int, global_batch_size: int, accumulate_steps: int, seed: int,
    shuffle: bool, vocab_size: int,
) -> DatasetFn:  # fmt: skip
    """An endless dataset of (inputs [b, T], labels [b, T]), int32, in the order of `Order`; O(1) to start at any step."""
    split = dataset.splits["train"]
    windows = num_windows(split, sequence_length)
    if windows < 1:
        raise DataError(
            f"data.sequence_length: expected at most {max(split.tokens - 1, 0)} (the training text has {split.tokens} "
            f"tokens), found {sequence_length}"
        )
    order = Order(windows, seed, shuffle)

    def dataset_fn(context: InputContext) -> tf.data.Dataset:
        rows = tf.constant(context.rows(global_batch_size, accumulate_steps), tf.int64)

        def steps(tokens):
            def batch(step):
                window = order.sample(step * global_batch_size + rows)
                return _inputs_and_labels(tokens, window * sequence_length, sequence_length, vocab_size)

            endless = tf.data.Dataset.range(context.start_step, np.iinfo(np.int64).max)
            return endless.map(batch, num_parallel_calls=2, deterministic=True)

        return _all_tokens(split).flat_map(steps)

    return dataset_fn


def eval_dataset_fn(
    dataset: TokenDataset, split_name: str, *, sequence_length: int, batch_size: int, vocab_size: int
) -> DatasetFn:
    """(inputs, labels, weight), all [b, T], once through the split: every token but the first is a target exactly once.

    What is beyond the end has weight 0. Windows come in a fixed shuffled order, so that the first batches alone are a
    fair sample of the split.
    """
    split = dataset.splits[split_name]
    if split.tokens < 2:
        raise DataError(f"data: expected at least 2 tokens in the {split_name} split, found {split.tokens}")
    windows = -(-(split.tokens - 1) // sequence_length)
    batches = -(-windows // batch_size)
    order = Order(windows, seed=0)

    def dataset_fn(context: InputContext) -> tf.data.Dataset:
        rows = tf.constant(context.rows(batch_size), tf.int64)

        def steps(tokens):
            def batch(step):
                place = step * batch_size + rows
                start = order.sample(tf.minimum(place, windows - 1)) * sequence_length
                target = start[:, None] + tf.range(1, sequence_length + 1, dtype=tf.int64)
                weight = tf.cast((target < split.tokens) & (place < windows)[:, None], tf.float32)
                return (*_inputs_and_labels(tokens, start, sequence_length, vocab_size), weight)

            return tf.data.Dataset.range(context.start_step, batches).map(batch, num_parallel_calls=2)

        return _all_tokens(split).flat_map(steps)

    return dataset_fn


def _inputs_and_labels(tokens, start, sequence_length: int, vocab_size: int):
    """Windows that begin at `start` [b]; beyond the end of the text the last token is repeated."""
    place = start[:, None] + tf.range(sequence_length + 1, dtype=tf.int64)  # [b, T + 1]
    window = tf.cast(tf.gather(tokens, tf.minimum(place, tf.size(tokens, tf.int64) - 1)), tf.int32)
    in_range = tf.debugging.assert_less(
        tf.reduce_max(window), vocab_size, message=f"data: a token id is not below model.vocab_size={vocab_size}"
    )
    with tf.control_dependencies([in_range]):  # under XLA an embedding would silently clamp it
        window = tf.identity(window)
    return window[:, :-1], window[:, 1:]


def _all_tokens(split: Split) -> tf.data.Dataset:
    """One element: every token of the split, [tokens], read when the iterator starts."""

    def load(_):
        return tf.concat([_decode(shard) for shard in split.shards], axis=0)

    def _decode(shard):
        raw = tf.strings.substr(tf.io.read_file(str(shard.path)), shard.header_bytes, -1)
        return tf.io.decode_raw(raw, tf.as_dtype(shard.dtype))

    return tf.data.Dataset.from_tensors(0).map(load)
