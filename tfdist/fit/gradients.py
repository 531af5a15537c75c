"""Gradients of one of several replicas in a step of Keras `fit`, and their sum: the gradient of the global batch."""

import itertools
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.fit import lookups
from tfdist.fit.logs import ComputedFromResults
from tfdist.fit.rows import Of
from tfdist.patches import graphs
from tfdist.strategies import support

if TYPE_CHECKING:
    from tfdist.fit.replica import Replica

Kinds = list[list[lookups.LookUp]]  # of each gradient: what it is made of; empty: it is dense


class RowsAreKnown(Exception):
    """A step looks up ids that are constants in a graph of batches of one size, where what repeats for each row is one too:
    trace it with an unknown number of rows first, to see which do."""


class Gradients:
    """Those of one replica's step.

    `own_step`: of the model's own: they are summed where it takes them, whatever it does with them then; else where an
    optimizer is given them.
    """

    def __init__(self, replica: "Replica", own_step: bool):
        self.replica, self.own_step = replica, own_step
        self.reduced = False  # what an optimizer is given are sums over all replicas already
        self.deferred: list | None = None  # updates that wait for that sum: (apply, kinds, gradients, variables)
        self.taken: list | None = None  # where to put gradients instead of updating: (optimizer, gradients, variables)
        self.updates: list | None = None  # where to note what would be updated, instead: (optimizer, variables)
        self.batch: list[tf.Tensor] = []  # what the replica was given, in the graph that is being traced
        self.kinds: list[Kinds] = []  # of the gradients of slices that were summed so far, in order
        self.plan: list[Kinds] | None = None  # the same, traced with an unknown number of rows; None: not done yet
        self.targets: list[Of] = []  # what the targets of tapes were made of, in order
        self.planned_targets: list[Of] = []  # the same, of a step that runs eagerly, from its trace
        self.whole: dict[int, tf.Tensor] = {}  # gradients that are sums over all replicas, by their id

    def begin(self, batch) -> None:
        """A step, or what of it is compiled, begins to be traced on this batch."""
        self.batch = [leaf for leaf in tf.nest.flatten(batch, expand_composites=True) if leaf is not None]
        self.kinds, self.targets, self.replica.reader = [], [], None

    def nothing_updated(self) -> None:
        """Raises `UserError` where a step of a worker computes again after an update, which the servers do at its end."""
        if self.taken:
            support.refuse(support.SEVERAL_UPDATES, "ParameterServer")

    # ---- of a tape ----

    def of_tape(self, stock, target, sources, output_gradients, *args, **kwargs):
        """What a tape gives in a step: so that the sum by shares is right. In a step of the model's own it is the gradient
        of the global batch, because of what it may do with it."""
        of_variables = [isinstance(one, (keras.Variable, tf.Variable)) for one in tf.nest.flatten(sources)]
        output_gradients = self._weighed(tf.nest.flatten(target), tf.nest.flatten(output_gradients), any(of_variables))
        found = tf.nest.flatten(stock(tf.nest.flatten(target), sources, output_gradients, *args, **kwargs))
        if not self.own_step:
            return tf.nest.pack_sequence_as(sources, found)
        pairs = list(zip(of_variables, found, strict=True))
        summed = iter(self.sum(*self.look_ups([g for of_variable, g in pairs if of_variable])))
        whole = [next(summed) if of_variable else self._of_input(g) for of_variable, g in pairs]
        self.whole |= {id(_values(g)): _values(g) for (of_variable, _), g in zip(pairs, whole, strict=True) if of_variable}
        for g in filter(tf.is_tensor, map(_values, self.whole.values())):
            self.replica.know(g, Of.NOTHING)
        return tf.nest.pack_sequence_as(sources, whole)

    def _weighed(self, targets: list, given: list, of_variables: bool) -> list | None:
        """The gradients of the targets. Those of sums over rows, and of losses of each row, which a tape adds up, are
        divided by the share that they are multiplied with later."""
        given = given if len(given) == len(targets) else [None] * len(targets)
        weighed = [self._weigh(target, own, of_variables) for target, own in zip(targets, given, strict=True)]
        if all(one is None for one in weighed):
            return None
        return [tf.ones_like(one) if own is None else own for one, own in zip(targets, weighed, strict=True)]

    def _weigh(self, target, given, of_variables: bool):
        if not tf.is_tensor(target):
            return given
        of = self._of_target(target)
        self.targets.append(of)
        if of in (Of.UNKNOWN, Of.MIXED) and of_variables:
            if not self.replica.logs.whole_results and graphs.reads(target, self.replica.logs.state_ids()):
                raise ComputedFromResults("a loss")
            raise UserError(
                "fit: expected losses that are means or sums over the rows of a batch, found another one "
                f"({target.name}: a root or quotient of such, a maximum, rows that are compared ...), of which the parts of "
                "several replicas do not add up; compile(loss=...) with a function of y_true and y_pred, which is given the "
                "rows of all"
            )
        if of in (Of.ROWS, Of.ASIDE, Of.SOME, Of.SUM):
            given = tf.ones_like(target) if given is None else given
            return given / self.replica.share(given.dtype)
        return given

    def _of_target(self, target: tf.Tensor) -> Of:
        if not tf.executing_eagerly():
            return self.replica.of(target)
        if len(self.targets) < len(self.planned_targets):
            return self.planned_targets[len(self.targets)]
        return Of.ROWS if self._is_of_rows(target) else Of.MEAN  # of a step that cannot be traced

    def check_updates(self, gradients: list) -> None:
        """Raises `UserError` for gradients of all rows that a step changes by what its own rows have."""
        for values in map(_values, gradients):
            if values is None or tf.executing_eagerly() or not self.own_step or not self._is_whole(values):
                continue
            if self.replica.of(values) in (Of.MEAN, Of.SUM, Of.MIXED, Of.ROWS):
                raise UserError(
                    "fit: expected a train_step to change gradients by what does not depend on the batch, found one with a "
                    f"loss or another number of the batch in it ({values.name}), which replicas have for their own rows "
                    "alone; use the result of a metric, which is that of all rows"
                )

    def _of_input(self, gradient):
        """Of what is no variable: rows of this replica, in terms of the loss of all."""
        if not tf.is_tensor(gradient):
            return gradient
        return self.replica.know(gradient * self.replica.share(gradient.dtype), Of.ROWS)

    def _is_of_rows(self, target: tf.Tensor) -> bool:
        """Whether it has an entry for each row; not a number, or one for each task."""
        known = {leaf.shape[0] for leaf in self.batch if leaf.shape.rank}
        return bool(target.shape.rank) and any(size is None or size in known for size in target.shape)

    def not_summed(self, gradients: list) -> list:
        """Those that no sum over the replicas is in, None for the others."""
        return [None if g is None or self._is_whole(_values(g)) else g for g in gradients]

    def _is_whole(self, values: tf.Tensor) -> bool:
        if id(values) in self.whole or tf.executing_eagerly():
            return bool(self.whole)
        return graphs.reads(values, set(self.whole))

    # ---- of slices ----

    def look_ups(self, gradients: list) -> tuple[Kinds, list]:
        """Of each gradient: what it is made of; and itself, or a list of its slices by look-up."""
        if not any(isinstance(g, tf.IndexedSlices) for g in gradients):
            return [[] for _ in gradients], gradients
        if tf.executing_eagerly():
            return self._planned_look_ups(gradients)
        origins = self._origins()
        found = [origins.look_ups(g) if isinstance(g, tf.IndexedSlices) else ([], g) for g in gradients]
        kinds, parts = [of for of, _ in found], [part for _, part in found]
        some_alike = any(one.kind == lookups.SAME for of in kinds for one in of)
        if some_alike and any(leaf.shape[:1].num_elements() for leaf in self.batch):
            pairs = zip(kinds, self._planned(), strict=True)
            kinds = [[lookups.LookUp(known.kind, one.num_ids) for one, known in zip(*of, strict=True)] for of in pairs]
        self.kinds.append(kinds)
        return kinds, parts

    def _origins(self) -> lookups.Origins:
        own = {id(v.value.handle) for v in self.replica.written.values()} | self.replica.logs.state_ids()
        return lookups.Origins(self.batch, lambda handle: id(handle) in own)

    def _planned(self) -> Kinds:
        if self.plan is None:
            raise RowsAreKnown
        return self.plan[len(self.kinds)]

    def _planned_look_ups(self, gradients: list) -> tuple[Kinds, list]:
        if self.plan is None:
            raise UserError(
                "fit: expected a train_step that tf.function can trace, because it looks up tables and runs eagerly on "
                "several replicas: the graph shows which look-ups they have in common; found one that it cannot; leave out "
                "run_eagerly"
            )
        kinds = [list({one.kind: one for one in of}.values()) for of in self._planned()]  # their order is not known
        self.kinds.append(kinds)
        if any(len(of) > 1 for of in kinds):
            raise UserError(
                "fit: expected a table that is looked up in one way, found one that is looked up both for each row of the "
                "batch and once for all of them, in a step that runs eagerly on several replicas; leave out run_eagerly"
            )
        return kinds, [[g] if of else g for g, of in zip(gradients, kinds, strict=True)]

    # ---- of all replicas ----

    def sum(self, kinds: Kinds, gradients: list) -> list:
        """The gradients of the global batch, from each replica's own: see `look_ups`."""
        each = itertools.chain.from_iterable(of or [None] for of in kinds)
        flat = list(zip(each, tf.nest.flatten(gradients), strict=True))
        dense = [g.values if look_up else g for look_up, g in flat if g is not None and _is_summed(look_up)]
        sparse = [g for look_up, g in flat if not _is_summed(look_up)]
        summed = iter(self._sum_by_shares(dense))
        gathered = iter(self.replica.gather([self._that_count(g) for g in sparse]))

        def total(look_up, gradient):
            if gradient is None or look_up is None:
                return None if gradient is None else next(summed)
            if look_up.kind == lookups.SAME:
                return tf.IndexedSlices(next(summed), gradient.indices, gradient.dense_shape)
            slices = next(gathered)
            return lookups.once_each(slices) if look_up.kind == lookups.UNIQUE else slices

        totals = iter([total(*one) for one in flat])
        return [lookups.joined([next(totals) for _ in of]) if of else next(totals) for of in kinds]

    def _sum_by_shares(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """Over all replicas, by their shares. Its gradient is of that form too: losses of all count by their shares."""
        if not self.own_step:
            return self.replica.sum_by_shares(tensors)

        @tf.custom_gradient
        def total(*tensors):
            def gradient(*upstream):
                return self.replica.sum_by_shares(list(upstream))

            return self.replica.sum_by_shares(list(tensors)), gradient

        return total(*tensors) if tensors else []

    def _that_count(self, slices: tf.IndexedSlices) -> tf.IndexedSlices:
        """Without rows there are none."""
        count = tf.where(self.replica.rows > 0, tf.size(slices.indices), 0)
        return tf.IndexedSlices(self.replica.weighted(slices.values)[:count], slices.indices[:count], slices.dense_shape)


def _is_summed(look_up: lookups.LookUp | None) -> bool:
    return look_up is None or look_up.kind == lookups.SAME


def _values(gradient) -> tf.Tensor | None:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
