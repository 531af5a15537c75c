"""The steps of `fit`, `evaluate` and `predict` under parameter servers: the chief reads the batches, in order, and each goes
to the next free worker, which runs the model's own `train_step` on what it has pulled from the servers."""

import functools
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.cluster.link import supervisor
from tfdist.errors import UserError
from tfdist.fit.functions import metrics_of, optimizers_of
from tfdist.fit.input import Input
from tfdist.fit.logs import ComputedFromResults
from tfdist.fit.replica import Replica
from tfdist.models.dropout import SamplePosition, sample_position
from tfdist.patches import server_optimizers, servers
from tfdist.patches.fit import quirks
from tfdist.patches.layers import all_layers, state_of_layers
from tfdist.strategies.crew import Worker
from tfdist.strategies.parameter_server import ParameterServer
from tfdist.strategies.remote import fetch, here
from tfdist.strategies.schedule import Schedule, Task
from tfdist.train import server_step, server_updates, state

_LOOK_EVERY_S, _ABANDON_S = 0.2, 10.0


class ServerSteps:
    """The functions that `fit` calls, for one model as it was compiled and built."""

    def __init__(self, strategy: ParameterServer, model: keras.Model, input: Input):
        if strategy.parts > 1:
            raise UserError("fit: expected gradients_per_update=1 under parameter servers, found "
                            f"{strategy.parts}; use tfdist.Trainer, or MultiWorkerMirrored")  # fmt: skip
        self.strategy, self.model, self.input = strategy, model, input
        self.seed = tf.compat.v1.get_seed(0)[0] or 0
        self.quirks = quirks()
        self.jit_compile = bool(model.jit_compile) and not model.run_eagerly
        self.metrics = list({id(v): v for metric in metrics_of(model) for v in metric.variables}.values())
        self.layer_seeds = state.layer_seeds(model)
        self.layer_state = state_of_layers(all_layers(model))
        self.stop = False  # see stop_requested
        self.by_rows: tuple[keras.Variable, ...] | None = None
        self.schedule: Schedule | None = None
        self.batches: dict[int, list[tf.Tensor]] = {}  # that are not done yet
        self.seeds: dict[int, list[np.ndarray]] = {}  # of random layers, for each of them
        self.seed_change: list[np.ndarray] | None = None  # by one step
        self.totals: list[np.ndarray] | None = None  # of the metrics, while they are not on the servers
        self.others: dict[str, Any] = {}  # logs that are no results of metrics
        self.names: list[str] = []  # theirs
        self.logged: dict[str, Any] = {}  # all logs: which result of which metric each is, if it is one
        self.begun = self.done = 0  # steps

    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(int(self.strategy.stop_requested()))

    def build_optimizers(self, element_spec) -> None:
        """Those of `compile` are built with the model; others are refused when they are used."""

    # ---- what Keras calls ----

    def train_function(self) -> Callable:
        for optimizer in optimizers_of(self.model):
            _check(optimizer, self.model)
        return self._function(self._train)

    def test_function(self) -> Callable:
        return self._function(self._test)

    def predict_function(self) -> Callable:
        """(list of elements) -> the model's outputs for all their rows, in order; with `steps_per_execution` elements in a
        list, as many workers compute at once."""
        compute = tf.function(self._predict, autograph=False, reduce_retracing=True)

        def function(data: list):
            batches = [keras.tree.map_structure(_leaf, element) for element in data]
            outputs = self.strategy.run_on_workers([functools.partial(_call, compute, batch) for batch in batches])
            return outputs[0] if len(outputs) == 1 else tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *outputs)

        return function

    def _function(self, compute: Callable) -> Callable:
        """(iterator) -> the logs of all steps that are done; this one's may come later."""
        traced: dict[str, Callable] = {}

        def function(iterator):
            on_batch = not isinstance(iterator, tf.data.Iterator)
            for _ in range(1 if on_batch else self.model.steps_per_execution):
                try:
                    batch = keras.tree.map_structure(_leaf, next(iterator))
                except tf.errors.OutOfRangeError:
                    raise StopIteration from None
                spec = keras.tree.map_structure(_spec if on_batch else _spec_of_any_size, batch)
                if str(spec) not in traced:
                    traced[str(spec)] = self._trace(compute, spec)
                self._deal_out(traced[str(spec)], batch)
            if on_batch:
                self.settle()
            return self._logs()

        return function

    def _trace(self, compute: Callable, spec) -> Callable:
        def on_worker(batch, step, seeds):
            return compute(batch, step, seeds)

        seeds = [tf.TensorSpec(variable.shape, variable.dtype) for variable in self.layer_seeds]
        function = tf.function(on_worker, autograph=False)
        return function.get_concrete_function(spec, tf.TensorSpec([], tf.int64), seeds)

    # ---- on the chief ----

    def _deal_out(self, function: Callable, batch) -> None:
        """Waits for a free worker. The first step runs alone: it says how random layers count."""
        if self.schedule is None:
            self._begin()
        supervisor().phase("train" if self.done else "compile", self.done)
        step = self.begun
        self.batches[step] = function, batch
        if self.seed_change is not None:
            first, counts = self.seeds[0], [np.uint64(step)] * len(self.layer_seeds)
            self.seeds[step] = [
                (value + change * count).astype(value.dtype)
                for value, change, count in zip(first, self.seed_change, counts, strict=True)
            ]
        self.begun += 1
        self.schedule.allow(self.begun)
        room = 0 if self.seed_change is None else self.strategy.num_remote_workers - 1
        while self.begun - self.done > room:
            self._take(1)
        supervisor().phase("callbacks", self.done)

    def _begin(self) -> None:
        self.begun = self.done = 0
        self.totals = [variable.numpy() for variable in self.metrics]
        self.seeds = {0: [variable.numpy() for variable in self.layer_seeds]}
        self.seed_change = None if self.layer_seeds else []
        self.schedule = Schedule(0, 1, self.strategy.max_staleness, self.strategy.crew.changed)
        self.strategy.crew.begin(self.schedule, self._run)

    def _run(self, worker: Worker, task: Task) -> Any:
        function, batch = self.batches[task.step]
        seeds = self.seeds.get(task.step, self.seeds[0])
        step, seeds = here(lambda: (tf.constant(task.step, tf.int64), [tf.constant(value) for value in seeds]))
        return fetch(function(batch, step, seeds))

    def _take(self, enough: int) -> None:
        with self.strategy.peers():
            for task, worker, (sums, others, seeds, staleness) in self.schedule.results(enough, _LOOK_EVERY_S):
                self.totals = [total + change for total, change in zip(self.totals, sums, strict=True)]
                self.others = dict(zip(self.names, others, strict=True))
                if self.seed_change is None:
                    pairs = zip(seeds, self.seeds[0], strict=True)
                    self.seed_change = [after - before for after, before in pairs]
                self.batches.pop(task.step)
                self.seeds.pop(task.step) if task.step else None
                self.done += 1
                self.strategy.count_step(worker, int(staleness))

    def settle(self) -> None:
        """Waits for all steps that run, and puts what they have counted where Keras looks for it."""
        if self.schedule is None:
            return
        while self.done < self.begun:
            self._take(1)
        self.strategy.crew.end(self.schedule)
        self.strategy.note_reruns(self.schedule)
        for variable, total in zip(self.metrics, self.totals, strict=True):
            variable.assign(total)
        if self.seed_change is not None:
            for variable, first, change in zip(self.layer_seeds, self.seeds[0], self.seed_change, strict=True):
                variable.assign((first + change * np.uint64(self.begun)).astype(first.dtype))
        self.schedule = None

    def abandon(self) -> None:
        """After an error: nothing of the steps that still run counts."""
        schedule, self.schedule = self.schedule, None
        if schedule is None:
            return
        schedule.stop()
        self.strategy.crew.end(schedule)
        until_s = time.monotonic() + _ABANDON_S
        while schedule.running and time.monotonic() < until_s:
            time.sleep(_LOOK_EVERY_S / 10)
        self.batches.clear()

    def _logs(self) -> dict[str, Any]:
        if self.schedule is None:
            return self._named()
        values = [(variable, tf.constant(total)) for variable, total in zip(self.metrics, self.totals, strict=True)]
        with servers.locals_in_place(values):
            return self._named()

    def _named(self) -> dict[str, Any]:
        """What a step logs, with the results of metrics as they are now."""
        results = {id(metric): metric.result() for metric, _ in filter(None, self.logged.values())}
        logs = {}
        for name, of in self.logged.items():
            whole = results[id(of[0])] if of else self.others[name]
            logs[name] = whole[of[1]] if of and of[1] is not None else whole
        return logs[""] if list(logs) == [""] else logs

    # ---- on a worker ----

    def _inside(self, batch, step, seeds, method: str, by_rows: tuple[keras.Variable, ...] = ()):
        """Runs the model's own method. Returns (its logs, gradients, changes of metrics and layers, seeds)."""
        model = self.model
        pulled = servers.Pulled(model.variables, by_rows)
        count = tf.constant(1)
        replica = Replica(model, pulled, 0, 0, 1, count, tf.constant(0, tf.int64), count, tf.zeros([]), self.quirks)
        replica.gradients.taken = []
        replica.logs.metrics = metrics_of(model)
        zeros = [(variable, tf.zeros(variable.shape, variable.dtype)) for variable in self.metrics]
        replica.logs.state_began_with = {id(tensor) for _, tensor in zeros}
        given = list(zip(self.layer_seeds, seeds, strict=True))
        with (
            replica.computing(), servers.locals_in_place(zeros + given), servers.pulled_values(),
            servers.tapes_of(pulled, model.trainable_variables, replica.gradients.nothing_updated),
            sample_position(SamplePosition(self.seed, step, 0)),
        ):  # fmt: skip
            before = [servers.in_place(variable).tensor for variable in self.layer_state]

            def run():
                outputs = self._noted(replica, getattr(model, method)(batch))
                gradients = [gradients for _, gradients, _ in replica.gradients.taken]
                own = [
                    [servers.in_place(variable).tensor for variable in of]
                    for of in (self.metrics, self.layer_state, self.layer_seeds)
                ]
                return outputs, gradients, *own

            run = tf.function(run, jit_compile=True, autograph=False) if self.jit_compile and not by_rows else run
            outputs, gradients, sums, after, seeds = run()
            taken = zip(replica.gradients.taken, gradients, strict=True)
            updates = [(optimizer, own, variables) for (optimizer, _, variables), own in taken]
            written = list(zip(self.layer_state, before, after, strict=True))
        self.logged = replica.logs.logged
        return outputs, updates, sums, written, seeds

    def _noted(self, replica: Replica, logs) -> dict[str, Any]:
        try:
            return replica.logs.note({} if logs is None else logs)
        except ComputedFromResults as error:
            raise UserError(
                f"fit: expected logs that are losses or results of metrics, found {error}, computed from the result of a "
                "metric, which under parameter servers the chief alone knows; make it a metric of its own"
            ) from None

    def _train(self, batch, step, seeds):
        if self.by_rows is None:
            tables = () if self.jit_compile else servers.tables(all_layers(self.model), self.model.trainable_variables)
            self.by_rows = server_step.looked_up_only(tables, lambda: self._inside(batch, step, seeds, "train_step", tables))
        counters = [servers.components(one.iterations)[0] for one in optimizers_of(self.model) if one.built]
        began_at = {counter.device + counter.name: tf.identity(counter) for counter in counters}
        logs, updates, sums, written, seeds = self._inside(batch, step, seeds, "train_step", self.by_rows)
        staleness, applied = tf.zeros([], tf.int64), tf.constant(True)
        for optimizer, gradients, variables in updates:
            variables = list(variables if variables is not None else server_optimizers.variables_of(optimizer))
            _check(optimizer, self.model)
            update = server_updates.Updates(self.strategy, optimizer, variables)
            counter = update.counter
            numbers = tf.constant([0.0, 1.0, 0.0, 1.0, 1.0], keras.backend.floatx())
            pieces = server_updates.cut(variables, gradients)
            outputs = update.apply(pieces, numbers, [], began_at[counter.device + counter.name])
            staleness = tf.maximum(staleness, tf.cast(outputs["staleness"], tf.int64))
            applied = applied & ~tf.cast(outputs["skipped"], tf.bool)
        for variable, before, after in written:
            server_updates.add_change(variable, before, after, applied)
        return sums, self._others(logs), seeds, staleness

    def _test(self, batch, step, seeds):
        logs, _, sums, _, seeds = self._inside(batch, step, seeds, "test_step")
        return sums, self._others(logs), seeds, tf.zeros([], tf.int64)

    def _predict(self, batch):
        with servers.Pulled(self.model.variables), servers.pulled_values():
            return self.model.predict_step(batch)

    def _others(self, logs: dict[str, Any]) -> list[tf.Tensor]:
        """What a `train_step` of the model's own logs besides the results of metrics: of the last batch that is done."""
        self.names = [name for name in logs if not self.logged[name]]
        return [tf.convert_to_tensor(logs[name]) for name in self.names]


def _leaf(leaf):
    if leaf is None or isinstance(leaf, tf.experimental.Optional):
        return None  # how Keras passes a weight that is not there
    return leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf)


def _spec(leaf):
    return leaf if leaf is None else tf.type_spec_from_value(leaf)


def _spec_of_any_size(leaf):
    """One function for batches of all sizes."""
    if not isinstance(leaf, tf.Tensor):
        return _spec(leaf)
    return tf.TensorSpec([None, *leaf.shape[1:]] if leaf.shape.rank else [], leaf.dtype)


def _call(function: Callable, batch):
    outputs = fetch(function(batch))
    return here(lambda: tf.nest.map_structure(tf.constant, outputs))


def _check(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> None:
    if optimizer.gradient_accumulation_steps:
        raise UserError("fit: expected no gradient_accumulation_steps under parameter servers, found "
                        f"{optimizer.gradient_accumulation_steps}: each worker's step is an update of its own")  # fmt: skip
    server_step.check(optimizer, model.trainable_variables)
