"""Look-ups in tables (embeddings): which slices of their gradients the replicas of a step have in common.

A look-up gives a gradient of slices: ids, and a row for each. Keras' adaptive optimizers square each slice by itself, so an
update is that of one device only if the optimizer is given the slices that one device has:

- ids that do not depend on the batch (`position_embedding(arange(T))`) are looked up once on one device, and once on every
  replica here: their rows are summed place by place;
- ids of the batch are looked up for each row of it: the replicas' slices stand one after another, repeats included;
- ids that were made unique before the look-up (sparse inputs): the same, then one slice for each id.

Where ids come from is read from the graph of the step.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import tensorflow as tf

from tfdist.errors import UserError
from tfdist.patches.graphs import Node, behind, is_stateful, source

SAME, OWN, UNIQUE = "same", "own", "unique"  # how the ids of the replicas relate

_READS = ("ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VarHandleOp", "VariableShape")
_SHAPES = ("Shape", "ShapeN")
_GATHERS = ("GatherV2", "ResourceGather")
_ELEMENTWISE = ("Identity", "Cast", "StopGradient", "AddV2", "Sub", "Mul", "RealDiv", "SelectV2", "Maximum", "Minimum",
                "Relu", "Tanh", "Sigmoid", "Erf", "Neg", "Sqrt", "Rsqrt", "Square", "BiasAdd")  # fmt: skip


class LookUp(NamedTuple):
    """One of the look-ups whose slices a gradient is made of, in order."""

    kind: str
    num_ids: int | None  # None: known only when the step runs


class Origins:
    """Where the tensors of one replica's step come from.

    Args:
        batch: the tensors that the replica was given, rows along dim 0.
        differs: whether the variable with this handle may have another value on another replica.
    """

    def __init__(self, batch: Iterable[tf.Tensor], differs: Callable[[tf.Tensor], bool]):
        self.tensors, self.differs = list(batch), differs
        self.batch = {id(tensor) for tensor in self.tensors}

    def look_ups(self, gradient: tf.IndexedSlices) -> tuple[list[LookUp], list[tf.IndexedSlices]]:
        """What a gradient is made of, and its slices, cut by look-up. Raises `UserError` where the graph does not say."""
        ids = _ids_of_each(source(Node(gradient.indices)))
        found = [LookUp(self._kind(one), one.tensor.shape.num_elements()) for one in ids]
        if len(found) == 1:
            return found, [gradient]
        # inside of a function that was called the ids themselves are out of reach
        sizes = [
            -1 if one.calls and size is None else tf.size(one.tensor) if size is None else size
            for one, (_, size) in zip(ids, found, strict=True)
        ]
        return found, split(gradient, sizes)

    def _kind(self, ids: Node) -> str:
        if not self.depends(ids):
            return SAME
        op = _unchanged(ids).op
        return UNIQUE if op is not None and op.type in ("Unique", "UniqueV2") else OWN

    def depends(self, node: Node) -> bool:
        """Whether it is another one on another replica: by the rows it has, by their number, or by chance."""
        return any(self._differs(one) for one in behind(node, _past_shapes))

    def _differs(self, node: Node) -> bool:
        op = node.op
        if id(node.tensor) in self.batch:
            return True
        if op is None:
            return node.tensor.dtype == tf.resource and self.differs(node.tensor)
        if _is_dim(node):
            return tf.get_static_value(node.tensor) is None and self._counts_rows(*_one_dim(node))
        if op.type in _SHAPES:
            of = node.inputs()[node.tensor.value_index]
            return any(self._counts_rows(of, dim) for dim in _unknown_dims(of.tensor))
        # an argument, a random number, the next element of an iterator
        return op.type == "Placeholder" or (is_stateful(op) and op.type not in _READS)

    def _counts_rows(self, node: Node, dim: int | None) -> bool:
        """Whether a dim that is known only when the step runs counts rows of the batch. dim None: any of its dims."""
        while id(node.tensor) not in self.batch:
            shape, op = node.tensor.shape, node.op
            inputs = node.inputs() if op is not None and dim is not None else []
            if inputs and op.type in _GATHERS and dim < (inputs[1].tensor.shape.rank or 0):
                node = inputs[1]
                continue
            alike = [one for one in inputs if one.tensor.shape.rank == shape.rank and one.tensor.shape[dim] is None]
            if not alike or op.type not in _ELEMENTWISE:
                raise UserError(
                    "fit: expected the ids of a look-up to come from constants, or from the shape of the model's inputs, "
                    f"found them made of the shape of {node.tensor.name}, of which several replicas cannot tell whether it "
                    "counts rows; give the dataset a fixed length (padded_batch), or take the shape of an input"
                )
            node = alike[0]
        return dim in (0, None)


def split(gradient: tf.IndexedSlices, num_ids: list) -> list[tf.IndexedSlices]:
    """Cuts slices into runs of so many; -1, once: all that are left."""
    if len([size for size in num_ids if isinstance(size, int) and size < 0]) > 1:
        raise UserError(
            "fit: expected a table that is looked up several times in one tf.function to have at most one look-up of "
            "unknown size on several replicas, found more; leave the tf.function out: `fit` compiles the whole step"
        )
    values, indices = tf.split(gradient.values, num_ids), tf.split(gradient.indices, num_ids)
    return [tf.IndexedSlices(v, i, gradient.dense_shape) for v, i in zip(values, indices, strict=True)]


def joined(parts: list[tf.IndexedSlices]) -> tf.IndexedSlices:
    """Puts slices one after another."""
    if len(parts) == 1:
        return parts[0]
    values, indices = tf.concat([part.values for part in parts], 0), tf.concat([part.indices for part in parts], 0)
    return tf.IndexedSlices(values, indices, parts[0].dense_shape)


def once_each(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """One slice for each id, in the order in which ids first come: the sum of its slices."""
    ids, places = tf.unique(gradient.indices)
    return tf.IndexedSlices(tf.math.unsorted_segment_sum(gradient.values, places, tf.size(ids)), ids, gradient.dense_shape)


def _ids_of_each(indices: Node) -> list[Node]:
    """Where a table is looked up several times, TensorFlow puts the slices one after another."""
    node = _unchanged(indices)
    if not _makes(node, "ConcatV2"):
        return [indices]
    *parts, axis = node.inputs()
    along_dim_0 = tf.get_static_value(axis.tensor) == 0 or node.tensor.shape.rank == 1
    return [one for part in parts for one in _ids_of_each(part)] if along_dim_0 else [indices]


def _unchanged(node: Node) -> Node:
    """What made the numbers, past ops that leave them as they are, in their order."""
    while _makes(node, "Identity", "Cast", "Reshape"):
        first = node.inputs()[0]
        if node.op.type == "Reshape" and node.tensor.shape.rank != 1:
            break
        node = first
    return node


def _past_shapes(node: Node) -> list[Node]:
    """What a node takes, but the tensors whose shape it is."""
    return [] if _makes(node, *_SHAPES) or _is_dim(node) else node.inputs()


def _is_dim(node: Node) -> bool:
    """Whether it is `tf.shape(tensor)[...]`."""
    return _makes(node, "StridedSlice") and _makes(_unchanged(node.inputs()[0]), "Shape")


def _makes(node: Node, *types: str) -> bool:
    return node.op is not None and node.op.type in types


def _unknown_dims(tensor: tf.Tensor) -> list[int | None]:
    return [None] if tensor.shape.rank is None else [dim for dim, size in enumerate(tensor.shape) if size is None]


def _one_dim(node: Node) -> tuple[Node, int | None]:
    """(node, dim) of `tf.shape(node)[dim]`; dim None where it is more than one."""
    shape, begin, *_ = node.inputs()
    of = _unchanged(shape).inputs()[0]
    place = tf.get_static_value(begin.tensor)
    one = place is not None and len(place) == 1 and node.op.get_attr("shrink_axis_mask") == 1
    return of, int(place[0]) % of.tensor.shape.rank if one and of.tensor.shape.rank else None
