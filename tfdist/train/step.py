"""One replica's training step. Every line of the numerics contract is here: sum locally, reduce once, divide, check,
clip, update."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from absl import logging

from tfdist.errors import UserError
from tfdist.models.dropout import SamplePosition, sample_position
from tfdist.models.products import compiled_for_cpu
from tfdist.patches import servers
from tfdist.patches.layers import ComponentVariables
from tfdist.patches.optimizers import apply_gradients
from tfdist.strategies import devices
from tfdist.strategies.base import Batch, ReplicaStep, Strategy
from tfdist.train import batch_norm, forward_state, loss_scale
from tfdist.train.loss import Loss, combined, output_weights
from tfdist.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepOptions:
    clip_norm: float = 0.0  # clip the reduced gradient to this global norm; 0: off
    seed: int = 0  # of every dropout mask
    reduce_dtype: str = ""  # gradients cross the network in this type, "bfloat16" halves them; "": in their own
    whole_tables: bool = False  # of parameter servers: embedding tables are read as a whole, which XLA needs
    jit_compile: bool = True  # XLA for forward and backward, and for the update; never for collectives


class Replica(NamedTuple):
    """Which one computes."""

    local: int  # among those of this process
    index: int  # among all
    count: int


def make_train_step(strategy: Strategy, state: TrainState, loss: Loss, options: StepOptions) -> ReplicaStep:
    """Returns the step that `Strategy.make_steps` loops over. Call it under the strategy's scope."""
    is_on_cpu = devices.default_device().startswith("CPU")
    communicates = strategy.num_replicas > 1 and bool(state.batch_norms)
    if communicates and options.jit_compile:
        logging.info("batch normalisation over replicas communicates in the forward pass, which therefore runs without XLA")

    def step_of(local: int) -> Callable[[Batch], dict[str, tf.Tensor]]:
        replica = Replica(local, strategy.first_replica + local, strategy.num_replicas)
        components = ComponentVariables(strategy.tf_strategy, state.variables, local)
        suspended = (lambda: components.suspended(state.model)) if communicates else None

        def on_components(fn, jit_compile: bool):
            def bound(*args):
                with components, compiled_for_cpu(jit_compile and is_on_cpu):
                    return fn(*args)

            return tf.function(bound, jit_compile=True, autograph=False) if jit_compile else bound

        def forward_backward(batch: Batch, totals):
            before = [tf.identity(variable.value) for variable in state.written_by_forward]
            gradients, stats = accumulate(state, loss, batch, totals, options.seed, replica, suspended)
            if strategy.num_workers > 1:  # a worker without rows computes on zeros, where a gradient may be 0 x infinity
                gradients = [None if g is None else tf.where(stats[4] > 0, g, tf.zeros_like(g)) for g in gradients]
            written = []
            if replica.count > 1:
                written = forward_state.contributions(state.written_by_forward, before, stats[4], replica.index == 0)
            return gradients, stats, written, before

        # where the forward pass itself reduces over the replicas, a compiled function cannot hold it
        local_sums = on_components(forward_backward, options.jit_compile and not communicates)
        apply = on_components(lambda *sums: apply_sums(state, *sums, options, replica), options.jit_compile)
        # by itself: in the function that computes the gradients XLA might compute them again for this
        not_finite = on_components(lambda *sums: not_finite_here(*sums, replica), options.jit_compile)

        def train_step(batch: Batch, stop: tf.Tensor) -> dict[str, tf.Tensor]:
            totals = output_weights(loss, batch.weight)
            if totals is not None and replica.count > 1:
                (totals,) = all_reduce([totals])
            gradients, stats, written, before = local_sums(batch, totals)
            connected = [gradient for gradient in gradients if gradient is not None]
            if not connected:
                raise UserError("expected a loss that depends on the model's trainable variables, found no gradient at all")
            codes = not_finite(gradients, stats[0]) if replica.count > 1 else tf.zeros([0], stats.dtype)
            stats = tf.concat([stats, codes, tf.cast(stop, stats.dtype)[None]], 0)
            reduced = all_reduce([*connected, *written, stats], options.reduce_dtype, narrow=len(connected))
            *reduced, stats = reduced
            gradients, written = restore_gaps(reduced[: len(connected)], gradients), reduced[len(connected) :]
            return apply(gradients, stats[:-1], written, before) | {"stop": stats[-1] > 0}

        return train_step

    replicas = [step_of(local) for local in range(strategy.local_replicas())]
    return lambda batch, stop, local: replicas[local](batch, stop)


