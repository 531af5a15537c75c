"""How a split is cut into samples of a fixed length, and how tokens are read: pure TensorFlow ops.

A sample is up to T inputs with their targets: it begins at some token and has so many targets. Joined, samples tile the
whole text: each token but the first is a target once. Padded, no sample crosses a document's border: long documents have
several.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfdist.data.index import documents_of
from tfdist.data.shards import Shard, Split
from tfdist.patches.datasets import mapped_file


@dataclasses.dataclass(frozen=True)
class Samples:
    split: Split
    length: int  # T
    padded: bool = False

    @functools.cached_property
    def number(self) -> int:
        """Joined: whole samples only, so that all have T targets."""
        if not self.padded:
            return max(self.split.tokens - 1, 0) // self.length
        starts = np.append(self.split.starts_and_keys()[:, 0], self.split.tokens)
        return int((-(-(np.diff(starts) - 1) // self.length)).sum())

    @property
    def block_tokens_of(self) -> int:
        """Tokens that a sample adds to a block of neighbours, at most."""
        return self.length + int(self.padded)

    def load_index(self) -> tuple[tf.Tensor, ...]:
        """What `place` needs beside the sample's number. Padded: where each document begins, and its first sample."""
        if not self.padded:
            return ()
        ends = tf.concat([documents(self.split)[0], [self.split.tokens]], 0)
        samples = -(-(ends[1:] - ends[:-1] - 1) // self.length)
        return ends, tf.cumsum(samples, exclusive=True)

    def place(self, sample: tf.Tensor, index: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, tf.Tensor]:
        """Samples, int64 [n] -> (first token in the split, number of targets), int64 [n] each."""
        if not self.padded:
            start = sample * self.length
            return start, tf.fill(tf.shape(sample), tf.constant(self.length, tf.int64))
        ends, first = index
        document = tf.searchsorted(first, sample, side="right", out_type=tf.int64) - 1
        start = tf.gather(ends, document) + (sample - tf.gather(first, document)) * self.length
        return start, tf.minimum(tf.gather(ends, document + 1) - 1 - start, self.length)


def documents(split: Split) -> tuple[tf.Tensor, tf.Tensor]:
    """(first token, key) of each document of a split, int64 [documents] each; read from its files."""
    parts, before = [tf.zeros([0, 2], tf.int64)], 0
    for shard in split.shards:
        path = shard.path.with_name(documents_of(shard.path.name))
        header = path.stat().st_size - 16 * shard.documents
        raw = tf.strings.substr(tf.io.read_file(str(path)), header, -1)
        found = tf.reshape(tf.io.decode_raw(raw, tf.int64), [-1, 2])
        parts.append(found + tf.constant([[before, 0]], tf.int64))
        before += shard.tokens
    whole = tf.concat(parts, 0)
    return whole[:, 0], whole[:, 1]


def token_type(shard: Shard) -> tf.DType:
    """What TensorFlow reads a shard as; it has few operations on uint32, and ids are below 2**31."""
    return tf.int32 if shard.dtype == "uint32" else tf.as_dtype(shard.dtype)


def _mapped(shard: Shard) -> tuple[tf.Tensor, int]:
    """(a shard's file as tokens, mapped; how many of these its header takes)."""
    dtype = token_type(shard)
    header = shard.header_bytes // dtype.size
    return mapped_file(str(shard.path), dtype, header + shard.tokens), header


def all_tokens(shards: Sequence[Shard]) -> tf.Tensor:
    """Every token of the shards, one after the other; of a single one its file, mapped."""
    parts = [file[header:] for file, header in map(_mapped, shards)]
    return tf.concat(parts, 0) if len(parts) > 1 else parts[0]


def token_range(split: Split, start: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """Tokens [start, end) of a split, two scalars: reads these bytes of the files, and no others.

    A file is mapped for as long as it takes to copy the range.
    """
    ends = np.cumsum([shard.tokens for shard in split.shards])
    starts = tf.constant(ends - [shard.tokens for shard in split.shards], tf.int64)
    ends, dtype = tf.constant(ends, tf.int64), token_type(split.shards[0])
    headers = tf.constant([shard.header_bytes // dtype.size for shard in split.shards], tf.int64)
    files = [lambda shard=shard: _mapped(shard)[0] for shard in split.shards]

    def read(number, whole):
        file = tf.switch_case(tf.cast(number, tf.int32), files)
        first = tf.maximum(start, starts[number]) - starts[number] + headers[number]
        last = tf.minimum(end, ends[number]) - starts[number] + headers[number]
        return number + 1, tf.concat([whole, file[first:last]], 0)

    first = tf.searchsorted(ends, start[None], side="right", out_type=tf.int64)[0]
    last = tf.searchsorted(starts, end[None], side="left", out_type=tf.int64)[0]
    shapes = (tf.TensorShape([]), tf.TensorShape([None]))
    _, tokens = tf.while_loop(lambda number, _: number < last, read, (first, tf.zeros([0], dtype)), shapes)
    return tokens
