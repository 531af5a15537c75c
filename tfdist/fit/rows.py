"""How what a replica computes goes with the rows of the batch, read from the graph of its step.

A replica computes on its rows, and what it has for a loss counts by its share of them (replica.py). That is the loss of the
whole batch where it is a mean over rows; a sum over rows can be made so; of anything else (a root of a mean, a quotient of
two sums, a maximum) the parts do not add up. There is one rule for each kind of op, from the batch on. Ops without a rule,
as most of a layer are, are taken to keep rows apart where their result can have rows; a number that they make is unknown.
"""

import enum
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from tfdist.patches.graphs import Node, source


class Of(enum.Enum):
    """What a tensor is made of."""

    NOTHING = "no row: the same on every replica"
    ROWS = "entries for each row, in order along dim 0, made of that row alone"
    ASIDE = "the same along another dim"
    SOME = "entries of some rows"
    PART = "entries for each row, divided by the number of rows"
    SUM = "a sum over rows"
    MEAN = "a mean over rows, or a sum of such"
    COUNT = "the number of rows, times a constant; or a shape with it"
    INVERSE = "a constant divided by the number of rows"
    MIXED = "rows that are compared or mixed with each other, or a sum or mean of them put to other use"
    UNKNOWN = "nobody can tell"


_SAME = {"Identity", "Cast", "Neg", "StopGradient", "PreventGradient", "CheckNumerics", "Snapshot", "EnsureShape"}
_LINEAR = {"AddV2", "Add", "Sub", "AddN", "BiasAdd"}
_PRODUCTS, _QUOTIENTS = {"Mul", "MulNoNan"}, {"RealDiv", "DivNoNan"}
_ELEMENTWISE = {
    "Abs", "Acos", "Asin", "Atan", "Atan2", "Ceil", "ClipByValue", "Cos", "Cosh", "Digamma", "Elu", "Equal", "Erf", "Erfc",
    "Exp", "Expm1", "Floor", "FloorDiv", "FloorMod", "Greater", "GreaterEqual", "IsFinite", "IsInf", "IsNan", "LeakyRelu",
    "Less", "LessEqual", "Lgamma", "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "NotEqual",
    "OnesLike", "Pow", "Reciprocal", "Relu", "Relu6", "Round", "Rsqrt", "Select", "SelectV2", "Selu", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Square", "SquaredDifference", "Tan", "Tanh", "Xdivy", "Xlog1py", "Xlogy",
    "ZerosLike",
}  # fmt: skip
_REDUCTIONS = {"Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "EuclideanNorm", "ArgMax", "ArgMin", "Cumsum", "Cumprod"}
_LAST_DIM = {"Softmax", "LogSoftmax", "SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits"}
_MOVES = {
    "Pack",
    "ConcatV2",
    "Reshape",
    "Squeeze",
    "ExpandDims",
    "Transpose",
    "Unpack",
    "Split",
    "SplitV",
    "Tile",
    "BroadcastTo",
}
_WITH_ROWS = {Of.ROWS, Of.ASIDE, Of.SOME, Of.PART}
_NUMBERS = {Of.SUM, Of.MEAN, Of.COUNT, Of.INVERSE}
_PRODUCTS_OF_TWO = {
    frozenset([Of.ROWS]): Of.ROWS,
    frozenset([Of.ASIDE]): Of.ASIDE,
    frozenset([Of.SOME]): Of.SOME,
    frozenset([Of.ROWS, Of.PART]): Of.PART,
    frozenset([Of.ROWS, Of.INVERSE]): Of.PART,
    frozenset([Of.SUM, Of.INVERSE]): Of.MEAN,
    frozenset([Of.COUNT, Of.INVERSE]): Of.NOTHING,
    frozenset([Of.MEAN, Of.COUNT]): Of.SUM,
}
_QUOTIENTS_OF_TWO = {
    (Of.ROWS, Of.ROWS): Of.ROWS, (Of.ASIDE, Of.ASIDE): Of.ASIDE, (Of.SOME, Of.SOME): Of.SOME, (Of.PART, Of.ROWS): Of.PART,
    (Of.NOTHING, Of.ROWS): Of.ROWS, (Of.NOTHING, Of.ASIDE): Of.ASIDE, (Of.NOTHING, Of.SOME): Of.SOME,
    (Of.NOTHING, Of.COUNT): Of.INVERSE, (Of.NOTHING, Of.INVERSE): Of.COUNT,
    (Of.ROWS, Of.COUNT): Of.PART, (Of.SUM, Of.COUNT): Of.MEAN, (Of.COUNT, Of.COUNT): Of.NOTHING,
}  # fmt: skip


class Rows:
    """Reads the graph of one replica's step.

    Args:
        rows: the tensors whose first dim counts rows: the batch, or what a loss is given.
        known: what is known of other tensors, by their id.
        strict: an op without a rule makes what is unknown: what a loss function does has to be shown.
    """

    def __init__(self, rows: Iterable[tf.Tensor], known: dict[int, Of], strict: bool = False):
        tensors = list(rows)
        self.known = known | {id(tensor): Of.ROWS for tensor in tensors}
        self.sizes = {t.shape[0] for t in tensors if t.shape.rank and t.shape[0]}  # where the number of rows is a constant
        self.strict = strict
        self.found: dict[tuple, Of] = {}
        self.nodes: list[Node] = []  # of `found`, whose tensors, and their ids, live as long as this

    def know(self, tensor: tf.Tensor, of: Of) -> None:
        """A tensor that was just made is this."""
        self.known[id(tensor)] = of

    def of(self, tensor: tf.Tensor) -> Of:
        """What a tensor is made of."""
        first = source(Node(tensor))
        rest = [first]
        while rest:  # graphs are deep
            node = rest[-1]
            if _key(node) in self.found:
                rest.pop()
            elif (leaf := self._leaf(node)) is not None:
                self._note(node, leaf)
            elif waiting := [one for one in node.inputs() if _key(one) not in self.found]:
                rest += waiting
            else:
                inputs = node.inputs()
                self._note(node, self._rule(node, inputs, [self.found[_key(one)] for one in inputs]))
        return self.found[_key(first)]

    def _note(self, node: Node, of: Of) -> None:
        self.found[_key(node)] = of
        self.nodes.append(node)

    def _leaf(self, node: Node) -> Of | None:
        """Where the way back ends; None: it goes on."""
        if (known := self.known.get(id(node.tensor))) is not None:
            return known
        if node.op is None:  # a constant, the handle of a variable
            return Of.NOTHING
        if node.op.type == "Placeholder":
            return Of.NOTHING if node.tensor.dtype == tf.resource else Of.UNKNOWN
        return None if node.op.inputs else Of.NOTHING

    def _can_have_rows(self, tensor: tf.Tensor) -> bool:
        if tensor.dtype == tf.variant or tensor.shape.rank is None:
            return True
        size = tensor.shape[0] if tensor.shape.rank else 0
        return size is None or bool(size and any(size % rows == 0 for rows in self.sizes))

    # ---- rules ----

    def _rule(self, node: Node, inputs: Sequence[Node], kinds: list[Of]) -> Of:
        kind = node.op.type
        if kind in ("Shape", "ShapeN", "Size", "Rank"):
            return self._shape(kinds[node.tensor.value_index if kind == "ShapeN" else 0], kind)
        if kind in ("Reshape", "Tile", "BroadcastTo"):  # into a shape
            kinds[1] = Of.COUNT if kinds[1] in (Of.COUNT, Of.UNKNOWN) else Of.NOTHING
        if kind == "IdentityN":  # what custom gradients give: results, then arguments
            return kinds[node.tensor.value_index]
        if all(one is Of.NOTHING for one in kinds):
            return Of.NOTHING
        if kind == "StridedSlice":
            return self._sliced(node, inputs, kinds)
        if Of.MIXED in kinds or Of.UNKNOWN in kinds:
            return Of.MIXED if Of.MIXED in kinds else Of.UNKNOWN
        if kind in _SAME:
            return kinds[0]
        if kind in _LINEAR | _PRODUCTS | _QUOTIENTS | _ELEMENTWISE:
            return self._elementwise(node, inputs, kinds)
        if kind in _REDUCTIONS:
            return self._reduced(node, inputs, kinds[0])
        if kind == "L2Loss":
            return Of.SUM if kinds[0] in (Of.ROWS, Of.ASIDE, Of.SOME) else Of.UNKNOWN
        if kind in _MOVES:
            return self._moved(node, inputs, kinds)
        if kind == "MatMul":
            return self._product(node, kinds)
        if kind == "Einsum":
            return self._einsum(node, kinds)
        if kind in _LAST_DIM:
            if inputs[0].tensor.shape.rank == 1:  # over the rows
                return Of.MIXED
            return Of.ROWS if set(kinds) <= {Of.ROWS, Of.NOTHING} else self._other(node, kinds)
        if kind in ("GatherV2", "GatherNd"):
            return self._gathered(node, inputs, kinds)
        if kind == "Where":
            return Of.SOME
        if self.strict and kind in ("OneHot", "Fill", "BatchMatMulV2") and self._can_have_rows(node.tensor):
            return Of.ROWS if set(kinds) <= {Of.ROWS, Of.NOTHING, Of.COUNT} else Of.UNKNOWN
        return self._other(node, kinds)

    def _other(self, node: Node, kinds: Sequence[Of]) -> Of:
        """An op without a rule."""
        if self.strict or not self._can_have_rows(node.tensor):
            return Of.UNKNOWN
        if node.tensor.dtype == tf.variant and Of.ASIDE in kinds:  # a list of steps, each with rows
            return Of.ASIDE
        if node.op.type == "TensorListStack":
            return kinds[0]
        return Of.SOME if Of.SOME in kinds else Of.ROWS if {Of.ROWS, Of.ASIDE, Of.COUNT} & set(kinds) else Of.UNKNOWN

    def _shape(self, of: Of, kind: str) -> Of:
        if kind == "Rank" or of in (Of.NOTHING, *_NUMBERS):
            return Of.NOTHING
        return Of.COUNT if of in (Of.ROWS, Of.PART) else Of.UNKNOWN

    def _sliced(self, node: Node, inputs: Sequence[Node], kinds: list[Of]) -> Of:
        of, begin = kinds[0], tf.get_static_value(inputs[1].tensor)
        if _makes_shape(inputs[0]) and begin is not None and len(begin) == 1:  # tf.shape(x)[dim], or [dim:]
            masked = node.op.get_attr("begin_mask") & 1
            return Of.NOTHING if begin[0] > 0 and not masked and of is Of.COUNT else of
        if of in (Of.SUM, Of.MEAN, Of.COUNT, Of.UNKNOWN, Of.NOTHING, Of.INVERSE):
            return of
        masks = [node.op.get_attr(f"{name}_mask") & 1 for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")]
        places = inputs[1].tensor.shape.num_elements()
        whole = masks == [1, 1, 0, 0, 0] or places == 0
        if masks[2]:  # x[..., :2], which is the first dim of a vector
            whole = bool(places and inputs[0].tensor.shape.rank and places - 1 < inputs[0].tensor.shape.rank)
        if whole:
            return of
        if masks[3]:
            return Of.ASIDE
        if of is Of.ASIDE:  # one of a list of steps
            return Of.ROWS if masks[4] and self._can_have_rows(node.tensor) else Of.ASIDE if not masks[4] else Of.UNKNOWN
        return of if Of.COUNT in kinds[1:] and not self.strict else Of.UNKNOWN

    def _elementwise(self, node: Node, inputs: Sequence[Node], kinds: list[Of]) -> Of:
        kind, rank, others = node.op.type, node.tensor.shape.rank, [one for one in kinds if one is not Of.NOTHING]
        for one, of in zip(inputs, kinds, strict=True):
            if of in _WITH_ROWS and one.tensor.shape.rank != rank:  # else its rows would lie along another's dim
                return Of.MIXED if of is Of.ROWS else Of.UNKNOWN
        if kind in _QUOTIENTS:
            return self._quotient(inputs, *kinds)
        if kind in _PRODUCTS:
            return others[0] if len(others) == 1 else _PRODUCTS_OF_TWO.get(frozenset(others), Of.MIXED)
        if len(set(others)) != 1:
            return Of.MIXED
        (of,) = set(others)
        chosen = kind in ("Select", "SelectV2") and kinds[0] is Of.NOTHING
        if kind in _LINEAR or chosen:  # a constant added to a mean is one added to each row
            return of if of in (Of.ROWS, Of.ASIDE, Of.SOME, Of.MEAN) or Of.NOTHING not in kinds or chosen else Of.MIXED
        if of is Of.COUNT and kind == "Maximum":  # at least one row
            least = [tf.get_static_value(one.tensor) for one, k in zip(inputs, kinds, strict=True) if k is Of.NOTHING]
            return of if least and least[0] is not None and least[0] <= 1 else Of.UNKNOWN
        if kind in ("ZerosLike", "OnesLike"):
            return of if of in _WITH_ROWS else Of.NOTHING
        whole = node.tensor.dtype.is_integer and of is Of.COUNT  # arithmetic of shapes
        return of if of in (Of.ROWS, Of.ASIDE, Of.SOME) else Of.UNKNOWN if whole else Of.MIXED

    def _quotient(self, inputs: Sequence[Node], of: Of, by: Of) -> Of:
        if by is not Of.NOTHING:
            return _QUOTIENTS_OF_TWO.get((of, by), Of.MIXED)
        number = tf.get_static_value(inputs[1].tensor)
        # where the number of rows is a constant of the graph: this replica's, or that of the whole batch?
        if of is Of.SUM and self.sizes and (number is None or any(np.any(number % rows == 0) for rows in self.sizes)):
            return Of.UNKNOWN
        return of

    def _reduced(self, node: Node, inputs: Sequence[Node], of: Of) -> Of:
        kind, rank = node.op.type, inputs[0].tensor.shape.rank
        if of in _NUMBERS:
            linear = kind in ("Sum", "Mean") and of in (Of.SUM, Of.MEAN)
            return of if linear or not rank or (of is Of.COUNT and kind == "Prod") else Of.MIXED
        axes = tf.get_static_value(inputs[1].tensor)
        if axes is None or rank is None:
            return Of.UNKNOWN
        axes = {int(axis) % rank for axis in np.reshape(axes, -1)}
        if of is Of.ASIDE and axes == {0}:
            return Of.ROWS if self._can_have_rows(node.tensor) else Of.UNKNOWN
        if (of is Of.ASIDE and axes != set(range(rank))) or (of is not Of.ASIDE and 0 not in axes):
            return Of.UNKNOWN if of is Of.ASIDE else of
        if kind == "Sum":
            return Of.MEAN if of is Of.PART else Of.SUM
        if kind == "Mean" and of in (Of.ROWS, Of.ASIDE):
            return Of.MEAN
        is_bound = not self.strict and not inputs[0].tensor.dtype.is_floating  # of lengths: how far others are padded
        return Of.NOTHING if is_bound and kind in ("Max", "Min", "All", "Any") else Of.MIXED

    def _moved(self, node: Node, inputs: Sequence[Node], kinds: list[Of]) -> Of:
        kind, of = node.op.type, kinds[0]
        if kind in ("Pack", "ConcatV2"):
            kinds, others = kinds[: len(kinds) - (kind == "ConcatV2")], {one for one in kinds if one is not Of.NOTHING}
            if len(others) != 1:
                return Of.UNKNOWN
            (of,) = others
            axis = node.op.get_attr("axis") if kind == "Pack" else tf.get_static_value(inputs[-1].tensor)
            if of in _NUMBERS or of is Of.UNKNOWN or axis is None:
                return of if axis is not None else Of.UNKNOWN
            if axis % (node.tensor.shape.rank or 1 << 30):
                return of
            if of is not Of.ROWS or Of.NOTHING in kinds:
                return of if of is Of.ASIDE and kind == "ConcatV2" else Of.UNKNOWN
            return Of.ASIDE if kind == "Pack" else Of.UNKNOWN if self.strict else of  # rows behind rows: as many of each
        if of in _NUMBERS:
            return of
        fits = self._can_have_rows(node.tensor)
        if kind == "Reshape":
            return of if fits and of is not Of.ASIDE else Of.UNKNOWN if of is not Of.NOTHING else of
        if kind in ("Tile", "BroadcastTo"):
            return Of.ROWS if fits and of in (Of.NOTHING, Of.ROWS) else Of.UNKNOWN
        if kind == "Transpose":
            order = tf.get_static_value(inputs[1].tensor)
            if order is None:
                return Of.UNKNOWN
            if of is Of.ASIDE:  # back again, most likely
                return Of.ROWS if fits and order[0] else Of.ASIDE if not order[0] else Of.UNKNOWN
            return of if order[0] == 0 else Of.ASIDE if of is Of.ROWS else Of.UNKNOWN
        if kind == "ExpandDims":
            axis = tf.get_static_value(inputs[1].tensor)
            in_front = axis is None or not int(np.reshape(axis, -1)[0]) % node.tensor.shape.rank
            return of if not in_front else Of.ASIDE if of is Of.ROWS else Of.UNKNOWN
        if kind == "Squeeze":
            return of if fits or of is Of.ASIDE else Of.UNKNOWN
        if of is Of.ASIDE:  # taken apart, step by step
            return Of.ROWS if fits and kind == "Unpack" and node.op.get_attr("axis") == 0 else of
        return of if fits and (kind != "Unpack" or node.op.get_attr("axis")) else Of.UNKNOWN

    def _product(self, node: Node, kinds: list[Of]) -> Of:
        of, by = kinds
        rows_of = of is Of.ROWS and not node.op.get_attr("transpose_a")
        rows_by = by is Of.ROWS and not node.op.get_attr("transpose_b")
        if by is Of.NOTHING and (rows_of or of is Of.SOME or of in _NUMBERS):
            return of
        if of is Of.NOTHING and by in _NUMBERS:
            return by
        if of is Of.ROWS and not rows_of and (rows_by or by is Of.NOTHING):
            return Of.SUM if rows_by else Of.ASIDE
        if of is Of.NOTHING and by is Of.ROWS:
            return Of.SUM if rows_by else Of.ASIDE
        return Of.MIXED

    def _einsum(self, node: Node, kinds: list[Of]) -> Of:
        taken, _, given = node.op.get_attr("equation").decode().partition("->")
        labels = taken.split(",")
        if any(of not in (Of.ROWS, Of.NOTHING) for of in kinds) or "..." in taken:
            return self._other(node, kinds)
        (row, *others) = {label[:1] for label, of in zip(labels, kinds, strict=True) if of is Of.ROWS}
        elsewhere = any(row in label[of is Of.ROWS :] for label, of in zip(labels, kinds, strict=True))
        if others or elsewhere:
            return Of.UNKNOWN
        return Of.SUM if row not in given else Of.ROWS if given.startswith(row) else Of.ASIDE

    def _gathered(self, node: Node, inputs: Sequence[Node], kinds: list[Of]) -> Of:
        of, ids = kinds[:2]
        if Of.SOME in (of, ids):
            return Of.SOME
        if of is Of.NOTHING and ids is Of.ROWS:
            return Of.ROWS
        if of is not Of.ROWS or node.op.type == "GatherNd":
            return Of.UNKNOWN if self.strict or {of, ids} != {Of.ROWS} else Of.ROWS
        axis, batch_dims = tf.get_static_value(inputs[2].tensor), node.op.get_attr("batch_dims")
        return Of.ROWS if batch_dims or (ids is Of.NOTHING and axis) else Of.UNKNOWN


def _key(node: Node) -> tuple:
    return id(node.tensor), node.calls


def _makes_shape(node: Node) -> bool:
    while node.op is not None and node.op.type in ("Identity", "Cast"):
        node = node.inputs()[0]
    return node.op is not None and node.op.type == "Shape"
