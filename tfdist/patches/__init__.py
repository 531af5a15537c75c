"""The only file that touches private names of Keras and TensorFlow. One small entry each: what, why, upstream, versions.

Nothing here runs at import; callers apply an entry where they need it.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2

from tfdist.errors import UserError

VERSIONS = {"Keras": ((3, 10), (3, 15)), "TensorFlow": ((2, 19), (2, 21))}  # which the entries are tested with


def check_versions(what: str) -> None:
    """Raises `UserError` where private names may mean something else than what an entry says."""
    for name, found in (("Keras", keras.__version__), ("TensorFlow", tf.__version__)):
        low, high = VERSIONS[name]
        if not low <= tuple(int(part) for part in found.split(".")[:2]) <= high:
            raise UserError(
                f"{what}: expected {name} {low[0]}.{low[1]} to {high[0]}.{high[1]}, whose private names it replaces, found "
                f"{found}; install one of these, or use tfdist.Trainer"
            )


class ComponentVariables:
    """Inside, each Keras variable is its component on local replica `replica`: a plain, compilable resource variable.

    What: swaps `keras.Variable._value`.
    Why: assigning to a MirroredVariable in a replica calls `merge_call`, which XLA cannot compile; on components the
    whole optimizer update compiles and costs nothing over a one-device step. Traced per replica, one thread at a time.
    Upstream: Keras has no public way to bind a variable's value. Versions: Keras 3.10-3.15.
    """

    def __init__(self, tf_strategy, variables: list[Any], replica: int):
        self._variables = list(variables)
        self._whole = [variable._value for variable in self._variables]
        self._components = [tf_strategy.experimental_local_results(value)[replica] for value in self._whole]

    def __enter__(self):
        for variable, value in zip(self._variables, self._components, strict=True):
            variable._value = value
        return self

    def __exit__(self, *_):
        for variable, value in zip(self._variables, self._whole, strict=True):
            variable._value = value

    @contextlib.contextmanager
    def suspended(self, model: keras.Layer):
        """Around a collective in the middle of a forward or backward pass: there Mirrored goes on with the thread of the
        next replica, which must find everything as this one found it, and this one again what its layers noted so far:
        losses added, tensors kept for later."""
        layers = all_layers(model)
        held = [(vars(layer), {name: (v, _copy(v)) for name, v in vars(layer).items()}) for layer in layers]
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
            for attributes, before in held:
                for name, (value, content) in before.items():
                    attributes[name] = value
                    if content is not None and not _same(value, content):
                        value.clear()
                        value.update(content) if isinstance(value, dict) else value.extend(content)


def _same(value, content) -> bool:
    pairs = zip(_flat(value), _flat(content), strict=False)
    return len(value) == len(content) and all(a is b for a, b in pairs)


def _flat(value) -> list:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _copy(value):
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else None


_moments_of_this_thread: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("moments", default=None)


@contextlib.contextmanager
def batch_norm_moments(moments: Callable):
    """Inside, every BatchNormalization takes `moments(layer, inputs, mask)` for the mean and variance of its batch.

    What: `BatchNormalization._moments`, once, by one that asks this thread: Mirrored traces its replicas in turns.
    Why: `synchronized=True` weighs replicas alike and counts padding rows, a mask turns the synchronisation off, and a layer
    made without it cannot be told later. Versions: Keras 3.10-3.15.
    """
    layer = keras.layers.BatchNormalization
    if not hasattr(layer._moments, "without_tfdist"):
        stock = layer._moments

        def chosen(self, inputs, mask):
            return (_moments_of_this_thread.get() or stock)(self, inputs, mask)

        chosen.without_tfdist = stock
        layer._moments = chosen
    token = _moments_of_this_thread.set(moments)
    try:
        yield
    finally:
        _moments_of_this_thread.reset(token)


def apply_gradients(optimizer: keras.optimizers.Optimizer, gradients, variables) -> None:
    """One optimizer update from gradients that are already reduced and clipped. Call it on component variables.

    What: `_apply_weight_decay`, `_backend_update_step`, moving averages, constraints and the iteration count, in Keras'
    order.
    Why: `Optimizer.apply` all-reduces the gradients again, clips before that reduce, and calls `merge_call`;
    `update_step` alone (public) leaves out decay, averages, the count, and what Nadam does once per update.
    Upstream: https://github.com/keras-team/keras/issues/20582. Versions: Keras 3.10-3.15.
    """
    inner = getattr(optimizer, "optimizers", None)
    if inner is not None:  # MultiOptimizer (Keras 3.15)
        of_variable = [optimizer._var_to_optimizer_idx[optimizer._var_key(variable)] for variable in variables]
        for i, one in enumerate(inner):
            mine = [place for place, index in enumerate(of_variable) if index == i]
            if mine:
                apply_gradients(one, [gradients[place] for place in mine], [variables[place] for place in mine])
        optimizer.iterations.assign_add(1)
        return
    _apply_weight_decay(optimizer, variables)
    _update_steps(optimizer, gradients, variables)
    if optimizer.use_ema:
        _update_moving_averages(optimizer)
    for variable in variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))
    optimizer.iterations.assign_add(1)


def apply_to(optimizer: keras.optimizers.Optimizer, gradient, variable) -> None:
    """`apply_gradients` for one variable, without counting it; where Keras computes, in Keras' order."""
    _apply_weight_decay(optimizer, [variable])
    _update_steps(optimizer, [gradient], [variable])
    if optimizer.use_ema:
        update_moving_average(optimizer, variable)
    if variable.constraint is not None:
        variable.assign(variable.constraint(variable))


