"""One replica's training step. Every line of the numerics contract is here: sum locally, reduce once, divide, check,
clip, update."""

import dataclasses
import hashlib
from collections.abc import Callable

import tensorflow as tf

from tfdist import patches
from tfdist.errors import UserError
from tfdist.models.dropout import SamplePosition, sample_position
from tfdist.strategies.base import Batch, ReplicaStep, Strategy
from tfdist.train.state import TrainState

# loss(y_true, y_pred) -> one value per element, [rows, ...], not reduced
LossFn = Callable[[object, object], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    clip_norm: float = 0.0  # clip the reduced gradient to this global norm; 0: off
    seed: int = 0  # of every dropout mask
    reduce_dtype: str = ""  # gradients cross the network in this type, "bfloat16" halves them; "": in their own
    jit_compile: bool = True  # XLA for forward and backward, and for the update; never for collectives


def make_train_step(strategy: Strategy, state: TrainState, loss_fn: LossFn, options: StepOptions) -> ReplicaStep:
    """Returns the step that `Strategy.make_steps` loops over. Call it under the strategy's scope."""

    def step_of(replica: int) -> Callable[[Batch], dict[str, tf.Tensor]]:
        def on_components(fn):
            def bound(*args):
                with patches.component_variables(strategy.tf_strategy, state.variables, replica):
                    return fn(*args)

            return tf.function(bound, jit_compile=True, autograph=False) if options.jit_compile else bound

        @on_components
        def local_sums(batch: Batch):
            before = [tf.identity(variable.value) for variable in state.written_by_forward]
            gradients, stats = accumulate(state, loss_fn, batch, options.seed, strategy.first_replica + replica)
            if strategy.num_workers > 1:  # a worker without rows computes on zeros, where a gradient may be 0 x infinity
                gradients = [None if g is None else tf.where(stats[1] > 0, g, tf.zeros_like(g)) for g in gradients]
            return gradients, stats, before

        @on_components
        def update(gradients, stats, before):
            return apply_sums(state, gradients, stats, before, options)

        def train_step(batch: Batch, stop: tf.Tensor) -> dict[str, tf.Tensor]:
            gradients, stats, before = local_sums(batch)
            connected = [gradient for gradient in gradients if gradient is not None]
            if not connected:
                raise UserError("expected a loss that depends on the model's trainable variables, found no gradient at all")
            stats = tf.concat([stats, tf.cast(stop, stats.dtype)[None]], 0)
            *reduced, stats = all_reduce([*connected, stats], options.reduce_dtype)
            return update(restore_gaps(reduced, gradients), stats[:-1], before) | {"stop": stats[-1] > 0}

        return train_step

    replicas = [step_of(replica) for replica in range(strategy.local_replicas())]
    return lambda batch, stop, replica: replicas[replica](batch, stop)


def all_reduce(tensors: list[tf.Tensor], gradient_dtype: str = "") -> list[tf.Tensor]:
    """Sums over all replicas. One collective for each dtype, and all in one if they share it; the last tensor is never
    cast."""
    narrow = [tf.cast(t, gradient_dtype) for t in tensors[:-1]] if gradient_dtype else tensors[:-1]
    narrow = [*narrow, tensors[-1]]
    reduced: list = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in narrow):
        places = [i for i, t in enumerate(narrow) if t.dtype == dtype]
        sums = tf.distribute.get_replica_context().all_reduce("SUM", [narrow[i] for i in places])
        for i, total in zip(places, sums, strict=True):
            reduced[i] = tf.cast(total, tensors[i].dtype)
    return reduced


def restore_gaps(reduced: list, gradients: list) -> list:
    """Puts None back where a variable has no gradient (it does not depend on the loss, and is left alone)."""
    values = iter(reduced)
    return [None if gradient is None else next(values) for gradient in gradients]


# ---- forward and backward ----


def accumulate(state: TrainState, loss_fn: LossFn, batch: Batch, seed: int, replica: int):
    """Sums over the micro-batches: gradients (None where there is none), and stats [loss, weight, tokens, valid]."""
    micro_batches = batch.first_row.shape[0]

    def micro_batch(m):
        part = tf.nest.map_structure(lambda t: t[m], (batch.x, batch.y, batch.weight, batch.first_row))
        return gradient_sums(state, loss_fn, *part, seed, m, replica)

    gradients, stats = micro_batch(0)
    if micro_batches > 1:
        connected = [gradient for gradient in gradients if gradient is not None]

        def add(m, sums, stats):
            more, more_stats = micro_batch(m)
            more = [gradient for gradient in more if gradient is not None]
            return m + 1, [a + b for a, b in zip(sums, more, strict=True)], stats + more_stats

        _, connected, stats = tf.while_loop(
            lambda m, *_: m < micro_batches, add, (1, connected, stats), maximum_iterations=micro_batches - 1
        )
        gradients = restore_gaps(connected, gradients)
    valid = tf.cast(batch.valid, stats.dtype)
    return gradients, tf.concat([stats, valid[None]], 0)


def gradient_sums(state: TrainState, loss_fn: LossFn, x, y, weight, first_row, seed: int, m, replica: int):
    """One micro-batch: the gradient of the weighted loss sum, and [loss sum, weight sum, tokens]."""
    model, step = state.model, state.step.value
    set_layer_seeds(state, seed, step, m, replica)
    variables = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape() as tape:
        with sample_position(SamplePosition(seed, step, first_row)):
            predicted = model(x, training=True)
        loss_sum, weight_sum, tokens = weighted_loss(loss_fn, y, predicted, weight)
        if model.losses:  # weighted by this share's weight, so that the division leaves them counted once
            loss_sum += tf.cast(tf.add_n(model.losses), loss_sum.dtype) * weight_sum
    gradients = [None if g is None else tf.convert_to_tensor(g) for g in tape.gradient(loss_sum, variables)]
    return gradients, tf.stack([loss_sum, weight_sum, tokens])


