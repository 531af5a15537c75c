"""From a user's dataset to per-replica micro-batches: pure `tf.data`, static shapes, exact weights."""

import numpy as np
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.strategies.base import Batch


def static_rows(dataset: tf.data.Dataset) -> int | None:
    """Rows of an element where the dataset knows them. Raises `UserError` for elements that are not batched."""
    spec = tf.nest.flatten(dataset.element_spec)[0]
    if spec.shape.rank == 0:
        raise UserError("expected a batched dataset (elements [rows, ...]), found scalar elements; use .batch()")
    return spec.shape[0] if spec.shape.rank else None


def first_rows(dataset: tf.data.Dataset) -> int:
    """Rows of the first element. Raises `UserError` for a dataset without elements."""
    for element in dataset.take(1):
        return int(tf.shape(tf.nest.flatten(element)[0])[0])
    raise UserError("expected a dataset with at least one batch, found an empty one")


def unpack(element) -> tuple:
    """(x, y) or (x, y, weight) -> (x, y, weight or None)."""
    if not isinstance(element, tuple) or len(element) not in (2, 3):
        raise UserError(
            f"expected dataset elements (x, y) or (x, y, weight), found {type(element).__name__}"
            + (f" of {len(element)}" if isinstance(element, tuple) else "")
        )
    return element if len(element) == 3 else (*element, None)


def lay_out(
    dataset: tf.data.Dataset, rows_of_workers: list[int], worker: int, accumulate_steps: int, replicas: int
) -> tf.data.Dataset:  # fmt: skip
    """One `Batch` per step with a leading axis of the local replicas, then endless invalid ones.

    `rows_of_workers`: at most this many rows in an element of each worker; this one is `worker`, with `replicas` of its
    own, as many as every other has. Micro-batch m is the m-th contiguous block of the global batch, split over all
    replicas; of each worker's element it is the m-th block. Rows that fill up the last places of a block repeat a real
    row with weight 0, so that a loss that is finite on the data stays finite.
    """
    blocks = [-(-rows // accumulate_steps) for rows in rows_of_workers]  # rows per micro-batch
    block, before = blocks[worker], sum(blocks[:worker])
    share = max(1, -(-block // replicas))  # places per micro-batch and replica
    m, r, i = np.meshgrid(*map(np.arange, (accumulate_steps, replicas, share)), indexing="ij")
    in_block = r * share + i
    rows = np.where(in_block < block, m * block + np.minimum(in_block, block - 1), -1).reshape(
        -1
    )  # of the element; -1: none
    first_row = np.arange(accumulate_steps) * sum(blocks) + before + np.arange(replicas)[:, None] * share  # [R, M]
    places = rows.size

    @tf.autograph.experimental.do_not_convert  # nothing to convert, and looking for it takes half a second
    def split(*element):
        x, y, weight = unpack(element)
        found = tf.shape(tf.nest.flatten(x)[0])[0]
        fits = tf.debugging.assert_less_equal(
            found, rows_of_workers[worker], message=f"a batch has more rows than the first one ({rows_of_workers[worker]})"
        )
        with tf.control_dependencies([fits]):
            row = tf.constant(rows, tf.int32)
        real = (row >= 0) & (row < found)
        if weight is None:
            weight = tf.cast(real, tf.float32)
        else:
            weight = tf.nest.map_structure(lambda t: _masked(_fill(tf.convert_to_tensor(t), row, found), real), weight)
        x, y = tf.nest.map_structure(lambda t: _fill(t, row, found), (x, y))
        by_replica = tf.nest.map_structure(_by_replica, (x, y, weight))
        num_real = tf.math.count_nonzero(_by_replica(real), axis=2, dtype=tf.int32)
        return Batch(
            *by_replica,
            tf.constant(first_row, tf.int64),
            num_real,
            tf.fill([replicas], sum(blocks)),
            tf.ones([replicas], tf.bool),
        )

    def _fill(tensor, row, found):
        if tensor.shape[0] == places and (rows == np.arange(places)).all():
            return tensor
        filled = tf.cond(
            found > 0,
            lambda: tf.gather(tensor, tf.clip_by_value(row, 0, found - 1)),
            lambda: tf.zeros(tf.concat([[places], tf.shape(tensor)[1:]], 0), tensor.dtype),
        )
        return tf.ensure_shape(filled, [places, *tensor.shape[1:]])

    def _masked(weight, real):
        return tf.where(tf.reshape(real, [places] + [1] * (weight.shape.rank - 1)), weight, tf.zeros_like(weight))

    def _by_replica(tensor):  # [places, ...] -> [R, M, share, ...]
        shape = tf.concat([[accumulate_steps, replicas, share], tf.shape(tensor)[1:]], 0)
        split = tf.reshape(tensor, shape)
        split = tf.ensure_shape(split, [accumulate_steps, replicas, share, *tensor.shape[1:]])
        if replicas == 1:
            return tf.squeeze(split, 1)[None]
        return tf.transpose(split, [1, 0, *range(2, split.shape.rank)])

    unpack(dataset.element_spec)  # complains here, not from inside the graph
    batches = dataset.map(split, num_parallel_calls=2, deterministic=True)
    return batches.concatenate(_endless_invalid(batches.element_spec))


def _endless_invalid(spec) -> tf.data.Dataset:
    """Batches of zeros with weight 0 and `valid` False; unknown sizes become 1."""
    empty = tf.nest.map_structure(lambda s: tf.zeros([1 if d is None else d for d in s.shape], s.dtype), spec)
    return tf.data.Dataset.from_tensors(empty).repeat()


def without_autotune() -> tf.data.Options:
    """Destroying an iterator waits for its autotune thread, which sleeps up to a minute: every exit would."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