def update_moving_average(optimizer: keras.optimizers.Optimizer, variable) -> None:
    """Of one variable, also one without gradient."""
    for one, average in moving_averages(optimizer):
        if one is not variable:
            continue
        not_first = keras.ops.cast(keras.ops.not_equal(optimizer.iterations, 0), average.dtype)
        momentum = not_first * optimizer.ema_momentum
        average.assign(momentum * average + (1 - momentum) * variable)
        if optimizer.ema_overwrite_frequency:
            due = keras.ops.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0)
            variable.assign(keras.ops.where(due, average, variable))


def _apply_weight_decay(optimizer, variables) -> None:
    """Keras' decay without its TensorFlow override, which calls `merge_call`; an optimizer's own one (Muon) is kept."""
    own = _without_tensorflow_override(optimizer, "_apply_weight_decay")
    if own is not _owners(optimizer, "_apply_weight_decay")[-1] or optimizer.weight_decay is not None:
        own._apply_weight_decay(optimizer, variables)


def _update_steps(optimizer, gradients, variables) -> None:
    """Keras' updates of all variables; an optimizer's own way of doing that (Nadam) is kept, the TensorFlow override, which
    reduces again and calls `merge_call`, is not."""
    override, plain = _owners(optimizer, "_backend_update_step")[-2:]
    reducing = override._backend_update_step
    override._backend_update_step = plain._backend_update_step
    try:
        optimizer._backend_update_step(gradients, variables, optimizer.learning_rate)
    finally:
        override._backend_update_step = reducing


def _owners(optimizer, method: str) -> list[type]:
    """The classes that define it, the most derived first. Keras' plain one is last, its TensorFlow override before it."""
    return [cls for cls in type(optimizer).__mro__ if method in vars(cls)]


def _without_tensorflow_override(optimizer, method: str) -> type:
    owners = _owners(optimizer, method)
    return next(cls for cls in owners if not cls.__module__.startswith("keras.src.backend.tensorflow"))


def _update_moving_averages(optimizer) -> None:
    optimizer._update_model_variables_moving_average(optimizer._trainable_variables)
    if optimizer.ema_overwrite_frequency:
        due = keras.ops.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0)
        for variable, average in moving_averages(optimizer):
            variable.assign(keras.ops.where(due, average, variable))


