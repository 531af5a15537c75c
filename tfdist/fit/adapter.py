"""Keras `fit` under a tfdist strategy: models that are made under its scope train, evaluate and predict with the numbers of
one device, on every strategy. Nothing of Keras is changed but while one of their methods runs."""

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfdist import files
from tfdist.cluster.link import supervisor
from tfdist.errors import UserError
from tfdist.fit import callbacks, hooks
from tfdist.fit.checkpoint import Checkpoint
from tfdist.fit.functions import Steps, metrics_of
from tfdist.fit.input import Input
from tfdist.fit.replica import Replica
from tfdist.fit.server_functions import ServerSteps
from tfdist.patches import check_versions, servers
from tfdist.patches import fit as fit_patches
from tfdist.patches.layers import all_layers, batch_norm_put_back
from tfdist.strategies import base, support
from tfdist.train.signals import StopRequest

METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
SAVES = ("save", "save_weights", "export")


@contextlib.contextmanager
def models_made_here(strategy: base.Strategy):
    """Inside, each Keras model that is made gets an `Adapter`, and Keras' losses and optimizers that are called by hand do
    what they do on one device."""
    made = fit_patches.models_made(lambda model: Adapter(strategy, model), _refuse_others, ("fit", "train_on_batch"))
    with made, _IN_FORCE, fit_patches.scope_outlives_session():
        yield


def _refuse_others(model: keras.Model, name: str) -> None:
    if name not in vars(model):
        raise UserError(f"{name}: expected a model made under the strategy's scope, found one made outside: {model.name}")


class InForce:
    """What is replaced in Keras itself inside of a scope, and while any model's method runs, in any thread, however deep:
    once."""

    def __init__(self):
        self.lock, self.depth, self.stack = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self):
        with self.lock:
            if not self.depth:
                for part in (
                    fit_patches.losses_of_replicas(hooks.in_replica, hooks.reduce_loss),
                    fit_patches.losses_called(hooks.loss_of),
                    fit_patches.seeds_of_replicas(hooks.seed_generator),
                    fit_patches.functions_of_tensorflow(hooks.in_several_replicas, hooks.refuse_function),
                    fit_patches.means_of_replicas(hooks.values_of_mean),
                    fit_patches.updates_of_replicas(hooks.in_replica, hooks.apply_gradients, hooks.apply_by_hand),
                    fit_patches.gradients_of_replicas(hooks.gradient_of_tape),
                    fit_patches.writes_noted(hooks.note_written),
                    batch_norm_put_back(),
                ):
                    self.stack.enter_context(part)
            self.depth += 1

    def __exit__(self, *_):
        with self.lock:
            self.depth -= 1
            if not self.depth:
                self.stack.close()


_IN_FORCE = InForce()


class Call(NamedTuple):
    """The arguments of a method, by name, also where a model's own takes some as `**kwargs`."""

    name: str
    bound: inspect.BoundArguments

    def get(self, argument: str) -> Any:
        return self._place(argument).get(argument)

    def set(self, argument: str, value: Any) -> None:
        self._place(argument)[argument] = value

    def _place(self, argument: str) -> dict[str, Any]:
        parameters = self.bound.signature.parameters
        rest = [name for name, one in parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD]
        if argument in parameters:
            return self.bound.arguments
        return self.bound.arguments.setdefault(rest[0], {}) if rest and self.name in ("fit", "evaluate", "predict") else {}


