"""What Keras' losses, metrics, tapes and optimizers do in a replica of a step of `fit`, and by hand in a scope."""

import contextlib
import contextvars
from typing import Any

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.fit.replica import Replica, current
from tfdist.fit.rows import Of
from tfdist.fit.whole import NotShown
from tfdist.patches.layers import ComponentVariables
from tfdist.patches.server_optimizers import variables_of
from tfdist.strategies.sync import local_replica

_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def in_replica() -> bool:
    return current() is not None or _alone.get()


@contextlib.contextmanager
def alone():
    """Inside, Keras leaves TensorFlow's strategy out: it updates variables where they are, and reduces nothing."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _several() -> Replica | None:
    replica = current()
    return replica if replica is not None and replica.count > 1 and not replica.whole.everywhere else None


def seed_generator(stock) -> keras.random.SeedGenerator:
    replica = current()
    return (replica and replica.seed_generator) or stock()


def in_several_replicas() -> bool:
    return _several() is not None


def refuse_function(name: str) -> None:
    raise UserError(f"fit: expected gradients of a tf.GradientTape on several replicas, found {name}; use a tape")


def loss_of(stock, loss: keras.losses.Loss, y_true, y_pred, sample_weight=None):
    replica = _several()
    if replica is None:
        return stock(y_true, y_pred, sample_weight=sample_weight)
    return replica.whole.loss(stock, loss, y_true, y_pred, sample_weight)


def update_metric(stock, metric: keras.Metric, *args, **kwargs):
    replica = _several()
    return stock(*args, **kwargs) if replica is None else replica.whole.update(stock, metric, args, kwargs)


def reduce_loss(
    stock, apply_mask, values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None
) -> Any:  # fmt: skip
    """A loss whose sum over the replicas, by their shares, is Keras' loss of the global batch."""
    replica = _several()
    kind = Of.ROWS if replica is None else replica.whole.kind_of(values)
    if kind is not Of.ROWS and (sample_weight is not None or mask is not None):
        raise NotShown
    own = stock(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)
    if replica is None or reduction in (None, "none") or not len(getattr(values, "shape", ())):
        own = own / replica.share(own.dtype) if kind is Of.SUM else own
        return own if kind is Of.ROWS else replica.know(own, Of.MEAN)
    if reduction == "sum":
        return replica.know(own / replica.share(own.dtype), Of.MEAN)
    if reduction == "mean_with_sample_weight" and (mask is not None or sample_weight is not None):
        weight = apply_mask(sample_weight, mask, dtype=own.dtype, reduction=reduction)
    elif mask is not None:
        weight = mask
    else:
        return replica.know(own, Of.MEAN)  # divided by a number of elements that goes with the rows
    divisor = tf.reduce_sum(tf.cast(weight, own.dtype))
    counts = tf.where(replica.rows > 0, divisor, tf.zeros_like(divisor))
    (of_all,) = replica.sum([tf.stop_gradient(counts)])
    epsilon = 0.0 if reduction == "mean_with_sample_weight" else replica.quirks.mask_epsilon
    own = own * tf.math.divide_no_nan(counts + epsilon, of_all + epsilon) / replica.share(own.dtype)
    return replica.know(own, Of.MEAN)


def activity_loss(loss: tf.Tensor) -> tf.Tensor:
    """Of one replica's rows, so that their sum by shares is that of all rows."""
    replica = _several()
    return loss if replica is None or replica.quirks.activity_by_row else loss / replica.share(loss.dtype)


def note_written(variable: keras.Variable, value) -> None:
    replica = current()
    if replica is not None:
        replica.note_written(variable, value)


def metric_result(stock, metric: keras.Metric):
    replica = current()
    return stock() if replica is None else replica.logs.result(stock, metric)


def values_of_mean(values, sample_weight):
    """(values, weight). One number that stands for a replica's rows counts by its share, and those of all replicas once."""
    replica = _several()
    if replica is None:
        return values, sample_weight
    kind = replica.whole.kind_of(values)
    if kind is not Of.ROWS and sample_weight is not None:
        raise NotShown
    if sample_weight is not None or len(getattr(values, "shape", ())):
        return values, sample_weight
    share = replica.share(keras.backend.floatx())
    if tf.is_tensor(values) and not tf.executing_eagerly():
        kind = replica.of(values)
        if kind in (Of.UNKNOWN, Of.MIXED):
            raise UserError(
                f"fit: expected a metric to be given means over rows, or a value for each, found one number ({values.name}) "
                "that is something else, of which several replicas cannot add up their parts; give it y_true and y_pred in "
                "a metric of compile(metrics=...)"
            )
        if kind in (Of.SUM, Of.COUNT):
            values = tf.cast(values, share.dtype) / share
    return values, share


def apply_gradients(stock, optimizer, gradients: list, variables) -> None:
    """Reduces first: what clips, accumulates, checks and updates then does the same on every replica."""
    replica = current()
    if replica is None:
        return stock(gradients, variables)
    own = replica.gradients
    if own.taken is not None:
        return own.taken.append((optimizer, gradients, variables))
    if replica.count > 1 and not own.reduced:
        own.check_updates(gradients)
        kinds, parts = own.look_ups(own.not_summed(gradients))
        if own.deferred is not None:
            return own.deferred.append((stock, kinds, parts, variables))
        gradients = [g if total is None else total for g, total in zip(gradients, own.sum(kinds, parts), strict=True)]
    if own.updates is not None:
        return own.updates.append((optimizer, variables))
    before, own.reduced = own.reduced, True  # an optimizer inside of this one is given sums
    try:
        return stock(gradients, variables)
    finally:
        own.reduced = before


def gradient_of_tape(stock, target, sources, output_gradients=None, *args, **kwargs):
    replica = _several()
    if replica is None:
        return stock(target, sources, output_gradients, *args, **kwargs)
    return replica.gradients.of_tape(stock, target, sources, output_gradients, *args, **kwargs)


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
