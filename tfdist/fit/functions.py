"""The steps of `fit`, `evaluate` and `predict`: the model's own `train_step`, `test_step` and `predict_step` on every
replica, and what makes all replicas agree afterwards."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from tfdist.cluster.link import supervisor
from tfdist.errors import DataError, UserError
from tfdist.fit.gradients import RowsAreKnown
from tfdist.fit.input import OTHER_ROWS, Input
from tfdist.fit.logs import ComputedFromResults
from tfdist.fit.replica import Communicates, Replica
from tfdist.models.dropout import SamplePosition, sample_position
from tfdist.patches.fit import is_stock, quirks, seed_generator_of_keras
from tfdist.patches.layers import ComponentVariables, all_layers, metrics_of_layers, state_of_layers
from tfdist.patches.optimizers import batches_applied
from tfdist.strategies.base import Strategy
from tfdist.strategies.sync import local_replica
from tfdist.train import forward_state, state

_SEED_STRIDE = 0x9E3779B9  # odd, near 2**32 / golden ratio: seeds of replicas are far apart
_FINGERPRINT = "tfdist: fingerprint"  # among the logs of a replica, until all have agreed
_ANOTHER_BATCH = (
    "fit: expected the same batches on every worker, of which each takes its rows, found others on this one; make the "
    "dataset the same way everywhere: a seed for what is random, no shard() by worker"
)


class Steps:
    """The functions that `fit` calls, for one model as it was compiled and built."""

    def __init__(self, strategy: Strategy, model: keras.Model, input: Input):
        self.strategy, self.model, self.input = strategy, model, input
        self.seed = tf.compat.v1.get_seed(0)[0] or 0  # that of tf.random.set_seed, for tfdist's own dropout
        self.tf_strategy = strategy.tf_strategy
        self.quirks = quirks()
        self.jit_compile = bool(model.jit_compile) and not model.run_eagerly
        self.metrics_of_model = metrics_of(model)
        self.metrics = _each_once([variable for metric in self.metrics_of_model for variable in metric.variables])
        self.own_step = not is_stock(model, "train_step")
        self.whole_results = bool(model.run_eagerly)  # in a step: see ComputedFromResults, which only a graph shows
        self.seed_generator: keras.random.SeedGenerator | None = None  # of what has no seed of its own
        self.layer_state = _written_by_layers(model, self.metrics)
        self.layer_seeds = [*state.layer_seeds(model), *self._seed_of_keras()]
        self._bind()
        self.stop: Any = False  # see stop_requested
        self.done = 0  # steps
        self.plan: list[tuple[list, list, set]] | None = None  # see _plan
        self.planned = strategy.num_replicas == 1  # whether a step that runs eagerly has tried to make one
        self.logged: dict[str, Any] = {}  # by the last traced step: which result of which metric each log is, if it is one

    def _bind(self) -> None:
        of_optimizers = [variable for optimizer in optimizers_of(self.model) for variable in optimizer.variables]
        variables = _each_once([*self.model.variables, *self.metrics, *of_optimizers, *self.layer_seeds])
        created_here = self.tf_strategy.extended.variable_created_in_scope
        strange = [variable.path for variable in variables if not created_here(variable.value)]
        if strange:
            raise UserError(
                "fit: expected a model, an optimizer and metrics made under the strategy's scope, found "
                f"{strange[0]} and {len(strange) - 1} more made outside"
            )
        replicas = range(self.strategy.local_replicas())
        self.components = [ComponentVariables(self.tf_strategy, variables, local) for local in replicas]

    def _seed_of_keras(self) -> list[keras.Variable]:
        """Of random numbers that a step draws without a seed of its own: every replica has one, and draws others."""
        if self.strategy.num_replicas == 1:
            return []
        with self.strategy.scope():
            self.seed_generator = seed_generator_of_keras()
        seed = self.seed_generator.state
        return [seed] if self.tf_strategy.extended.variable_created_in_scope(seed.value) else []

    def stop_requested(self) -> bool:
        """Whether, by the last step, any process was asked to stop; the same on all of them."""
        return bool(self.stop)

    def build_optimizers(self, element_spec) -> None:
        """Those that a `train_step` of the model's own uses: it alone knows for which variables."""
        unbuilt = [one for one in optimizers_of(self.model) if not one.built]
        if not unbuilt or not self.own_step:
            return
        (first, *_) = self._traced(element_spec)
        with self.strategy.scope():
            for optimizer, variables in first.gradients.updates:
                if not optimizer.built:
                    optimizer.build(variables)
        self._bind()

    def _traced(self, element_spec) -> list[Replica]:
        """The replicas of this process after a step, which is traced, not run: they know what it would update."""
        found: list[Any] = [None for _ in self.components]

        def on_replica(data):
            replica, batch = self._replica(data)
            replica.gradients.updates, found[replica.local] = [], replica
            with replica.computing():
                logs = self.model.train_step(batch)
                if self.model.run_eagerly:
                    replica.logs.note(logs)

        find = tf.function(lambda batch: self._run(on_replica, batch), autograph=False)
        find.get_concrete_function(element_spec)
        return found

    def _plan(self, element_spec) -> None:
        """Finds out what the look-ups of a step have in common on several replicas: see `RowsAreKnown`."""
        replicas = self._traced(tf.nest.map_structure(_any_number_of_rows, element_spec))
        self.plan = [(one.gradients.kinds, one.gradients.targets, one.logs.added) for one in replicas]

    def _plan_eager(self, batch) -> None:
        """The same for a step that runs eagerly, where no graph shows it. What cannot be traced has no plan."""
        try:
            self._plan(tf.nest.map_structure(_spec, batch))
        except UserError:
            raise
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            logging.warning(
                "fit: on several replicas losses have to be means or sums over rows; the graph of a step shows whether they "
                "are, and this one, which runs eagerly, cannot be traced (%s)", " ".join(str(error).split())[:200],
            )  # fmt: skip
        self.planned = True

    # ---- what Keras calls ----

    def train_function(self) -> Callable:
        return self._executions(self._train)

    def test_function(self) -> Callable:
        return self._executions(self._test)

    def predict_function(self) -> Callable:
        """(list of elements) -> the model's outputs for all their rows, in order, on every worker."""

        one = self._graph(lambda batch: self._first(self._run(self._predict, batch)))

        def function(data: list):
            with self.strategy.peers():
                outputs = [self._called(one, _as_tensors(element)) for element in data]
            return outputs[0] if len(outputs) == 1 else tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *outputs)

        return function

    def _executions(self, on_replica: Callable) -> Callable:
        """(iterator) -> the logs of up to `steps_per_execution` steps; metrics are those of all rows so far."""
        num_steps = self.model.steps_per_execution

        def one(batch):
            if self.model.run_eagerly and on_replica == self._train and not self.planned:
                self._plan_eager(batch)
            return self._first(self._run(on_replica, batch))

        def agreed(logs):
            if self.strategy.num_replicas == 1:
                return logs, self.strategy.stop_requested()
            return self._first(self.tf_strategy.run(self._agree, args=(logs,)))

        def execution(iterator):
            if num_steps == 1:
                return agreed(one(next(iterator)))
            several = tf.function(one, autograph=False)  # traced once, for the first step and the others
            logs = several(next(iterator))

            def body(i, batch, _):  # the step is not in a condition: Mirrored cannot trace that
                logs = several(batch.get_value())
                return i + 1, tf.cond(i + 1 < num_steps, iterator.get_next_as_optional, lambda: batch), logs

            _, _, logs = tf.while_loop(
                lambda i, batch, _: tf.logical_and(i < num_steps, batch.has_value()),
                body,
                (1, iterator.get_next_as_optional(), logs),
                parallel_iterations=1,
            )
            return agreed(logs)

        def eager_execution(iterator):
            logs = None
            for _ in range(num_steps):
                with contextlib.suppress(StopIteration):
                    logs = one(next(iterator))
            if logs is None:
                raise StopIteration
            return agreed(logs)

        execution = eager_execution if self.model.run_eagerly else self._graph(execution)
        on_batch = self._graph(lambda batch: agreed(one(batch)))

        def function(iterator):
            with self.strategy.peers():
                if isinstance(iterator, tf.data.Iterator):
                    argument, steps = iterator, execution
                    self.build_optimizers(iterator.element_spec)
                else:
                    argument, steps = _as_tensors(next(iterator)), on_batch  # of train_on_batch
                    self.build_optimizers(tf.nest.map_structure(_spec, argument))
                supervisor().phase("train" if self.done else "compile", self.done)
                try:
                    logs, self.stop = self._called(steps, argument)
                except tf.errors.OutOfRangeError:
                    raise StopIteration from None
                except tf.errors.InvalidArgumentError as error:
                    if _ANOTHER_BATCH in str(error):
                        raise DataError(_ANOTHER_BATCH) from None
                    if OTHER_ROWS in str(error):
                        raise UserError(OTHER_ROWS) from None
                    raise
                finally:
                    supervisor().phase("callbacks", self.done)  # which may take their time
                self.done += num_steps
                return logs

        return function

    def _graph(self, function: Callable) -> Callable:
        if self.model.run_eagerly:
            return function
        return tf.function(function, autograph=False, reduce_retracing=True)

    def _called(self, function: Callable, argument) -> Any:
        try:
            return function(argument)
        except RowsAreKnown:
            self._plan(
                argument.element_spec if isinstance(argument, tf.data.Iterator) else tf.nest.map_structure(_spec, argument)
            )
            return self._called(function, argument)
        except ComputedFromResults as error:
            logging.info(
                "fit: %s is computed from the result of a metric, which replicas therefore add up in each step", error
            )
            self.whole_results = True
            return self._called(function, argument)
        except Communicates:
            logging.info("fit: the loss or batch normalisation communicates in the middle of a step, which runs without XLA")
            self.jit_compile = False
            return self._called(function, argument)

    def _run(self, on_replica: Callable, batch):
        return self.tf_strategy.run(on_replica, args=(self.input.lay_out(batch),))

    def _first(self, outputs):
        """Of outputs that are equal on all replicas."""
        return tf.nest.map_structure(lambda value: self.tf_strategy.experimental_local_results(value)[0], outputs)

    # ---- on a replica ----

    def _replica(self, data) -> tuple[Replica, Any]:
        parts, rows, first_rows, total, fingerprint = data
        local = local_replica(self.tf_strategy)
        replica = Replica(
            self.model, self.components[local], local, self.strategy.first_replica + local, self.strategy.num_replicas,
            rows[local], first_rows[local], total, fingerprint, self.quirks, self.metrics_of_model, self.whole_results,
            self.own_step,
        )  # fmt: skip
        replica.seed_generator = self.seed_generator
        batch = tf.nest.map_structure(_without_optional, parts[local])
        replica.gradients.begin(batch)
        if self.plan is not None:
            replica.gradients.plan, replica.gradients.planned_targets, replica.logs.added = self.plan[local]
        return replica, batch

    def _train(self, data):
        replica, batch = self._replica(data)
        optimizer = self.model.optimizer
        with replica.computing(), self._own_seeds(replica), self._rows_that_count(replica):
            step = batches_applied(optimizer) if optimizer is not None else tf.zeros([], tf.int64)
            with sample_position(SamplePosition(self.seed, step, replica.first_row)):
                if replica.count > 1 and self.jit_compile:
                    logs = self._train_in_two(replica, batch)
                else:
                    logs = self._compiled(replica, self._logging(replica, self.model.train_step))(batch)
            return self._logs(replica, logs)

    def _logging(self, replica: Replica, step: Callable) -> Callable:
        """A step that notes what it logs, where the tensors are those that it has made."""
        return step if replica.count == 1 else lambda batch: replica.logs.note(step(batch))

    def _train_in_two(self, replica: Replica, batch):
        """XLA before and after the reduction of the gradients, which it cannot hold."""
        if not is_stock(self.model, "train_step"):
            logging.log_first_n(logging.INFO, "fit: a train_step of one's own runs without XLA on several replicas", 1)
            return self._logging(replica, self.model.train_step)(batch)
        updates = replica.gradients.deferred = []

        def forward_backward(batch):
            updates.clear()
            replica.gradients.begin(batch)
            logs = replica.logs.note(self.model.train_step(batch))
            return logs, [gradients for _, _, gradients, _ in updates]

        logs, gradients = self._compiled(replica, forward_backward)(batch)
        replica.gradients.deferred = None
        for (apply, kinds, _, variables), own in zip(updates, gradients, strict=True):
            summed = replica.gradients.sum(kinds, own)
            replica.gradients.reduced = True
            self._compiled(replica, lambda sums, apply=apply, variables=variables: apply(sums, variables))(summed)
            replica.gradients.reduced = False
        return logs

    def _test(self, data):
        replica, batch = self._replica(data)
        with replica.computing(), self._rows_that_count(replica):
            return self._logs(replica, self._compiled(replica, self._logging(replica, self.model.test_step))(batch))

    def _predict(self, data):
        replica, batch = self._replica(data)
        with replica.computing():
            outputs = self._compiled(replica, self.model.predict_step)(batch)
            return outputs if replica.count == 1 else tf.nest.map_structure(replica.gather_rows, outputs)

    def _compiled(self, replica: Replica, function: Callable) -> Callable:
        if not self.jit_compile:
            return function

        def traced(*args):
            replica.compiled = replica.count > 1
            try:
                return function(*args)
            finally:
                replica.compiled = False

        return tf.function(traced, jit_compile=True, autograph=False, reduce_retracing=True)

    @contextlib.contextmanager
    def _own_seeds(self, replica: Replica):
        """Random layers draw differently on each replica; their states stay equal on all of them."""
        if replica.count == 1:
            yield
            return
        before = [tf.identity(seed.value) for seed in self.layer_seeds]
        for seed, value in zip(self.layer_seeds, before, strict=True):
            own = tf.cast((replica.index * _SEED_STRIDE) % 2**32, value.dtype)
            seed.assign(tf.stack([value[0] + own, value[1]]))
        graph = tf.compat.v1.get_default_graph()
        of_graph = None if tf.executing_eagerly() else graph.seed
        if of_graph is not None:  # that of `tf.random` ops, which all workers have set alike
            graph.seed = (of_graph + replica.index * _SEED_STRIDE) % 2**31
        yield
        if of_graph is not None:
            graph.seed = of_graph
        for seed, value in zip(self.layer_seeds, before, strict=True):
            seed.assign(tf.stack([value[0], seed.value[1]]))

    @contextlib.contextmanager
    def _rows_that_count(self, replica: Replica):
        """What a step on a row that does not count has written is taken back; what layers have written is agreed upon."""
        if replica.count == 1:
            yield
            return
        written = [*self.metrics, *self.layer_state]
        before = [tf.identity(variable.value) for variable in written]
        replica.logs.before = {id(variable): value for variable, value in zip(written, before, strict=True)}
        replica.in_step = True
        yield
        replica.in_step = False
        for variable, value in zip(written, before, strict=True):
            if id(variable) not in replica.whole.written:
                variable.assign(tf.where(replica.rows > 0, variable.value, value))
        if self.layer_state:
            starts = before[len(self.metrics) :]
            self._agree_on(replica, self.layer_state, starts, replica.rows)

    def _agree_on(self, replica: Replica, variables: list, starts: list, rows: tf.Tensor, stop=0) -> tf.Tensor:
        """Returns how many replicas were asked to `stop`."""
        parts = forward_state.contributions(variables, starts, rows, replica.index == 0)
        dtype = parts[0].dtype if parts else tf.float32
        numbers = [tf.cast(number, dtype) for number in (rows, stop, replica.fingerprint)]
        *sums, numbers = replica.sum([*parts, tf.stack(numbers)])
        total_rows, stop, fingerprints = tf.unstack(numbers)
        if self.strategy.num_workers > 1:
            apart = tf.abs(fingerprints / replica.count - tf.cast(replica.fingerprint, dtype))
            with tf.control_dependencies([tf.debugging.Assert(apart < 0.25, [_ANOTHER_BATCH])]):
                stop = tf.identity(stop)
        values = forward_state.agreed(variables, starts, sums, total_rows)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return stop

    def _logs(self, replica: Replica, logs):
        """What is not the result of a metric is the mean over all rows; the results come with `_agree`."""
        if replica.count == 1:
            return logs
        self.logged = replica.logs.logged
        others = {name: tf.convert_to_tensor(value) for name, value in logs.items() if not self.logged[name]}
        share = replica.share(tf.float64)
        others |= {name: tf.cast(others[name], share.dtype) / share for name in replica.logs.added}
        means = replica.means(list(others.values()))
        return dict(zip(others, means, strict=True)) | {_FINGERPRINT: replica.fingerprint}

    def _agree(self, others: dict):
        """Metrics add up over the replicas, and Keras reads their sum: from then on the first replica has all of it."""
        local = local_replica(self.tf_strategy)
        replica = Replica(
            self.model, self.components[local], local, self.strategy.first_replica + local, self.strategy.num_replicas,
            tf.constant(1), tf.constant(0), tf.constant(self.strategy.num_replicas), others.pop(_FINGERPRINT), self.quirks,
        )  # fmt: skip
        with replica.computing():
            zeros = [tf.zeros_like(v.value) for v in self.metrics]
            stop = self._agree_on(replica, self.metrics, zeros, replica.rows, self.strategy.stop_requested())
            results = {id(metric): metric.result() for metric, _ in filter(None, self.logged.values())}

            def value(name, of):
                if of is None:
                    return others[name]
                metric, key = of
                return results[id(metric)] if key is None else results[id(metric)][key]

            logs = {name: value(name, of) for name, of in self.logged.items()}
            logs = tf.nest.map_structure(lambda value: tf.identity(tf.convert_to_tensor(value)), logs)
            for variable in self.metrics if replica.index else ():
                if variable.aggregation == "sum":
                    variable.assign(tf.zeros_like(variable.value))
        return logs[""] if list(logs) == [""] else logs, stop