class Adapter:
    """Of one model: puts itself in front of its methods."""

    def __init__(self, strategy: base.Strategy, model: keras.Model):
        self.strategy, self.model = strategy, model
        self.input = Input(strategy)
        self.steps: dict[str, Steps] = {}  # by "train", "test", "predict"
        self.checkpoint: Checkpoint | None = None  # of the `fit` that runs
        self.runs = False
        own = {name: self._in_front_of(name) for name in METHODS} | {name: self._whole(name) for name in SAVES[:2]}
        fit_patches.own_methods(model, **own, compile=self._compile)

    def _in_front_of(self, name: str) -> Callable:
        @functools.wraps(getattr(type(self.model), name))
        def method(*args, **kwargs):
            stock = getattr(type(self.model), name)
            call = Call(name, inspect.signature(stock).bind(self.model, *args, **kwargs))
            if not self.strategy.is_chief:
                call.set("verbose", 0)
            if self.runs:  # `fit` calls `evaluate`
                return stock(*call.bound.args, **call.bound.kwargs)
            check_versions(name)
            self.runs = True
            try:
                with _IN_FORCE, self._parts(), self._prepared(call):
                    return stock(*call.bound.args, **call.bound.kwargs)
            except BaseException:
                for steps in self.steps.values() if self.strategy.num_servers else ():
                    steps.abandon()
                raise
            finally:
                self.runs = False
                fit_patches.start_at_epoch(self.model, 0)
                supervisor().phase("build")  # what a program does between its calls has no limit

        return method

    @contextlib.contextmanager
    def _parts(self) -> Iterator[None]:
        alone = hooks.alone() if self.strategy.num_servers else contextlib.nullcontext()
        make = {f"make_{name}_function": functools.partial(self._make, name) for name in ("train", "test", "predict")}
        layers = all_layers(self.model)
        with (
            fit_patches.fit_parts(self.model, self.input, self._build, **make, **self._waiting()),
            fit_patches.activity_of_replicas(layers, hooks.activity_loss),
            self._metrics(),
            alone,
        ):
            yield

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[None]:
        """The results of metrics, also of those that are made when the model is built: see `_make`."""
        with contextlib.ExitStack() as self.results:
            yield

    def _waiting(self) -> dict[str, Callable]:
        """Under parameter servers the results of metrics wait for the steps that still run."""
        if not self.strategy.num_servers:
            return {}

        def wait():
            for steps in self.steps.values():
                steps.settle()

        return servers.results_after(self.model, wait)

    # ---- the arguments of a call ----

    @contextlib.contextmanager
    def _prepared(self, call: "Call") -> Iterator[None]:
        for data in ("x", "validation_data"):
            self._check_data(call.name, call.get(data))
        self.input.batch = call.get("x") if call.name == "predict_on_batch" else None
        if not self.strategy.is_chief:
            nothing = lambda *args, **kwargs: None  # noqa: E731
            silent = fit_patches.methods_inside(self.model, **dict.fromkeys(SAVES, nothing))
        else:
            silent = contextlib.nullcontext()
        with silent:
            given = call.get("callbacks")
            if call.name != "fit" or isinstance(given, keras.callbacks.CallbackList):
                yield
                return
            given = tf.nest.flatten(given or [])
            checkpoints = [one for one in given if isinstance(one, Checkpoint)]
            if len(checkpoints) > 1:
                raise UserError(f"fit: expected one tfdist.fit.Checkpoint, found {len(checkpoints)}")
            others = [one for one in given if one not in checkpoints]
            if self.strategy.num_servers:
                self._refuse_on_servers(given)
            call.set("callbacks", callbacks.of_this_worker(self.strategy, others, checkpoints))
            if not checkpoints:
                yield
                return
            (self.checkpoint,) = checkpoints
            stop = StopRequest(self.strategy.request_stop)
            try:
                with stop.installed(), fit_patches.results_of_an_epoch(self.model):
                    if "train" in self.steps:
                        self.steps["train"].stop = False
                    epochs = call.get("initial_epoch") or 0, call.get("epochs") or 1
                    self.checkpoint.begin(self.strategy, others, self._stop_requested, stop, *epochs)
                    yield
            finally:
                self.checkpoint = None
                self.strategy.request_stop(False)

    def _refuse_on_servers(self, given: list[keras.callbacks.Callback]) -> None:
        for one in given:
            if isinstance(one, (keras.callbacks.SwapEMAWeights, Checkpoint)):
                support.refuse(support.OF_FIT_NOT_ON_SERVERS, type(self.strategy).__name__)

    def _stop_requested(self) -> bool:
        return "train" in self.steps and self.steps["train"].stop_requested()

    def _check_data(self, name: str, data: Any) -> None:
        if isinstance(data, tf.distribute.DistributedDataset):
            raise UserError(
                f"{name}: expected a tf.data.Dataset of global batches, found one that is distributed already; pass the "
                "dataset itself, tfdist gives each replica its rows"
            )
        several = self.strategy.num_workers > 1 and data is not None
        known = (tf.data.Dataset, dict, list, tuple)
        if several and not isinstance(data, known) and not hasattr(data, "__array__") and not tf.is_tensor(data):
            try:
                support.refuse(support.GENERATORS, type(self.strategy).__name__)
            except UserError as error:
                raise UserError(
                    f"{name}: expected arrays or a tf.data.Dataset, found a {type(data).__name__}: {error}"
                ) from None

    # ---- what `fit` asks for while it runs ----

    def _build(self, stock: Callable, iterator: Any = None, data_batch: Any = None) -> None:
        """Makes the variables of model, metrics and optimizer, from shapes and types alone."""
        batch = self.input.symbolic(data_batch)
        scope = self.strategy.scope() if self.strategy.num_servers else contextlib.nullcontext()
        with fit_patches.strategy_of(self.model, self.strategy.tf_strategy), scope:
            try:
                stock(data_batch=batch)
            except RuntimeError as error:
                if "Unable to automatically build" in str(error):
                    self._build_by_tracing(batch)
                elif "Mixing different" in str(error):
                    raise UserError(
                        "fit: expected an optimizer made under the strategy's scope (`with strategy.scope():`), found one "
                        "made outside; make it there, or give compile its name"
                    ) from error
                else:
                    raise
        if self.checkpoint is not None and not self.checkpoint.begun:
            self._make("train")
            self.steps["train"].build_optimizers(self.input.spec)
            self.checkpoint.restore(self.model, iterator)

    def _build_by_tracing(self, batch) -> None:
        """Makes the variables of a model, and of its optimizers, that its steps alone know: it has no `call`, or one that
        Keras cannot follow."""
        spec = tf.nest.map_structure(lambda leaf: leaf if leaf is None else tf.TensorSpec(leaf.shape, leaf.dtype), batch)
        one = tf.constant(1)
        first = Replica(
            self.model,
            contextlib.nullcontext(),
            0,
            0,
            1,
            one,
            tf.constant(0, tf.int64),
            one,
            tf.zeros([]),
            fit_patches.quirks(),
        )
        first.gradients.updates = []
        step = tf.function(lambda data: self.model.train_step(data), autograph=False)
        with self.strategy.scope(), first.computing(), fit_patches.made_by_tracing():
            step.get_concrete_function(spec)
            for optimizer, variables in first.gradients.updates:
                if not optimizer.built:
                    optimizer.build(variables)

    def _make(self, name: str, force: bool = False) -> Callable:
        methods = {"result": hooks.metric_result, "update_state": hooks.update_metric}
        self.results.enter_context(fit_patches.metrics_of_replicas(metrics_of(self.model), **methods))
        function = getattr(self.model, f"{name}_function")
        if function is None or force:
            if not self.model.built and type(self.model).call is not keras.Model.call:
                with self.strategy.scope():
                    self.model(self.input.symbolic_x())
            kind = ServerSteps if self.strategy.num_servers else Steps
            self.steps[name] = kind(self.strategy, self.model, self.input)
            function = getattr(self.steps[name], f"{name}_function")()
            setattr(self.model, f"{name}_function", function)
        return function

    def _compile(self, *args, **kwargs):
        with self.strategy.scope():  # an optimizer that is given by name is made here
            return type(self.model).compile(self.model, *args, **kwargs)

    # ---- saving ----

    def _whole(self, name: str) -> Callable:
        """A save that is there when it is whole, or not at all: workers that save alike cannot mix their files."""
        stock = getattr(type(self.model), name)

        @functools.wraps(stock)
        def method(filepath, *args, **kwargs):
            path = Path(os.fspath(filepath))
            plain = path.name.endswith((".keras", ".h5")) and path.parent.is_dir() and not path.is_dir()
            if "://" in str(filepath) or not plain or kwargs.get("max_shard_size") or kwargs.get("zipped") is False:
                return stock(self.model, filepath, *args, **kwargs)
            suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".weights.h5") else path.suffix
            aside = files.temporary(path.with_name(f".{path.name}"))
            aside = aside.with_name(aside.name + suffix)
            if path.exists() and (args[:1] or [kwargs.get("overwrite", True)])[0] is False:
                return stock(self.model, filepath, *args, **kwargs)  # it asks
            try:
                stock(self.model, str(aside), *args, **kwargs)
                files.sync(aside)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
            return None

        return method
