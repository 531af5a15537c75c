"""The sample order: sample i of a run is a pure function of (seed, i). Nothing to remember, O(1) to resume.

Every class maps positions in the run, int64 [n], to samples; all of it is stateless TensorFlow arithmetic. A shuffle is
`RandomIndexShuffle`, a permutation computed with a small cipher: no memory, whatever the size. (The public `index_shuffle`
takes one seed for all indices only; a batch across two epochs needs one each.)
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

_WINDOWS, _BLOCKS, _MIXTURE = 0, 1, 2  # what is permuted: each with random numbers of its own
_CYCLE = 1000  # samples in which the shares of a mixture are exact


@dataclasses.dataclass(frozen=True)
class Order:
    """Each epoch is a permutation of `num_samples` samples, another one for each epoch; without shuffling, 0, 1, 2, ...

    `num_samples` may be a tensor.
    """

    num_samples: int | tf.Tensor
    seed: int
    shuffle: bool = True

    def sample(self, index: tf.Tensor) -> tf.Tensor:
        """Positions in the run -> samples in the corpus."""
        index, number = tf.cast(index, tf.int64), tf.cast(self.num_samples, tf.int64)
        epoch, position = index // number, index % number
        return _permuted(position, number, self.seed, epoch, _WINDOWS) if self.shuffle else position


@dataclasses.dataclass(frozen=True)
class BlockOrder:
    """The order of a corpus that does not fit into memory: blocks of neighbours in a random order, and within a group of
    `group` consecutive ones of these all samples in a random order. Reading needs the memory of one group.

    A last block that is not full stays last. Every epoch has another order of blocks, and of samples.
    """

    num_samples: int
    seed: int
    block: int  # samples
    group: int  # blocks
    shuffle: bool = True

    @property
    def full_blocks(self) -> int:
        return self.num_samples // self.block

    @property
    def groups(self) -> int:
        """Per epoch."""
        return -(-self.num_samples // (self.block * self.group))

    def sample(self, index: tf.Tensor) -> tf.Tensor:
        """Positions in the run -> samples in the corpus."""
        epoch, group, slot, offset = self.place(index)
        return self.block_at(epoch, group * self.group + slot) * self.block + offset

    def place(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Positions in the run -> (epoch, group of the epoch, slot in the group, sample in the block)."""
        index = tf.cast(index, tf.int64)
        epoch, position = index // self.num_samples, index % self.num_samples
        size = self.block * self.group
        group, position = position // size, position % size
        if self.shuffle:
            number = tf.minimum(tf.constant(size, tf.int64), self.num_samples - group * size)
            position = _permuted(position, number, self.seed, epoch * self.groups + group, _WINDOWS)
        return epoch, group, position // self.block, position % self.block

    def block_at(self, epoch: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Which block comes as the `number`-th of an epoch."""
        epoch, number = tf.broadcast_to(epoch, tf.shape(number)), tf.cast(number, tf.int64)
        if not self.shuffle or self.full_blocks < 2:
            return number
        full = tf.constant(self.full_blocks, tf.int64)
        shuffled = _permuted(tf.minimum(number, full - 1), full, self.seed, epoch, _BLOCKS)
        return tf.where(number < full, shuffled, number)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Which dataset sample i is from, and which of that dataset's samples in a row it is.

    In every cycle of 1000 samples each dataset has its share, rounded to a whole number of samples, at random places.
    """

    counts: tuple[int, ...]  # per cycle
    seed: int

    @classmethod
    def of_weights(cls, weights: Sequence[float], seed: int) -> "Mixture":
        """Largest remainders; the smallest share is one sample of a thousand."""
        exact = np.array(weights) * _CYCLE / math.fsum(weights)
        counts = np.maximum(np.floor(exact), 1).astype(int)
        while counts.sum() != _CYCLE:
            step = 1 if counts.sum() < _CYCLE else -1
            gain = np.where((counts + step >= 1), (exact - counts) * step, -np.inf)
            counts[np.argmax(gain)] += step
        return cls(tuple(int(c) for c in counts), seed)

    def split(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Positions in the run -> (dataset, position in the dataset's own order), int64 [n] each. Of each dataset the
        positions rise one by one."""
        cycle, place, first = self._turned(index)
        pattern, before = self._tables
        dataset = tf.gather(pattern, place)
        rank = _at(before, dataset, place) - _at(before, dataset, first)
        counts = tf.gather(tf.constant(self.counts, tf.int64), dataset)
        return dataset, cycle * counts + tf.where(place < first, rank + counts, rank)

    def before(self, index: tf.Tensor) -> tf.Tensor:
        """How many samples of each dataset come before one position: int64 [datasets]."""
        cycle, place, first = self._turned(index)
        _, before = self._tables
        rank, counts = (
            tf.gather(before, place, axis=1) - tf.gather(before, first, axis=1),
            tf.constant(self.counts, tf.int64),
        )
        return cycle * counts + tf.where(place < first, rank + counts, rank)

    def _turned(self, index: tf.Tensor):
        """(cycle, place in the pattern, where in it the cycle begins): each cycle turns the pattern by another angle."""
        index, length = tf.cast(index, tf.int64), tf.constant(sum(self.counts), tf.int64)
        cycle = index // length
        first = _permuted(cycle % length, length, self.seed, cycle // length, _MIXTURE)
        return cycle, (first + index % length) % length, first

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset each place of the pattern has, [1000]; how many of each dataset come before it, [datasets, 1000]."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        pattern = np.random.default_rng(self.seed).permutation(owner)
        own = pattern == np.arange(len(self.counts))[:, None]
        return pattern.astype(np.int64), (np.cumsum(own, 1) - own).astype(np.int64)


def _at(table: np.ndarray, row: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
    return tf.gather_nd(table, tf.stack([row, column], -1))


def _permuted(position: tf.Tensor, number: tf.Tensor, seed: int, epoch: tf.Tensor, what: int) -> tf.Tensor:
    epoch = tf.broadcast_to(epoch, tf.shape(position))
    seeds = tf.stack([tf.fill(tf.shape(position), tf.constant(seed, tf.int64)), epoch, tf.fill(tf.shape(position),
                      tf.constant(what, tf.int64))], -1)  # fmt: skip
    last = tf.broadcast_to(number - 1, tf.shape(position))
    return tf.raw_ops.RandomIndexShuffle(index=position, seed=seeds, max_index=last, rounds=4)