def _as_tensors(batch):
    def tensor(leaf):
        leaf = _without_optional(leaf)
        return leaf if leaf is None or tf.is_tensor(leaf) else tf.convert_to_tensor(leaf)

    return tf.nest.map_structure(tensor, batch)


def _spec(leaf):
    return leaf if leaf is None else tf.type_spec_from_value(leaf)


def _any_number_of_rows(spec):
    if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        shape = tf.TensorShape([None, *spec.shape[1:]])
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    return tf.SparseTensorSpec([None, *spec.shape[1:]], spec.dtype) if isinstance(spec, tf.SparseTensorSpec) else spec


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """That of `compile`, and what a model with a `train_step` of its own keeps besides."""
    kept = [getattr(model, "optimizer", None)]  # none before `compile`
    for value in vars(model).values():
        kept += value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    found = [one for one in kept if isinstance(one, keras.optimizers.Optimizer)]
    return list({id(one): one for one in found}.values())


def metrics_of(model: keras.Model) -> list[keras.Metric]:
    """Those that Keras knows, and others that the model or a layer inside of it keeps."""
    compiled = [one for metric in model.metrics for one in getattr(metric, "metrics", ())]
    return _each_once([*model.metrics, *compiled, *metrics_of_layers(all_layers(model))])


def _written_by_layers(model: keras.Model, metrics: list) -> list[keras.Variable]:
    """What layers keep. Batch normalisation over all replicas writes the same everywhere and is not in it."""
    layers = all_layers(model)
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    agree_already = {id(v) for v in [*metrics, *(v for layer in norms for v in layer.variables)]}
    return [v for v in state_of_layers(layers) if id(v) not in agree_already]


def _each_once(variables: list) -> list:
    return list({id(variable): variable for variable in variables}.values())


def _without_optional(leaf):
    return None if isinstance(leaf, tf.experimental.Optional) else leaf