def weighted_loss(loss_fn: LossFn, y, predicted, weight) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """sum(loss x weight), sum(weight), number of elements with weight. Raises `ValueError` for a reduced loss."""
    loss = tf.convert_to_tensor(loss_fn(y, predicted))
    if loss.shape.rank == 0:
        raise UserError(
            "loss: expected one value per element (shape [rows, ...]), found a scalar; for a Keras loss pass "
            "reduction='none', tfdist does the reduction over the global batch"
        )
    if weight.shape.rank > loss.shape.rank:
        raise UserError(f"weight: expected at most the loss's shape {loss.shape}, found {weight.shape}")
    if loss.dtype.size < 4:  # sums and counts in 16 bits would be rounded
        loss = tf.cast(loss, tf.float32)
    weight = tf.cast(weight, loss.dtype)
    weight = tf.reshape(weight, tf.concat([tf.shape(weight), [1] * (loss.shape.rank - weight.shape.rank)], 0))
    weight = tf.broadcast_to(weight, tf.shape(loss))
    loss = tf.where(weight > 0, loss, tf.zeros_like(loss))  # where nothing counts, an infinite loss does not either
    tokens = tf.reduce_sum(tf.cast(weight > 0, loss.dtype))
    return tf.reduce_sum(loss * weight), tf.reduce_sum(weight), tokens


def set_layer_seeds(state: TrainState, seed: int, step, m, replica: int) -> None:
    """Stock Keras random layers draw from (seed, step, micro-batch, replica): nothing of them needs a checkpoint."""
    for index, variable in enumerate(state.layer_seeds):
        key = int.from_bytes(hashlib.sha256(f"{seed}/layer_seed/{index}".encode()).digest()[:8], "little")
        counter = tf.stack([tf.cast(step, tf.uint64), tf.cast(m, tf.uint64) + tf.constant(replica << 32, tf.uint64)])
        words = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[2], key=tf.constant([key], tf.uint64), counter=counter, alg=1, dtype=tf.uint32
        )
        variable.assign(words)


# ---- update ----


def apply_sums(
    state: TrainState, gradients: list, stats: tf.Tensor, before: list, options: StepOptions
) -> dict[str, tf.Tensor]:  # fmt: skip
    """Divide, check, clip, update. The input is reduced, so every replica does the same.

    A step without weight, or with a gradient that is not finite, changes nothing but the step count: what the forward
    pass wrote (moving statistics) is put back to its value `before`.
    """
    loss_sum, weight, tokens, valid = tf.unstack(stats)
    divisor = tf.where(weight > 0, weight, tf.ones_like(weight))
    loss = loss_sum / divisor
    pairs = [(g / tf.cast(divisor, g.dtype), v) for g, v in zip(gradients, state.trainable, strict=True) if g is not None]
    gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(t)) for t in (loss, *gradients)])
    norm = global_norm(gradients)
    gradients = clip(gradients, norm, state.optimizer, options.clip_norm)
    learning_rate = tf.convert_to_tensor(state.optimizer.learning_rate)
    applied = tf.logical_and(finite, weight > 0)
    apply_if(applied, state, gradients, variables, compiled=options.jit_compile)
    for variable, value in zip(state.written_by_forward, before, strict=True):
        variable.assign(tf.where(applied, variable.value, value))
    state.step.assign(state.step.value + tf.cast(valid > 0, tf.int64))
    return {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "tokens": tokens,
        "skipped": tf.logical_and(valid > 0, tf.logical_not(finite)),
        "valid": valid > 0,
    }


def global_norm(gradients: list) -> tf.Tensor:
    wide = tf.float64 if any(g.dtype == tf.float64 for g in gradients) else tf.float32
    return tf.sqrt(tf.add_n([tf.cast(tf.reduce_sum(tf.square(tf.cast(g, _at_least_32(g)))), wide) for g in gradients]))


def _at_least_32(gradient: tf.Tensor) -> tf.DType:
    return tf.float32 if gradient.dtype.size < 4 else gradient.dtype


def clip(gradients: list, norm: tf.Tensor, optimizer, clip_norm: float) -> list:
    """By global norm, per-variable norm or value; the optimizer's own settings mean the same as `clip_norm`."""
    clip_norm = clip_norm or optimizer.global_clipnorm
    if clip_norm:
        return [g * tf.cast(clip_norm / tf.maximum(norm, clip_norm), g.dtype) for g in gradients]
    if optimizer.clipnorm:
        return [tf.clip_by_norm(g, optimizer.clipnorm) for g in gradients]
    if optimizer.clipvalue:
        return [tf.clip_by_value(g, -optimizer.clipvalue, optimizer.clipvalue) for g in gradients]
    return gradients


def apply_if(applied: tf.Tensor, state: TrainState, gradients: list, variables: list, compiled: bool) -> None:
    """The optimizer's update, or no change at all.

    Compiled, the choice is a select that fuses into the update's own kernels (a conditional would make the device wait
    for the host); op by op a select would cost two more passes over the variables, so there it is a conditional.
    """
    if not compiled:
        tf.cond(
            applied,
            lambda: [patches.apply_gradients(state.optimizer, gradients, variables), tf.constant(0)][1],
            lambda: tf.constant(0),
        )
        return
    changing = [*variables, *state.optimizer.variables]
    before = [tf.identity(variable.value) for variable in changing]
    patches.apply_gradients(state.optimizer, gradients, variables)
    for variable, value in zip(changing, before, strict=True):
        variable.assign(tf.where(applied, variable.value, value))
