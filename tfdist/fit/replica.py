"""One replica's part of a step of Keras `fit`, and what makes the parts add up to the step of one device.

A replica computes on its rows of the global batch. Keras' losses and gradients are then those of a mean over its rows, and
`rows / total` is its share: the loss of the batch is the sum over the replicas of share x loss, and so is the gradient.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.fit import lookups
from tfdist.patches import graphs, servers
from tfdist.patches.fit import Quirks
from tfdist.patches.layers import ComponentVariables
from tfdist.patches.server_optimizers import variables_of
from tfdist.strategies import support
from tfdist.strategies.sync import local_replica
from tfdist.train import batch_norm, step

_current: contextvars.ContextVar["Replica | None"] = contextvars.ContextVar("replica", default=None)
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


class Communicates(Exception):
    """A forward or backward pass that is being compiled needs a sum over the replicas in the middle."""


Kinds = list[list[lookups.LookUp]]  # of each gradient: what it is made of; empty: it is dense


class RowsAreKnown(Exception):
    """A step looks up ids that are constants in a graph of batches of one size, where what repeats for each row is one too:
    trace it with an unknown number of rows first, to see which do."""


class ComputedFromResults(Exception):
    """A step logs what is computed from the result of a metric: it needs that of all replicas while it runs."""


class Replica:
    """Which one computes, on what: made anew whenever a step is traced.

    `rows`: how many of its rows count, a scalar int32. Without any it computes on one row that does not.
    `total`: rows of the global batch.
    """

    def __init__(
        self, model: keras.Model, components: ComponentVariables, local: int, index: int, count: int,
        rows: tf.Tensor, first_row: tf.Tensor, total: tf.Tensor, fingerprint: tf.Tensor, quirks: Quirks,
        metrics: Sequence[keras.Metric] = (), whole_results: bool = False, own_step: bool = False,
    ):  # fmt: skip
        self.model, self.components, self.quirks = model, components, quirks
        self.local, self.index, self.count = local, index, count
        self.rows, self.first_row, self.total, self.fingerprint = rows, first_row, total, fingerprint
        self.compiled = False  # inside of XLA no collective can stand
        self.reduced = False  # the gradients that an optimizer is given are sums over all replicas already
        self.deferred: list | None = None  # updates that wait for that sum: (apply, gradients, variables)
        self.taken: list | None = None  # where to put gradients instead of updating: (optimizer, gradients, variables)
        self.updates: list | None = None  # where to note what would be updated, instead: (optimizer, variables)
        self.batch: list[tf.Tensor] = []  # what it was given, in the graph that is being traced
        self.kinds: list[Kinds] = []  # of the gradients of slices that were summed so far, in order
        self.plan: list[Kinds] | None = None  # the same, traced with an unknown number of rows; None: not done yet
        self.own_step = own_step  # the model's: gradients are summed where it takes them, whatever it does with them then
        self.whole: dict[int, tf.Tensor] = {}  # gradients that are sums over all replicas, by their id
        self.metrics, self.whole_results = metrics, whole_results
        self.results: dict[int, tuple[keras.Metric, str | None, tf.Tensor]] = {}  # of metrics, in this step: by their id
        self.logged: dict[str, tuple[keras.Metric, str | None] | None] = {}  # each log: which result it is, if it is one
        self.state_began_with: set[int] = set()
        self.before: dict[int, tf.Tensor] = {}  # the step: what metrics held, by the id of their variable
        self._written: dict[int, keras.Variable] = {}

    def nothing_updated(self) -> None:
        """Raises `UserError` where a step of a worker computes again after an update, which the servers do at its end."""
        if self.taken:
            support.refuse(support.SEVERAL_UPDATES, "ParameterServer")

    def share(self, dtype) -> tf.Tensor:
        return tf.cast(self.rows / self.total, dtype)

    @contextlib.contextmanager
    def computing(self):
        """Inside, Keras computes for this replica: on its copies of all variables, with batch normalisation over all."""
        token = _current.set(self)
        layers = batch_norm.layers_of(self.model) if self.count > 1 else []
        try:
            epsilon = keras.backend.epsilon()
            with self.components, batch_norm.statistics(layers, self._counts, self._sum_for_batch_norm, epsilon):
                yield
        finally:
            _current.reset(token)

    def _counts(self, layer, inputs) -> tf.Tensor:
        """Whether rows count: all or none, so that inputs may have been reshaped before."""
        return tf.fill([tf.shape(inputs)[0]], self.rows > 0)

    def _sum_for_batch_norm(self, tensor: tf.Tensor) -> tf.Tensor:
        """With the gradient in terms of this replica's loss: others' losses count by their shares."""

        @tf.custom_gradient
        def total(tensor):
            def gradient(upstream):
                mine = tf.where(self.rows > 0, upstream * tf.cast(self.rows, upstream.dtype), tf.zeros_like(upstream))
                return self.sum([mine])[0] / tf.cast(tf.maximum(self.rows, 1), upstream.dtype)

            return self.sum([tensor])[0], gradient

        return total(tensor)

    def note_written(self, variable: keras.Variable) -> None:
        if self.count > 1 and variable.aggregation == "sum" and not self.components.holds(variable):
            raise UserError(
                f"fit: expected metrics that a step updates to be attributes of the model, found {variable.path}, which is "
                "of none; without that several replicas cannot add it up"
            )
        self._written[id(variable)] = variable

    # ---- metrics and logs ----

    def result(self, stock, metric: keras.Metric):
        """A metric's result: of this replica, or, with `whole_results`, of all."""
        result = stock()
        if self.whole_results:
            state = [tf.where(self.rows > 0, v.value, self.before.get(id(v), v.value)) for v in metric.variables]
            with servers.locals_in_place(list(zip(metric.variables, self.sum(state), strict=True))):
                result = stock()
        for key, tensor in result.items() if isinstance(result, dict) else [(None, result)]:
            self.results[id(tensor)] = metric, key, tensor  # which stays alive, and so does its id
        return result

    def note_logs(self, logs) -> dict[str, Any]:
        """By name, as Keras logs them; and which of them are results of metrics, whatever their names."""
        logs = logs if isinstance(logs, dict) else {"": logs}
        for name in [name for name, value in logs.items() if isinstance(value, dict)]:
            logs = {key: value for key, value in logs.items() if key != name} | logs[name]
        found = {name: self.results.get(id(value)) for name, value in logs.items()}
        self.logged = {name: result and result[:2] for name, result in found.items()}
        state = set() if self.whole_results else self._metric_state()
        for name, value in logs.items():
            if not found[name] and tf.is_tensor(value) and graphs.reads(value, state):
                raise ComputedFromResults(name)
        return logs

    def _metric_state(self) -> set[int]:
        """Ids of what holds it: handles of variables, or, on a worker of parameter servers, the tensors it began with."""
        return self.state_began_with or {
            id(getattr(v.value, "handle", v.value)) for metric in self.metrics for v in metric.variables
        }

    # ---- gradients ----

    def begins(self, batch) -> None:
        """A step, or what of it is compiled, begins to be traced on this batch."""
        self.batch = [leaf for leaf in tf.nest.flatten(batch, expand_composites=True) if leaf is not None]
        self.kinds = []

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
        own = {id(v.value.handle) for v in self._written.values()} | self._metric_state()
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

    def gradient(self, stock, target, sources, output_gradients, *args, **kwargs):
        """What a tape gives in a step. Of a loss of each row, which a tape adds up: so that the sum by shares is right. In a
        step of the model's own: the gradient of the global batch, because of what it may do with it."""
        of_variables = [isinstance(one, (keras.Variable, tf.Variable)) for one in tf.nest.flatten(sources)]
        if all(of_variables) and tf.is_tensor(target) and self._is_of_rows(target):
            given = tf.ones_like(target) if output_gradients is None else output_gradients
            output_gradients = given / self.share(given.dtype)
        elif all(of_variables) and not tf.executing_eagerly():
            self._check_means(tf.nest.flatten(target))
        found = stock(target, sources, output_gradients, *args, **kwargs)
        if not self.own_step or not any(of_variables):
            return found
        pairs = list(zip(of_variables, tf.nest.flatten(found), strict=True))
        summed = iter(self.sum_of_gradients(*self.look_ups([g for of_variable, g in pairs if of_variable])))
        whole = [next(summed) if of_variable else g for of_variable, g in pairs]
        self.whole |= {id(_values(g)): _values(g) for (of_variable, _), g in zip(pairs, whole, strict=True) if of_variable}
        return tf.nest.pack_sequence_as(sources, whole)

    def _check_means(self, losses: list) -> None:
        for loss in losses:
            name = self._origins().sum_over_rows(loss) if tf.is_tensor(loss) else None
            if name:
                raise UserError(
                    f"fit: expected losses that are means over the rows of a batch, found a sum over them ({name}), which "
                    "several replicas would weigh as a mean; use keras.losses with reduction='sum', the loss of each row "
                    "as it is, or keras.ops.mean"
                )

    def _is_of_rows(self, target: tf.Tensor) -> bool:
        """Whether it has an entry for each row; not a number, or one for each task."""
        known = {leaf.shape[0] for leaf in self.batch if leaf.shape.rank}
        return bool(target.shape.rank) and any(size is None or size in known for size in target.shape)

    def own(self, gradients: list) -> list:
        """Those that no sum over the replicas is in, None for the others."""
        return [None if g is None or self._is_whole(_values(g)) else g for g in gradients]

    def _is_whole(self, values: tf.Tensor) -> bool:
        if id(values) in self.whole or tf.executing_eagerly():
            return bool(self.whole)
        return graphs.reads(values, set(self.whole))

    # ---- between the replicas ----

    def sum(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """Over all replicas, also in the middle of a forward pass."""
        if self.compiled:
            raise Communicates
        with self.components.suspended(self.model):
            return step.all_reduce([tf.identity(tensor) for tensor in tensors])

    def sum_of_gradients(self, kinds: Kinds, gradients: list) -> list:
        """The gradients of the global batch, from each replica's own: see `look_ups`."""
        each = itertools.chain.from_iterable(of or [None] for of in kinds)
        flat = list(zip(each, tf.nest.flatten(gradients), strict=True))
        dense = [g.values if look_up else g for look_up, g in flat if g is not None and _is_summed(look_up)]
        sparse = [g for look_up, g in flat if not _is_summed(look_up)]
        summed = iter(self._weighted_sum(dense) if dense else [])
        gathered = iter(self._gather([self._that_count(g) for g in sparse]))

        def total(look_up, gradient):
            if gradient is None or look_up is None:
                return None if gradient is None else next(summed)
            if look_up.kind == lookups.SAME:
                return tf.IndexedSlices(next(summed), gradient.indices, gradient.dense_shape)
            slices = next(gathered)
            return lookups.once_each(slices) if look_up.kind == lookups.UNIQUE else slices

        totals = iter([total(*one) for one in flat])
        return [lookups.joined([next(totals) for _ in of]) if of else next(totals) for of in kinds]

    def _weighted_sum(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """Over all replicas, by their shares. Its gradient is of that form too: losses of all count by their shares."""
        if not self.own_step:
            return self.sum([self._weighted(tensor) for tensor in tensors])

        @tf.custom_gradient
        def total(*tensors):
            def gradient(*upstream):
                return self.sum([self._weighted(one) for one in upstream])

            return self.sum([self._weighted(tensor) for tensor in tensors]), gradient

        return total(*tensors)

    def _weighted(self, gradient: tf.Tensor) -> tf.Tensor:
        gradient = tf.convert_to_tensor(gradient)
        weighted = gradient * self.share(gradient.dtype)
        return tf.where(self.rows > 0, weighted, tf.zeros_like(gradient))  # without rows it may be anything

    def _that_count(self, slices: tf.IndexedSlices) -> tf.IndexedSlices:
        """Without rows there are none."""
        count = tf.where(self.rows > 0, tf.size(slices.indices), 0)
        return tf.IndexedSlices(self._weighted(slices.values)[:count], slices.indices[:count], slices.dense_shape)

    def means(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Over all rows, of what each replica has for its own."""
        floats = [tf.cast(v, v.dtype if v.dtype.is_floating else tf.float32) for v in values]
        return self.sum([self._weighted(v) for v in floats]) if values else []

    def gather_rows(self, values: tf.Tensor | tf.RaggedTensor) -> tf.Tensor | tf.RaggedTensor:
        """Of all replicas, in order: [rows, ...] of each -> [total, ...]."""
        mine = values[: self.rows]
        if isinstance(mine, tf.RaggedTensor):
            flat, *lengths = (self._one_after_another(one) for one in (mine.flat_values, *mine.nested_row_lengths()))
            return tf.RaggedTensor.from_nested_row_lengths(flat, lengths)
        return self._one_after_another(mine)

    def _one_after_another(self, mine: tf.Tensor) -> tf.Tensor:
        sent = tf.cast(mine, tf.int32) if mine.dtype == tf.bool else mine  # collectives know no bool
        with self.components.suspended(self.model):
            return tf.cast(tf.distribute.get_replica_context().all_gather(sent, axis=0), mine.dtype)

    def _gather(self, slices: list[tf.IndexedSlices]) -> list[tf.IndexedSlices]:
        """Those of all replicas, one after another."""
        if not slices:
            return []
        if self.compiled:
            raise Communicates
        with self.components.suspended(self.model):
            return tf.distribute.get_replica_context().all_reduce("SUM", slices)


# ---- what Keras' losses, metrics and optimizers do in a replica ----


def in_replica() -> bool:
    return _current.get() is not None or _alone.get()


@contextlib.contextmanager
def alone():
    """Inside, Keras leaves TensorFlow's strategy out: it updates variables where they are, and reduces nothing."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _several() -> Replica | None:
    replica = _current.get()
    return replica if replica is not None and replica.count > 1 else None


def reduce_loss(
    stock, apply_mask, values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None
) -> Any:  # fmt: skip
    """A loss whose sum over the replicas, by their shares, is Keras' loss of the global batch."""
    own = stock(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)
    replica = _several()
    if replica is None or reduction in (None, "none") or not len(getattr(values, "shape", ())):
        return own
    if reduction == "sum":
        return own / replica.share(own.dtype)
    if reduction == "mean_with_sample_weight" and (mask is not None or sample_weight is not None):
        weight = apply_mask(sample_weight, mask, dtype=own.dtype, reduction=reduction)
    elif mask is not None:
        weight = mask
    else:
        return own  # divided by a number of elements that goes with the rows
    divisor = tf.reduce_sum(tf.cast(weight, own.dtype))
    counts = tf.where(replica.rows > 0, divisor, tf.zeros_like(divisor))
    (of_all,) = replica.sum([tf.stop_gradient(counts)])
    epsilon = 0.0 if reduction == "mean_with_sample_weight" else replica.quirks.mask_epsilon
    return own * tf.math.divide_no_nan(counts + epsilon, of_all + epsilon) / replica.share(own.dtype)


def activity_loss(loss: tf.Tensor) -> tf.Tensor:
    """Of one replica's rows, so that their sum by shares is that of all rows."""
    replica = _several()
    return loss if replica is None or replica.quirks.activity_by_row else loss / replica.share(loss.dtype)


def note_written(variable: keras.Variable) -> None:
    replica = _current.get()
    if replica is not None:
        replica.note_written(variable)


def metric_result(stock, metric: keras.Metric):
    replica = _current.get()
    return stock() if replica is None else replica.result(stock, metric)


def weight_of_mean(values, sample_weight):
    """One number that stands for a replica's rows counts by its share, and the numbers of all replicas count once."""
    replica = _several()
    if replica is None or sample_weight is not None or len(getattr(values, "shape", ())):
        return sample_weight
    return replica.share(keras.backend.floatx())


def apply_gradients(stock, optimizer, gradients: list, variables) -> None:
    """Reduces first: what clips, accumulates, checks and updates then does the same on every replica."""
    replica = _current.get()
    if replica is None:
        return stock(gradients, variables)
    if replica.taken is not None:
        return replica.taken.append((optimizer, gradients, variables))
    if replica.count > 1 and not replica.reduced:
        own = replica.own(gradients)
        kinds, parts = replica.look_ups(own)
        if replica.deferred is not None:
            return replica.deferred.append((stock, kinds, parts, variables))
        summed = replica.sum_of_gradients(kinds, parts) if any(g is not None for g in own) else own
        gradients = [g if mine is None else total for g, mine, total in zip(gradients, own, summed, strict=True)]
    if replica.updates is not None:
        return replica.updates.append((optimizer, variables))
    before, replica.reduced = replica.reduced, True  # an optimizer inside of this one is given sums
    try:
        return stock(gradients, variables)
    finally:
        replica.reduced = before


def gradient_of_tape(stock, target, sources, output_gradients=None, *args, **kwargs):
    replica = _several()
    if replica is None:
        return stock(target, sources, output_gradients, *args, **kwargs)
    return replica.gradient(stock, target, sources, output_gradients, *args, **kwargs)


def apply_by_hand(stock, optimizer, gradients: list, variables) -> None:
    """An update in the scope of a strategy, outside of a step: the same on every replica, with these gradients."""
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        with alone():
            stock(gradients, variables)
        return
    variables = variables_of(optimizer) if variables is None else list(variables)
    if not optimizer.built:
        optimizer.build(variables)

    def on_replica(gradients):
        local = local_replica(strategy)
        with alone(), ComponentVariables(strategy, [*variables, *optimizer.variables], local):
            stock(gradients, variables)

    strategy.run(on_replica, args=(gradients,))


def _is_summed(look_up: lookups.LookUp | None) -> bool:
    return look_up is None or look_up.kind == lookups.SAME


def _values(gradient) -> tf.Tensor | None:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