def all_reduce(tensors: list[tf.Tensor], gradient_dtype: str = "", narrow: int = 0) -> list[tf.Tensor]:
    """Sums over all replicas. One collective for each dtype, and all in one if they share it. The first `narrow` tensors
    cross the network in `gradient_dtype`, if that is given."""
    sent = [tf.cast(t, gradient_dtype) if gradient_dtype and i < narrow else t for i, t in enumerate(tensors)]
    reduced: list = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in sent):
        places = [i for i, t in enumerate(sent) if t.dtype == dtype]
        sums = tf.distribute.get_replica_context().all_reduce("SUM", [sent[i] for i in places])
        for i, total in zip(places, sums, strict=True):
            reduced[i] = tf.cast(total, tensors[i].dtype)
    return reduced


def restore_gaps(reduced: list, gradients: list) -> list:
    """Puts None back where a variable has no gradient (it does not depend on the loss, and is left alone)."""
    values = iter(reduced)
    return [None if gradient is None else next(values) for gradient in gradients]


# ---- forward and backward ----


class MicroBatch(NamedTuple):
    """Micro-batch m of a `Batch`."""

    x: Any
    y: Any
    weight: Any
    first_row: tf.Tensor
    rows: tf.Tensor
    m: Any
    block_rows: tf.Tensor


def accumulate(
    state: TrainState, loss: Loss, batch: Batch, totals, seed: int, replica: Replica, suspended=None, sources=None,
    unrolled: bool = False,
) -> tuple[list, tf.Tensor]:  # fmt: skip
    """Sums over the micro-batches: gradients (None where there is none), and stats [loss, weight, tokens, valid, rows].

    `suspended`: the forward pass communicates, inside this context. `sources`: what is differentiated, where that is not
    the variables themselves (`patches.servers.Pulled`). `unrolled`: not as a loop of the graph.
    """
    micro_batches, places = batch.first_row.shape[0], tf.nest.flatten(batch.weight)[0].shape[1]

    def micro_batch(m):
        part = tf.nest.map_structure(lambda t: t[m], (batch.x, batch.y, batch.weight, batch.first_row, batch.rows))
        part = MicroBatch(*part, m, batch.block_rows)
        with batch_norm.over_replicas(state.batch_norms, part.rows, places, suspended):
            return gradient_sums(state, loss, part, totals, seed, replica, sources)

    gradients, stats = micro_batch(0)
    if suspended or unrolled:  # a loop of the graph cannot hold the collectives
        for m in range(1, micro_batches):
            more, more_stats = micro_batch(m)
            gradients = [None if a is None else _add(a, b) for a, b in zip(gradients, more, strict=True)]
            stats += more_stats
    elif micro_batches > 1:
        connected = [gradient for gradient in gradients if gradient is not None]

        def add(m, sums, stats):
            more, more_stats = micro_batch(m)
            more = [gradient for gradient in more if gradient is not None]
            return m + 1, [a + b for a, b in zip(sums, more, strict=True)], stats + more_stats

        _, connected, stats = tf.while_loop(
            lambda m, *_: m < micro_batches, add, (1, connected, stats), maximum_iterations=micro_batches - 1,
            parallel_iterations=1,
        )  # fmt: skip
        gradients = restore_gaps(connected, gradients)
    rest = [tf.cast(batch.valid, stats.dtype), tf.cast(tf.reduce_sum(batch.rows), stats.dtype)]
    return gradients, tf.concat([stats, rest], 0)


def _add(a, b):
    return servers.add_slices([a, b]) if isinstance(a, tf.IndexedSlices) else a + b


def gradient_sums(
    state: TrainState, loss: Loss, part: MicroBatch, totals, seed: int, replica: Replica, sources=None
) -> tuple[list, tf.Tensor]:  # fmt: skip
    """One micro-batch: the gradient of the weighted loss sum, and [loss sum, weight sum, tokens]."""
    model, step = state.model, state.step.value
    set_layer_seeds(state, seed, step, part.m, replica.index)
    variables = [] if sources else [variable.value for variable in model.trainable_variables]
    with tf.GradientTape() as tape:
        if sources:
            sources.watch(tape, model.trainable_variables)
        with sample_position(SamplePosition(seed, step, part.first_row)):
            predicted = model(part.x, training=True)
        loss_sum, weight_sum, tokens = combined(loss, part.y, predicted, part.weight, totals)
        added = sum(tf.cast(tf.reduce_sum(value), loss_sum.dtype) for value in model.losses)
        if model.losses:  # weighted by this share's weight, so that the division leaves them counted once
            loss_sum += tf.where(weight_sum > 0, added, tf.zeros_like(added)) * weight_sum
        scale = loss_scale.of_a_sum(state.optimizer, part.y, part.block_rows)
        scaled = loss_sum if scale is None else loss_sum * tf.cast(scale, loss_sum.dtype)
    if sources:
        gradients = sources.gradients(tape, scaled, model.trainable_variables)
    else:
        gradients = [None if g is None else tf.convert_to_tensor(g) for g in tape.gradient(scaled, variables)]
    if scale is not None:
        gradients = [None if g is None else g / tf.cast(scale, g.dtype) for g in gradients]
    return gradients, tf.stack([loss_sum, weight_sum, tokens])


