"""What is minimised: a loss per element, weighted, summed over the global batch."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from tfdist.errors import UserError

# loss(y_true, y_pred) -> one value per element, [rows, ...], not reduced
LossFn = Callable[[object, object], tf.Tensor]

# one loss, or one for each output of a model whose outputs are a dict: the sum of their weighted means is minimised
Loss = LossFn | Mapping[str, LossFn]


def weighted_loss(loss_fn: LossFn, y, predicted, weight) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """sum(loss x weight), sum(weight), number of elements with weight. Raises `ValueError` for a reduced loss."""
    loss = tf.convert_to_tensor(loss_fn(y, predicted))
    if loss.shape.rank == 0:
        raise UserError(
            "loss: expected one value per element (shape [rows, ...]), found a scalar; for a Keras loss pass "
            "reduction='none', tfdist does the reduction over the global batch"
        )
    if weight.shape.rank > loss.shape.rank:
        raise UserError(
            f"weight: expected at most the loss's shape {loss.shape}, found {weight.shape}; give one weight for each row, "
            "or for each value of the loss"
        )
    if loss.dtype.size < 4:  # sums and counts in 16 bits would be rounded
        loss = tf.cast(loss, tf.float32)
    weight = tf.cast(weight, loss.dtype)
    weight = tf.reshape(weight, tf.concat([tf.shape(weight), [1] * (loss.shape.rank - weight.shape.rank)], 0))
    weight = tf.broadcast_to(weight, tf.shape(loss))
    loss = tf.where(weight != 0, loss, tf.zeros_like(loss))  # where nothing counts, an infinite loss does not either
    tokens = tf.reduce_sum(tf.cast(weight != 0, loss.dtype))
    return tf.reduce_sum(loss * weight), tf.reduce_sum(weight), tokens


def per_output(loss: Loss, y, predicted, weight) -> dict[str, tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """`weighted_loss` of each output, by name; "" for a model with one loss. Raises `UserError` for names that differ."""
    if not isinstance(loss, Mapping):
        if not callable(loss):
            raise UserError(f"loss: expected a function or a dict of them, found {type(loss).__name__}; name the outputs")
        if isinstance(weight, Mapping):
            raise UserError(f"weight: expected one tensor for one loss, found a dict with {sorted(weight)}")
        return {"": weighted_loss(loss, y, predicted, weight)}
    for what, found in (("the model's outputs", predicted), ("y", y), ("weight", weight)):
        if isinstance(found, Mapping) and set(loss) <= set(found):
            continue
        if what == "weight" and not isinstance(found, Mapping):
            continue  # one weight for all outputs
        names = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise UserError(f"loss: expected {what} to be a dict with {sorted(loss)}, found {names}")
    return {name: weighted_loss(fn, y[name], predicted[name], _weight_of(weight, name)) for name, fn in loss.items()}


def combined(loss: Loss, y, predicted, weight, totals: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """This share's loss sum, weight sum and number of elements, such that the quotient of the sums over all shares is the
    loss of the global batch.

    Several outputs are each a mean over their own weights. Those of the global batch (`totals`, from `output_weights`)
    have to be known beforehand, so that one sum of gradients is enough for all outputs.
    """
    sums = per_output(loss, y, predicted, weight)
    if not isinstance(loss, Mapping):
        return sums[""]
    loss_sum, weight_sum, tokens = (tf.zeros_like(value) for value in next(iter(sums.values())))
    for i, (name, (one_sum, one_weight, one_tokens)) in enumerate(sums.items()):
        given = tf.cast(tf.reduce_sum(_weight_of(weight, name)), one_sum.dtype)
        elements = tf.math.divide_no_nan(one_weight, given)  # of the loss, for one of the weights
        whole = 1.0 if totals is None else tf.math.divide_no_nan(tf.reduce_sum(totals) / len(loss), totals[i])
        one_sum = tf.cast(whole, one_sum.dtype) * tf.math.divide_no_nan(one_sum, elements)
        loss_sum += tf.cast(one_sum, loss_sum.dtype)
        weight_sum += tf.cast(given / len(loss), loss_sum.dtype)
        tokens += tf.cast(one_tokens, loss_sum.dtype)
    return loss_sum, weight_sum, tokens


def output_weights(loss: Loss, weight) -> tf.Tensor | None:
    """This share's sum of the weights of each output, [outputs]; None where nobody needs it: one loss, or one weight."""
    if not isinstance(loss, Mapping) or not isinstance(weight, Mapping):
        return None
    return tf.stack([tf.reduce_sum(tf.cast(_weight_of(weight, name), tf.float64)) for name in loss])


def metric_sums(metrics: Mapping[str, LossFn], y, predicted, weight) -> dict[str, tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """`weighted_loss` of each metric, which has a value per element as a loss has. With several outputs the name
    "OUTPUT/METRIC" says which one it is of."""
    sums = {}
    for name, fn in metrics.items():
        if isinstance(predicted, Mapping):
            output = name.partition("/")[0]
            if output not in predicted:
                raise UserError(f"metrics: expected OUTPUT/METRIC with an output of {sorted(predicted)}, found {name!r}")
            if not isinstance(y, Mapping) or output not in y:
                raise UserError(f"metrics: expected y to be a dict with {output!r} for {name!r}, found {type(y).__name__}")
            sums[name] = weighted_loss(fn, y[output], predicted[output], _weight_of(weight, output))
        else:
            sums[name] = weighted_loss(fn, y, predicted, weight)
    return sums


def _weight_of(weight, name: str) -> tf.Tensor:
    return weight[name] if isinstance(weight, Mapping) else weight
