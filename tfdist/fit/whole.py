"""Losses and metrics that are no sum over rows (a Dice loss, the root of a mean, a maximum, rows that are compared with each
other) on the rows of all replicas. Each replica then computes the same, with the numbers of one device."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.fit.rows import Of, Rows
from tfdist.patches.fit import give_mask, mask_of

if TYPE_CHECKING:
    from tfdist.fit.replica import Replica

_OF_A_BATCH = ("dice", "tversky", "circle")  # of Keras' own losses, those that add up or compare what several rows have


class NotShown(Exception):
    """The graph does not show that a loss or a metric is a sum over rows."""


class Whole:
    """What one of several replicas computes on the rows of all."""

    def __init__(self, replica: "Replica"):
        self.replica = replica
        self.everywhere = False  # whether what is computed here is so on every replica
        self.given: list[tf.Tensor] | None = None  # the arguments of a loss or a metric whose values are to be shown
        self.gathered: dict[int, tuple[tf.Tensor, tf.Tensor]] = {}  # id of a tensor -> it, and the rows of all
        self.written: set[int] = set()  # variables of metrics that count on the first replica alone, by their id

    def loss(self, stock: Callable, loss: keras.losses.Loss, y_true, y_pred, sample_weight) -> Any:
        """A loss object that is called in a step."""
        self._refuse_mixed(y_pred)
        if loss.reduction in (None, "none") or _adds_up(loss.call, getattr(loss, "fn", None)):
            return stock(y_true, y_pred, sample_weight=sample_weight)
        if (own := self._shown(lambda: stock(y_true, y_pred, sample_weight=sample_weight), (y_true, y_pred))) is not None:
            return own
        value = self._everywhere(stock, (y_true, y_pred), {"sample_weight": sample_weight}, self._gather)
        return self.replica.know(value, Of.NOTHING)

    def _refuse_mixed(self, predicted) -> None:
        """Raises `UserError` for a model whose output for one row depends on other rows."""
        for leaf in () if tf.executing_eagerly() or self.given is not None else tf.nest.flatten(predicted):
            if tf.is_tensor(leaf) and self.replica.of(leaf) is Of.MIXED:
                raise UserError(
                    f"fit: expected a model that computes each row by itself, found an output ({leaf.name}) that rows "
                    "share (their mean, sum, maximum or number, or a comparison); several replicas see their own rows "
                    "alone: train it on one device"
                )

    def update(self, stock: Callable, metric: keras.Metric, args: tuple, kwargs: dict) -> Any:
        """An update of a metric in a step."""
        fn = getattr(metric, "_fn", None)
        if _adds_up(type(metric).update_state, fn):
            return stock(*args, **kwargs)
        if fn is not None and self._shown(lambda: (stock(*args, **kwargs), True), args) is not None:
            return None
        before = [tf.identity(variable.value) for variable in metric.variables]
        self.written |= {id(variable) for variable in metric.variables}
        result = self._everywhere(stock, args, kwargs, self._gathered_before)
        if self.replica.index:  # what all have computed counts once
            for variable, value in zip(metric.variables, before, strict=True):
                variable.assign(value)
        return result

    def kind_of(self, values) -> Of:
        """How values that are about to be reduced go with the rows; raises `NotShown` where that is asked and not clear."""
        if self.given is None or not tf.is_tensor(values):
            return Of.ROWS
        kind = Rows(self.given, {}, strict=True).of(values)
        if kind in (Of.ROWS, Of.MEAN, Of.SUM, Of.NOTHING) and (kind is Of.ROWS) == bool(values.shape.rank):
            return kind
        raise NotShown

    def _shown(self, compute: Callable, arguments) -> Any | None:
        """What `compute` gives, if the graph shows that the parts of the replicas add up."""
        if tf.executing_eagerly():
            return None
        leaves = tf.nest.flatten(arguments, expand_composites=True)
        before, self.given = self.given, [leaf for leaf in leaves if tf.is_tensor(leaf)]
        try:
            return compute()
        except NotShown:
            return None
        finally:
            self.given = before

    def _everywhere(self, compute: Callable, args, kwargs, gather: Callable) -> Any:
        args, kwargs = tf.nest.map_structure(lambda leaf: self._rows_of_all(leaf, gather), (args, kwargs))
        self.everywhere = True
        try:
            return compute(*args, **kwargs)
        finally:
            self.everywhere = False

    def _rows_of_all(self, leaf, gather: Callable):
        if leaf is None or isinstance(leaf, (str, bool, int, float)):
            return leaf
        if isinstance(leaf, tf.RaggedTensor):
            return self.replica.gather_rows(leaf)
        leaf = tf.convert_to_tensor(leaf)
        if not leaf.shape.rank:  # a number of this replica, which counts by its share
            return self.replica.means([leaf])[0]
        return gather(leaf)

    def _gather(self, leaf: tf.Tensor) -> tf.Tensor:
        rows = self.replica.rows_of_all(leaf)
        if (mask := mask_of(leaf)) is not None:
            give_mask(rows, self.replica.rows_of_all(mask))
        if not tf.executing_eagerly():
            self.gathered[id(leaf)] = leaf, rows
        return rows

    def _gathered_before(self, leaf: tf.Tensor) -> tf.Tensor:
        """For a metric, which needs no gradient: what the loss or another metric has asked for need not be sent again."""
        _, rows = self.gathered.get(id(leaf), (None, None))
        if rows is None or tf.executing_eagerly() or rows.graph is not tf.compat.v1.get_default_graph():
            return self._gather(leaf)
        return rows


def _adds_up(method: Callable, fn: Callable | None) -> bool:
    """Whether Keras' own code alone decides what becomes of the rows, and adds them up."""
    named = [one for one in (method, fn) if one is not None]
    of_keras = all(getattr(one, "__module__", type(one).__module__).startswith("keras.src.") for one in named)
    return of_keras and getattr(fn, "__name__", "") not in _OF_A_BATCH