def moving_averages(optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """(variable, its average) of an optimizer with `use_ema`.

    What: `_model_variables_moving_average`. Why: no public name. Versions: Keras 3.10-3.15.
    """
    pairs = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def state_of_layers(layers: list[keras.Layer]) -> list[keras.Variable]:
    """Weights that were made as not trainable: moving statistics, counters. Not those of a frozen layer.

    What: `Layer._non_trainable_variables`. Why: `non_trainable_weights` lists frozen weights too. Versions: Keras 3.10-3.15.
    """
    found = {id(v): v for layer in layers for v in layer._non_trainable_variables}
    return list(found.values())


def all_layers(model: keras.Layer) -> list[keras.Layer]:
    """The model and every layer inside it, at any depth.

    What: `Layer._flatten_layers`. Why: public `Model.layers` lists the top level only. Versions: Keras 3.10-3.15.
    """
    return list(model._flatten_layers(include_self=True))


@contextlib.contextmanager
def worker_on_logical_cpus(num_devices: int):
    """Inside, a MultiWorkerMirroredStrategy without GPUs is made on `num_devices` logical CPU devices.

    What: `CollectiveAllReduceExtended._initialize_local_devices`. Why: on a CPU it takes one device whatever is there, so
    several replicas per worker could be tried on GPUs only. Nothing is changed for `num_devices` below 2.
    Versions: TensorFlow 2.19-2.21.
    """
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended as extended

    if num_devices < 2:
        yield
        return
    original = extended._initialize_local_devices
    try:
        extended._initialize_local_devices = lambda self, resolver, worker_device: (
            tuple(f"{worker_device}/device:CPU:{i}" for i in range(num_devices)),
            "CPU",
        )
        yield
    finally:
        extended._initialize_local_devices = original


def coordination_timeouts(members: dict[str, list[str]], register_s: float, heartbeat_s: float) -> None:
    """How long TensorFlow's coordination service waits for the members of a MultiWorkerMirroredStrategy made hereafter.

    What: `Context.configure_coordination_service`, which the strategy calls itself if nobody has. `heartbeat_s` 0: its own
    default, about 10 s. Why: it waits an hour for a member that does not register, and takes every process down 10 s
    after one froze, before a supervisor has said which. Versions: TensorFlow 2.19-2.21.
    """
    from tensorflow.python.distribute import multi_worker_util
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context
    from tensorflow.python.training.server_lib import ClusterSpec

    jobs = [coordination_config_pb2.CoordinatedJob(name=job, num_tasks=len(addresses)) for job, addresses in members.items()]
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=multi_worker_util.coordination_leader(ClusterSpec(members)),
        cluster_register_timeout_in_ms=int(register_s * 1000),
        heartbeat_timeout_in_ms=int(heartbeat_s * 1000),
        coordinated_jobs=jobs,
    )


# ---- tf.data: which transformations a dataset is made of ----


def upstream(dataset: tf.data.Dataset, later: tuple[str, ...] = ()) -> list[tuple[tf.data.Dataset, tuple[str, ...]]]:
    """A dataset and all that it reads from, each with the names of the transformations that it goes through afterwards. What
    happens inside the functions of `flat_map` and `interleave` is not seen."""
    found = [(dataset, later)]
    for before in dataset._inputs():
        found += upstream(before, (*later, type(dataset).__name__))
    return found


def shuffles_without_seed(dataset: tf.data.Dataset) -> bool:
    """Of one found by `upstream`: whether it is a shuffle that neither `seed` nor `tf.random.set_seed` fixes."""
    seeds = [tf.get_static_value(seed) for seed in (getattr(dataset, "_seed", 1), getattr(dataset, "_seed2", 1))]
    return "Shuffle" in type(dataset).__name__ and not any(seeds)


# ---- reading a range of a large file in pure TensorFlow ops ----


def mapped_file(path: str, dtype: tf.DType, size: int) -> tf.Tensor:
    """A file as a tensor [size], mapped and not read: taking a slice reads that slice. For graphs.

    What: `ImmutableConst` with an empty `_scoped_allocator`, an attribute that constant folding leaves alone.
    Why: folded, the whole file is copied, twice (20 GB of memory for one of 10 GB). `FixedLengthRecordDataset` reads a file
    from its beginning to get to a place in it, `ReadFile` all of it.
    A file that is cut short while it is mapped ends the process (SIGBUS).
    Upstream: none reported; FindConstantFoldableNodes in tensorflow/core/common_runtime/constant_folding.cc.
    Versions: TensorFlow 2.19-2.21; tests/test_data.py measures the memory.
    """
    mapped = tf.raw_ops.ImmutableConst(dtype=dtype, shape=[size], memory_region_name=path)
    nothing = attr_value_pb2.AttrValue(list=attr_value_pb2.AttrValue.ListValue(i=[]))
    mapped.op._set_attr("_scoped_allocator", nothing)
    return mapped