def not_finite_here(gradients: list, loss_sum: tf.Tensor, replica: Replica) -> tf.Tensor:
    """`first_not_finite` of this replica's own sums at its place among all replicas, 0 elsewhere. Sum it over them."""
    code = first_not_finite(loss_sum, gradients)
    return tf.one_hot(replica.index, replica.count, dtype=loss_sum.dtype) * tf.cast(code, loss_sum.dtype)


def first_not_finite(loss: tf.Tensor, gradients: list) -> tf.Tensor:
    """0: all finite; 1: the loss is not; 2 + i: the gradient of trainable variable i is the first that is not."""
    places = [i for i, gradient in enumerate(gradients) if gradient is not None]
    finite = tf.stack([tf.reduce_all(tf.math.is_finite(t)) for t in (loss, *(gradients[i] for i in places))])
    codes = tf.constant([1, *(2 + i for i in places)], tf.int32)
    return tf.where(tf.reduce_all(finite), 0, tf.gather(codes, tf.argmin(tf.cast(finite, tf.int32))))


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
    state: TrainState, gradients: list, stats: tf.Tensor, written: list, before: list, options: StepOptions, replica: Replica
) -> dict[str, tf.Tensor]:  # fmt: skip
    """Divide, check, clip, update. The input is reduced, so every replica does the same.

    A step without weight, or with a gradient that is not finite, changes nothing but the step count and the loss scale:
    what the forward pass wrote (moving statistics) is put back to its value `before`.
    """
    (loss_sum, weight, tokens, valid, rows), codes = tf.unstack(stats[:5]), stats[5:]
    divisor = tf.where(weight > 0, weight, tf.ones_like(weight))
    loss = loss_sum / divisor
    gradients = [None if g is None else g / tf.cast(divisor, g.dtype) for g in gradients]
    not_finite = first_not_finite(loss, gradients)
    finite = tf.equal(not_finite, 0)
    pairs = [(g, v) for g, v in zip(gradients, state.trainable, strict=True) if g is not None]
    gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]
    norm = global_norm(gradients)
    gradients = clip(gradients, norm, state.updating, options.clip_norm)
    learning_rate = tf.convert_to_tensor(state.learning_rate)
    applied = tf.logical_and(finite, weight > 0)
    apply_if(applied, state, gradients, variables, compiled=options.jit_compile)
    after = [variable.value for variable in state.written_by_forward]
    if replica.count > 1:
        after = forward_state.agreed(state.written_by_forward, before, written, rows)
    for variable, value, old in zip(state.written_by_forward, after, before, strict=True):
        variable.assign(tf.where(applied, value, old))
    loss_scale.adjust(state.optimizer, finite, counts=weight > 0)
    state.step.assign(state.step.value + tf.cast(valid > 0, tf.int64))
    where, who = tf.cast(not_finite, stats.dtype), tf.zeros([], stats.dtype)
    if replica.count > 1:  # a replica's own sums; if all of those were finite, it is the sum over them that is not
        somewhere = tf.reduce_any(codes > 0)
        first = tf.argmin(tf.where(codes > 0, codes, codes.dtype.max))  # a loss before gradients: it is the cause of others'
        where = tf.where(somewhere, tf.gather(codes, first), where)  # a slice would compile anew for each value
        who = tf.where(somewhere, tf.cast(first, stats.dtype), -1)
    outputs = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "tokens": tokens,
        "skipped": tf.logical_and(valid > 0, tf.logical_not(finite)),
        "not_finite": tf.where(finite, tf.zeros_like(where), where),
        "not_finite_replica": who,
        "valid": valid > 0,
    }
    scale = loss_scale.of(state.optimizer)
    return outputs if scale is None else outputs | {"loss_scale": scale}


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
            lambda: [apply_gradients(state.updating, gradients, variables), tf.constant(0)][1],
            lambda: tf.constant(0),
        )
        return
    changing = [*variables, *state.updating.variables]
    before = [tf.identity(variable.value) for variable in changing]
    apply_gradients(state.updating, gradients, variables)
    for variable, value in zip(changing, before, strict=True):
        variable.assign(tf.where(applied, variable.value, value))
