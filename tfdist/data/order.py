"""The sample order: sample i of a run is a pure function of (seed, i). Nothing to remember, O(1) to resume."""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Order:
    """Each epoch is a permutation of `num_samples` samples, another one for each epoch; without shuffling, 0, 1, 2, ..."""

    num_samples: int
    seed: int
    shuffle: bool = True

    def sample(self, index: tf.Tensor) -> tf.Tensor:
        """Positions in the run, int64 [n] -> samples in the corpus, int64 [n].

        `RandomIndexShuffle` is a stateless cipher-based permutation: no memory, whatever the size. The public
        `index_shuffle` takes one seed for all indices only; a batch across two epochs needs one each.
        """
        index = tf.cast(index, tf.int64)
        epoch, position = index // self.num_samples, index % self.num_samples
        if not self.shuffle:
            return position
        seeds = tf.stack([tf.fill(tf.shape(epoch), tf.constant(self.seed, tf.int64)), epoch, tf.zeros_like(epoch)], 1)
        last = tf.constant(self.num_samples - 1, tf.int64)
        return tf.raw_ops.RandomIndexShuffle(index=position, seed=seeds, max_index=last, rounds=4)
