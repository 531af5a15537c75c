"""The input of `fit`: every worker reads the same global batches, and each replica computes on its rows of them."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.strategies.base import Strategy

OTHER_ROWS = "fit: expected every part of a batch to have an entry for each row, found parts of different lengths"
FINGERPRINTS = 1024  # few enough that their sum over many workers is exact


class LaidOut(NamedTuple):
    """A global batch as a step takes it."""

    parts: tuple  # a batch for each replica of this process, rows first
    rows: tf.Tensor  # [replicas] int32: how many rows of each part count
    first_rows: tf.Tensor  # [replicas] int64: where they begin in the global batch
    total: tf.Tensor  # int32: rows of the global batch
    fingerprint: tf.Tensor  # float32: of the global batch's first row, a whole number below `FINGERPRINTS`


class Input:
    """Stands for the strategy where `fit` asks one to distribute a dataset."""

    def __init__(self, strategy: Strategy):
        self.strategy, self.spec, self.batch = strategy, None, None

    def __getattr__(self, name: str):
        return getattr(self.strategy.tf_strategy, name)

    def experimental_distribute_dataset(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The dataset as it is: steps take their parts of its elements. Whatever else would be read at other times than by
        stock Keras, which matters where training and validation share a dataset that shuffles."""
        self.spec = dataset.element_spec
        if dataset.options().autotune.enabled is None:
            # giving up an iterator, at the end of each epoch and evaluation, waits for the thread that tunes: for seconds,
            # up to a minute
            options = tf.data.Options()
            options.autotune.enabled = False
            dataset = dataset.with_options(options)
        return dataset

    def lay_out(self, batch) -> LaidOut:
        """Of a global batch of any structure, rows first."""
        total = _num_rows(batch)
        batch = _all_with(total, batch) if self.strategy.num_replicas > 1 else batch
        parts, counts, firsts = [], [], []
        first_replica, local = self.strategy.first_replica, self.strategy.local_replicas()
        for replica in range(first_replica, first_replica + local):
            begin, end = (self._bound(total, i) for i in (replica, replica + 1))
            counts.append(end - begin)
            # where no row is left it computes on one that does not count: not every model can do without
            begin = _minimum(begin, total - 1)
            end = _maximum(end, begin + 1)
            firsts.append(begin)
            parts.append(tf.nest.map_structure(lambda leaf, a=begin, b=end: _slice(leaf, a, b), batch))
        fingerprint = _fingerprint(batch) if self.strategy.num_workers > 1 else tf.zeros([])
        return LaidOut(
            tuple(parts), tf.stack(counts), tf.cast(tf.stack(firsts), tf.int64), tf.convert_to_tensor(total), fingerprint
        )

    def _bound(self, total, replica: int):
        return total * replica // self.strategy.num_replicas

    def symbolic_x(self) -> Any:
        """Of the inputs of the model alone."""
        if self.spec is None:
            return self.symbolic(tf.nest.map_structure(tf.convert_to_tensor, self.batch))
        return keras.utils.unpack_x_y_sample_weight(self.symbolic())[0]

    def symbolic(self, batch: Any = None) -> Any:
        """Of a batch, or of what the dataset yields, with the rows of a replica: shapes and types, from which a model can be
        built."""
        batch = self.spec if batch is None else batch
        rows = _known_rows(batch)
        mine = rows and max(1, self._bound(rows, 1))
        return tf.nest.map_structure(lambda leaf: _symbolic(leaf, rows, mine), batch)


def _num_rows(batch):
    """A Python number where it is known."""
    for leaf in tf.nest.flatten(batch):
        if isinstance(leaf, tf.RaggedTensor):
            return tf.cast(leaf.nrows(), tf.int32)
        if isinstance(leaf, tf.SparseTensor):
            return tf.cast(leaf.dense_shape[0], tf.int32)
        if _has_rows(leaf):
            return leaf.shape[0] if leaf.shape.rank and leaf.shape[0] is not None else tf.shape(leaf)[0]
    raise ValueError(
        "fit: expected a dataset of batches, found elements without a dimension of rows; use dataset.batch(...)"
    )


def _all_with(rows, batch):
    """The batch. Raises `UserError`, now or in the step, where a part of it has another number of rows: replicas would cut
    it as if it had as many."""
    others = [
        leaf
        for leaf in tf.nest.flatten(batch)
        if _has_rows(leaf) and not isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor))
    ]
    for leaf in others:
        if isinstance(rows, int) and leaf.shape.rank and leaf.shape[0] not in (None, rows):
            raise UserError(f"{OTHER_ROWS}: {rows} and {leaf.shape[0]}")
    unknown = [tf.shape(leaf)[0] for leaf in others if leaf.shape.rank is None or leaf.shape[0] is None]
    unknown += [leaf.shape[0] for leaf in others if leaf.shape.rank and leaf.shape[0] is not None] if unknown else []
    if len(unknown) < 2:
        return batch
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(tf.equal(tf.stack(unknown), rows)), [OTHER_ROWS])]):
        return tf.nest.map_structure(lambda leaf: tf.identity(leaf) if _has_rows(leaf) else leaf, batch)


def _has_rows(leaf) -> bool:
    return tf.is_tensor(leaf) and (leaf.shape.rank is None or leaf.shape.rank > 0)


def _fingerprint(batch) -> tf.Tensor:
    """Equal where workers read the same, different, in all but one of a thousand batches, where they do not."""
    rows = [leaf[:1] for leaf in tf.nest.flatten(batch) if _has_rows(leaf)]
    text = tf.strings.join([tf.io.serialize_tensor(row) for row in rows] or [""])
    return tf.cast(tf.strings.to_hash_bucket_fast(text, FINGERPRINTS), tf.float32)


def _slice(leaf, begin, end):
    if isinstance(leaf, tf.SparseTensor):
        rest = leaf.dense_shape[1:]
        start = tf.concat([[tf.cast(begin, tf.int64)], tf.zeros_like(rest)], 0)
        return tf.sparse.slice(leaf, start, tf.concat([[tf.cast(end - begin, tf.int64)], rest], 0))
    return leaf[begin:end] if isinstance(leaf, tf.RaggedTensor) or _has_rows(leaf) else leaf


def _minimum(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tf.minimum(a, b)


def _maximum(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tf.maximum(a, b)


def _known_rows(batch) -> int | None:
    """Of a batch or its spec; None where it is not known before a step runs."""
    shapes = [tf.TensorShape(leaf.shape) for leaf in tf.nest.flatten(batch) if hasattr(leaf, "shape")]
    return next((shape[0] for shape in shapes if shape.rank), None)


def _symbolic(leaf, rows: int | None, mine: int | None):
    if leaf is None or not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return None
    shape = list(leaf.shape)
    shape[:1] = [mine if size == rows else size for size in shape[:1]]
    return keras.KerasTensor(shape, keras.backend.standardize_dtype(leaf.dtype))
