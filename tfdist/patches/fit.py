"""Keras `fit`: in force while a method of a model made under a tfdist scope runs (fit/adapter.py), undone after it."""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf


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


def scope_outlives_session():
    """Inside, `keras.backend.clear_session()` leaves TensorFlow's default graph, which holds the scope.

    What: `tf.compat.v1.reset_default_graph`. Why: after it what is made inside of the scope is made outside of it. Versions:
    Keras 3.10-3.15.
    """
    return _replaced(tf.compat.v1, reset_default_graph=lambda: None)


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

    def of_tensorflow() -> bool:
        """In a replica of `tf.distribute.Strategy.run`, of a loop of the user's own."""
        return not in_replica() and not tf.distribute.in_cross_replica_context()

    stock, scale, unscale = (
        module.reduce_weighted_values,
        module.scale_loss_for_distribution,
        module.unscale_loss_for_distribution,
    )
    replacements = {
        "reduce_weighted_values": lambda values, **kwargs: reduce(stock, module.apply_mask, values, **kwargs),
        "scale_loss_for_distribution": lambda value: scale(value) if of_tensorflow() else value,
        "unscale_loss_for_distribution": lambda value: unscale(value) if of_tensorflow() else value,
    }
    with _replaced(module, **replacements):
        yield


@contextlib.contextmanager
def means_of_replicas(weighted: Callable[[Any, Any], tuple[Any, Any]]):
    """Inside, `Mean` and `Sum` take `weighted(values, sample_weight)` for the values and weights that they are given.

    What: their `update_state`. Why: the mean of one loss of each replica (`Mean.update_state(loss)`) counts replicas alike,
    whatever their rows. Versions: Keras 3.10-3.15.
    """

    def weighing(stock):
        def update_state(self, values, sample_weight=None):
            return stock(self, *weighted(values, sample_weight))

        update_state.__module__ = stock.__module__  # it is still Keras'
        return update_state

    metrics = (keras.metrics.Mean, keras.metrics.Sum)
    with contextlib.ExitStack() as stack:
        for metric in metrics:
            stack.enter_context(_replaced(metric, update_state=weighing(vars(metric)["update_state"])))
        yield


@contextlib.contextmanager
def functions_of_tensorflow(in_replica: Callable[[], bool], refuse: Callable[[str], None]):
    """Inside, what TensorFlow's tutorials call in a replica means what it means on one device: averages are of the rows that
    are given, not divided by the number of replicas as well. `tf.gradients` in a replica is given to `refuse`.

    What: `tf.nn.compute_average_loss`, `tf.nn.scale_regularization_loss`, `tf.gradients`. Versions: TensorFlow 2.19-2.21.
    """
    average, scale, gradients = tf.nn.compute_average_loss, tf.nn.scale_regularization_loss, tf.gradients

    @functools.wraps(average)
    def compute_average_loss(per_example_loss, sample_weight=None, global_batch_size=None):
        if in_replica() and global_batch_size is None:
            global_batch_size = tf.shape(per_example_loss)[0]
        return average(per_example_loss, sample_weight, global_batch_size)

    @functools.wraps(scale)
    def scale_regularization_loss(regularization_loss):
        return tf.reduce_sum(regularization_loss) if in_replica() else scale(regularization_loss)

    @functools.wraps(gradients)
    def refusing(*args, **kwargs):
        if in_replica():
            refuse("tf.gradients")
        return gradients(*args, **kwargs)

    replaced = {"compute_average_loss": compute_average_loss, "scale_regularization_loss": scale_regularization_loss}
    with _replaced(tf.nn, **replaced), _replaced(tf, gradients=refusing):
        yield


@contextlib.contextmanager
def losses_called(call: Callable):
    """Inside, a loss object that is called is `call(stock, loss, y_true, y_pred, sample_weight)`.

    What: `keras.losses.Loss.__call__`. Why: only there are the arguments of a loss together, which one that is no sum over
    rows has to be given for the whole batch. Versions: Keras 3.10-3.15.
    """
    stock = keras.losses.Loss.__call__

    def __call__(self, y_true, y_pred, sample_weight=None):
        return call(functools.partial(stock, self), self, y_true, y_pred, sample_weight)

    with _replaced(keras.losses.Loss, __call__=__call__):
        yield


@contextlib.contextmanager
def metrics_of_replicas(metrics: list[keras.Metric], **methods: Callable):
    """Inside, a method of these, `metric.result()` for one, is `methods["result"](stock, metric)`.

    What: methods of each metric itself. Why: a result that a step logs is that of all replicas, whatever it is logged as; an
    update that is no sum over rows is one with the rows of all. Versions: Keras 3.10-3.15.
    """
    own = [metric for metric in metrics if not methods.keys() & vars(metric).keys()]  # else of a model around this one
    for metric in own:
        found = {name: functools.partial(method, getattr(metric, name), metric) for name, method in methods.items()}
        vars(metric).update(found)
    try:
        yield
    finally:
        for metric in own:
            for name in methods:
                vars(metric).pop(name, None)


