"""Keras optimizers: updates from gradients that are already reduced, moving averages, counts."""

import keras
import tensorflow as tf


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


def moving_averages(optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """(variable, its average) of an optimizer with `use_ema`.

    What: `_model_variables_moving_average`. Why: no public name. Versions: Keras 3.10-3.15.
    """
    pairs = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def batches_applied(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """How many batches an optimizer was given gradients of, int64.

    What: `BaseOptimizer._iterations`. Why: with `gradient_accumulation_steps` the public `iterations` stands still for
    several. Versions: Keras 3.10-3.15.
    """
    return tf.cast(tf.convert_to_tensor(getattr(optimizer, "inner_optimizer", optimizer)._iterations), tf.int64)