# ---- Keras `fit`: in force while a method of a model made under a tfdist scope runs (fit/adapter.py), undone after it ----


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any):
    """Attributes of a module, a class or a Keras layer itself (not of its class), put back afterwards."""
    attributes = vars(owner)
    before = {name: attributes[name] for name in values if name in attributes}
    layer = isinstance(owner, keras.Layer)  # its own __setattr__ would track what is set
    for name, value in values.items():
        attributes.__setitem__(name, value) if layer else setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                attributes.__setitem__(name, before[name]) if layer else setattr(owner, name, before[name])
            else:
                attributes.pop(name, None) if layer else delattr(owner, name)


@contextlib.contextmanager
def models_made(attach: Callable[[keras.Model], None], refuse: Callable[[keras.Model, str], None], methods: tuple[str, ...]):
    """Inside, every Keras model that is made is given to `attach` first, and a call of the `methods` to `refuse`.

    What: `TensorFlowTrainer.__init__`. Why: `fit` is called later, outside of the scope, on the model alone: this is where a
    model learns its strategy in stock Keras too. One that was made before would take TensorFlow's strategy of the moment.
    Versions: Keras 3.10-3.15.
    """
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

    stock = TensorFlowTrainer.__init__

    def __init__(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        attach(self)

    def refusing(name):
        stock_method = getattr(TensorFlowTrainer, name)

        @functools.wraps(stock_method)
        def method(self, *args, **kwargs):
            refuse(self, name)
            return stock_method(self, *args, **kwargs)

        return method

    with _replaced(TensorFlowTrainer, __init__=__init__, **{name: refusing(name) for name in methods}):
        yield


def own_methods(model: keras.Model, **methods: Callable) -> None:
    """Methods of this model alone, in front of those of its class. Not saved with it."""
    vars(model).update(methods)


@contextlib.contextmanager
def fit_parts(model: keras.Model, strategy: Any, build: Callable, **functions: Callable):
    """Inside, `fit` of the model asks `strategy` for its input, `build(stock, **data)` for its variables, and `functions`
    (make_train_function, ...) for its steps.

    What: `Trainer._distribute_strategy` and `_maybe_symbolic_build` of one model.
    Why: stock `fit` splits batches with TensorFlow's distributed datasets, and looks at a first batch to build the model: a
    first batch that splits unevenly crashes, and so does every one under MultiWorkerMirrored.
    Upstream: https://github.com/keras-team/keras/issues/20585. Versions: Keras 3.10-3.15.
    """
    stock = model._maybe_symbolic_build
    parts = {"_distribute_strategy": strategy, "_maybe_symbolic_build": lambda **data: build(stock, **data)}
    with _replaced(model, **parts, **functions):
        yield


@contextlib.contextmanager
def strategy_of(model: keras.Model, strategy: Any):
    """Inside, Keras takes this for the model's strategy. What: `Trainer._distribute_strategy`. Versions: Keras 3.10-3.15."""
    with _replaced(model, _distribute_strategy=strategy):
        yield


@contextlib.contextmanager
def losses_of_replicas(in_replica: Callable[[], bool], reduce: Callable):
    """Inside, a loss of values of one replica is reduced by `reduce(stock, mask_weights, values, ...)`, and not divided by
    the number of replicas.

    What: `reduce_weighted_values`, `scale_loss_for_distribution` and its inverse, of keras/src/losses/loss.py.
    Why: dividing by the number of replicas is right only where all have as much of what a loss is divided by: rows, places
    that are not masked, weights. Upstream: https://github.com/keras-team/keras/issues/19891. Versions: Keras 3.10-3.15.
    """
    from keras.src.losses import loss as module

    stock, scale, unscale = (
        module.reduce_weighted_values,
        module.scale_loss_for_distribution,
        module.unscale_loss_for_distribution,
    )
    replacements = {
        "reduce_weighted_values": lambda values, **kwargs: reduce(stock, module.apply_mask, values, **kwargs),
        "scale_loss_for_distribution": lambda value: value if in_replica() else scale(value),
        "unscale_loss_for_distribution": lambda value: value if in_replica() else unscale(value),
    }
    with _replaced(module, **replacements):
        yield


@contextlib.contextmanager
def means_of_replicas(weight: Callable[[Any, Any], Any]):
    """Inside, `Mean` takes `weight(values, sample_weight)` for the weight of what it is given.

    What: `keras.metrics.Mean.update_state`. Why: the mean of one loss of each replica (`Mean.update_state(loss)`) counts
    replicas alike, whatever their rows. Versions: Keras 3.10-3.15.
    """
    stock = keras.metrics.Mean.update_state

    def update_state(self, values, sample_weight=None):
        return stock(self, values, sample_weight=weight(values, sample_weight))

    with _replaced(keras.metrics.Mean, update_state=update_state):
        yield


@contextlib.contextmanager
def updates_of_replicas(in_replica: Callable[[], bool], apply: Callable):
    """Inside, `optimizer.apply(gradients, variables)` in a replica is `apply(stock, optimizer, gradients, variables)`, and
    `stock` neither reduces nor leaves the replica.

    What: `apply` of every Keras optimizer class that defines it; the TensorFlow overrides of weight decay, updates,
    averages and accumulation.
    Why: stock Keras clips, accumulates and checks what one replica has, then reduces; and under Mirrored its `merge_call`
    inside of a condition (accumulation, averages, loss scale) cannot be traced.
    Upstream: https://github.com/keras-team/keras/issues/20582. Versions: Keras 3.10-3.15.
    """
    from keras.src.backend.tensorflow.optimizer import TFOptimizer
    from keras.src.optimizers.base_optimizer import BaseOptimizer
    from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer

    def applied(stock):
        def chosen(self, grads, trainable_variables=None):
            if not in_replica():
                return stock(self, grads, trainable_variables)
            return apply(lambda *sums: stock(self, *sums), self, list(grads), trainable_variables)

        return chosen

    def local(name):
        override, plain = vars(TFOptimizer)[name], vars(BaseOptimizer)[name]
        return lambda self, *args: (plain if in_replica() else override)(self, *args)

    stock_loss_scaled = LossScaleOptimizer._tf_apply

    def loss_scaled(self, grads, trainable_variables=None):
        chosen = LossScaleOptimizer._common_apply if in_replica() else stock_loss_scaled
        chosen(self, grads, trainable_variables)

    overrides = (
        "_apply_weight_decay",
        "_backend_update_step",
        "_overwrite_model_variables_with_average_value",
        "_backend_increment_gradient_accumulators",
    )
    with contextlib.ExitStack() as stack:
        classes = [BaseOptimizer, LossScaleOptimizer, getattr(keras.optimizers, "MultiOptimizer", BaseOptimizer)]
        for cls in dict.fromkeys(classes):
            stack.enter_context(_replaced(cls, apply=applied(vars(cls)["apply"])))
        stack.enter_context(_replaced(TFOptimizer, **{name: local(name) for name in overrides}))
        stack.enter_context(_replaced(LossScaleOptimizer, _tf_apply=loss_scaled))
        yield


@contextlib.contextmanager
def writes_noted(note: Callable[[keras.Variable], None]):
    """Inside, each Keras variable that is assigned is given to `note`.

    What: `keras.Variable.assign`, which all other ways to assign call. Why: which metrics a `train_step` has updated.
    Versions: Keras 3.10-3.15.
    """
    stock = keras.Variable.assign

    def assign(self, value):
        note(self)
        return stock(self, value)

    with _replaced(keras.Variable, assign=assign):
        yield


def is_stock(model: keras.Model, method: str) -> bool:
    """Whether a model has Keras' own method. What: the TensorFlow `Trainer` class. Versions: Keras 3.10-3.15."""
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

    return getattr(type(model), method) is getattr(TensorFlowTrainer, method)


def batches_applied(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """How many batches an optimizer was given gradients of, int64.

    What: `BaseOptimizer._iterations`. Why: with `gradient_accumulation_steps` the public `iterations` stands still for
    several. Versions: Keras 3.10-3.15.
    """
    return tf.cast(tf.convert_to_tensor(getattr(optimizer, "inner_optimizer", optimizer)._iterations), tf.int64)


def first_epoch(model: keras.Model) -> int:
    """Where a callback has told `fit` to begin. What: `Trainer._initial_epoch`. Why: only this is read after
    `on_train_begin`; Keras' own BackupAndRestore sets it. Versions: Keras 3.10-3.15."""
    return model._initial_epoch or 0


def start_at_epoch(model: keras.Model, epoch: int) -> None:
    """See `first_epoch`."""
    model._initial_epoch = epoch or None


def on_epoch_iterator(iterator: Any, steps: Callable) -> None:
    """From now on `fit` takes its steps from `steps(stock)`, where `stock()` yields them as before.

    What: `EpochIterator._enumerate_iterator` of one `fit`. Why: to begin in the middle of an epoch, at the batch that comes
    next. Versions: Keras 3.10-3.15.
    """
    stock = iterator._enumerate_iterator
    iterator._enumerate_iterator = lambda: steps(stock)


def methods_inside(model: keras.Model, **methods: Callable):
    """Inside, this model has other methods."""
    return _replaced(model, **methods)


def results_of_an_epoch(model: keras.Model):
    """Inside, an epoch without a step has the results of the metrics as they are: `fit` goes on where all steps of an epoch
    were done, but not its end.

    What: `Trainer._get_metrics_result_or_logs`. Versions: Keras 3.10-3.15.
    """
    stock = model._get_metrics_result_or_logs
    return _replaced(model, _get_metrics_result_or_logs=lambda logs: stock(logs or model.get_metrics_result()))


class Quirks(NamedTuple):
    """What differs between versions of Keras 3.10-3.15 in the numbers of one device."""

    mask_epsilon: float  # what is added to the number of places that a mask leaves, before a loss is divided by it
    activity_by_row: bool  # whether activity regularisation is divided by the number of rows


def quirks() -> Quirks:
    """Tried out; to be called outside of a graph. What: `apply_mask` of keras/src/losses/loss.py."""
    from keras.src.losses import loss as module

    one_place = float(module.apply_mask(None, tf.ones([1], tf.float64), dtype="float64", reduction="mean")[0])
    layer = keras.layers.Activation("linear", activity_regularizer=keras.ops.sum, name="probe")
    layer(tf.ones([2, 1]))
    return Quirks(keras.backend.epsilon() if one_place < 1 else 0.0, float(layer.losses[0]) == 1.0)


@contextlib.contextmanager
def activity_of_replicas(layers: list[keras.Layer], scaled: Callable):
    """Inside, activity regularisation of a layer is `scaled(loss)`.

    What: `Layer.activity_regularizer`. Why: where it is a sum over rows (see `Quirks`), not a mean like other losses, it
    cannot be weighted by shares as they are. Versions: Keras 3.10-3.15.
    """

    def scaling(stock):
        def regularizer(output):
            return scaled(stock(output))

        regularizer.of_replicas = True
        return regularizer

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stock = getattr(layer, "activity_regularizer", None)
            if stock is not None and not hasattr(stock, "of_replicas"):  # else of a model around this one
                stack.enter_context(_replaced(layer, activity_regularizer=scaling(stock)))
        yield


@contextlib.contextmanager
def batch_norm_put_back():
    """After it, `BatchNormalization._moments` is Keras' own again, if it was before."""
    layer = keras.layers.BatchNormalization
    was_stock = not hasattr(layer._moments, "without_tfdist")
    try:
        yield
    finally:
        if was_stock and hasattr(layer._moments, "without_tfdist"):
            layer._moments = layer._moments.without_tfdist


def counters(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """What a callback of Keras, or one derived from it, has counted, and goes on from.

    What: attributes of EarlyStopping, ReduceLROnPlateau, ModelCheckpoint and SwapEMAWeights, some of them private.
    Why: Keras saves none of them. Versions: Keras 3.10-3.15.
    """
    kinds = {
        "EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
        "ReduceLROnPlateau": ("wait", "best", "cooldown_counter"),
        "ModelCheckpoint": ("best", "epochs_since_last_save", "_batches_seen_since_last_saving", "_last_batch_seen"),
        "SwapEMAWeights": ("_ema_weights_in_model",),
    }
    for kind, names in kinds.items():
        if isinstance(callback, getattr(keras.callbacks, kind)):
            return {name: vars(callback)[name] for name in names if name in vars(callback)}
    return {}