@contextlib.contextmanager
def made_by_tracing():
    """Inside, a step can be traced outside of a replica for the variables that it makes: they are made at once, and tapes
    give zeros for gradients.

    What: `keras.Variable._initialize`, `tf.GradientTape.gradient`. Why: a variable that is mirrored cannot be lifted out
    of a graph, and has no handle for a tape there. Versions: Keras 3.10-3.15, TensorFlow 2.19-2.21.
    """
    stock = keras.Variable._initialize

    def initialize(self, value):
        with tf.init_scope():
            stock(self, value)

    def gradient(self, target, sources, *args, **kwargs):
        return tf.nest.map_structure(tf.zeros_like, sources)

    with _replaced(tf.GradientTape, gradient=gradient), _replaced(keras.Variable, _initialize=initialize):
        yield


@contextlib.contextmanager
def updates_of_replicas(in_replica: Callable[[], bool], apply: Callable, by_hand: Callable):
    """Inside, `optimizer.apply(gradients, variables)` in a replica is `apply(stock, optimizer, gradients, variables)`, and
    `stock` neither reduces nor leaves the replica. In the scope of a strategy, but not in a replica, it is `by_hand(...)`.

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
        def applied_by(self, grads, trainable_variables=None):
            if not in_replica() and not tf.distribute.in_cross_replica_context():
                return stock(self, grads, trainable_variables)
            chosen = apply if in_replica() else by_hand
            return chosen(lambda *sums: stock(self, *sums), self, list(grads), trainable_variables)

        return applied_by

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
def gradients_of_replicas(gradient: Callable):
    """Inside, `tape.gradient(target, sources, ...)` is `gradient(stock, target, sources, ...)`.

    What: `tf.GradientTape.gradient`, not inside of `jacobian`. Why: only there can be seen what a gradient is of, and what a
    `train_step` does with it afterwards (clipping, norms) has to be done with that of the global batch. Versions: TensorFlow
    2.19-2.21.
    """
    stock = tf.GradientTape.gradient
    # in a Jacobian, which takes many gradients of its own, or in a backward pass, where a part is computed again
    alone = contextvars.ContextVar("alone", default=False)

    def chosen(self, *args, **kwargs):
        if alone.get():
            return stock(self, *args, **kwargs)
        token = alone.set(True)
        try:
            return gradient(functools.partial(stock, self), *args, **kwargs)
        finally:
            alone.reset(token)

    def jacobian_by(stock_jacobian):
        def jacobian(self, *args, **kwargs):
            token = alone.set(True)
            try:
                return stock_jacobian(self, *args, **kwargs)
            finally:
                alone.reset(token)

        return jacobian

    jacobians = {name: jacobian_by(getattr(tf.GradientTape, name)) for name in ("jacobian", "batch_jacobian")}
    with _replaced(tf.GradientTape, gradient=chosen, **jacobians):
        yield


@contextlib.contextmanager
def writes_noted(note: Callable[[keras.Variable, Any], None]):
    """Inside, each Keras variable that is assigned is given to `note`, with its value.

    What: `keras.Variable.assign`, which all other ways to assign call. Why: which metrics a `train_step` has updated.
    Versions: Keras 3.10-3.15.
    """
    stock = keras.Variable.assign

    def assign(self, value):
        note(self, value)
        return stock(self, value)

    with _replaced(keras.Variable, assign=assign):
        yield


def is_stock(model: keras.Model, method: str) -> bool:
    """Whether a model has Keras' own method. What: the TensorFlow `Trainer` class. Versions: Keras 3.10-3.15."""
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

    return getattr(type(model), method) is getattr(TensorFlowTrainer, method)


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


def mask_of(tensor: tf.Tensor) -> tf.Tensor | None:
    """Which places of a layer's output count. What: keras/src/backend/common/masking.py. Versions: Keras 3.10-3.15."""
    from keras.src.backend import get_keras_mask

    return get_keras_mask(tensor)


def give_mask(tensor: tf.Tensor, mask: tf.Tensor) -> None:
    """See `mask_of`."""
    from keras.src.backend import set_keras_mask

    set_keras_mask(tensor, mask)


def seed_generator_of_keras() -> keras.random.SeedGenerator:
    """The one that draws seeds for random numbers of `keras.random` without a seed of their own; made now if there is none.

    What: `global_seed_generator` of keras/src/random/seed_generator.py. Versions: Keras 3.10-3.15.
    """
    from keras.src.random.seed_generator import global_seed_generator

    return global_seed_generator()


@contextlib.contextmanager
def seeds_of_replicas(chosen: Callable):
    """Inside, that generator is `chosen(stock)`.

    What, versions: as above. Why: it is one of a thread, and that of a replica's thread, made in a step, is a variable that
    a graph makes, which TensorFlow refuses.
    """
    from keras.src.random import seed_generator as module

    stock = module.global_seed_generator
    with _replaced(module, global_seed_generator=lambda: chosen(stock)):
        yield


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


def counters(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """What a callback of Keras, or one derived from it, has counted, and goes on from."""
    return {name: vars(callback)[name] for name in names_of_counters(callback) if name in vars(callback)}


def names_of_counters(callback: keras.callbacks.Callback) -> tuple[str, ...]:
    """Of those attributes.

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
            return names
    return ()
