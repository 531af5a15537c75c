"""Exact evaluation: sums over the whole input, each element counted once whatever the batch or the replicas."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfdist import patches
from tfdist.strategies.base import Batch, ReplicaStep, Steps, Strategy
from tfdist.train.step import LossFn, all_reduce, weighted_loss

_STEPS_PER_TURN = 50


@dataclasses.dataclass(frozen=True)
class EvalResult:
    loss: float  # sum(loss x weight) / sum(weight); nats per token for a language model
    weight: float
    tokens: int  # elements with weight
    complete: bool = True  # False: a stop request cut it short

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


def make_eval_step(strategy: Strategy, model: keras.Model, loss_fn: LossFn, jit_compile: bool) -> ReplicaStep:
    """Sums of one batch, reduced over the replicas."""

    def step_of(replica: int) -> Callable[[Batch], dict[str, tf.Tensor]]:
        def local_sums(batch: Batch):
            with patches.component_variables(strategy.tf_strategy, model.variables, replica):
                x, y, weight = tf.nest.map_structure(lambda t: t[0], (batch.x, batch.y, batch.weight))
                sums = weighted_loss(loss_fn, y, model(x, training=False), weight)
                return tf.stack([*sums, tf.cast(batch.valid, sums[0].dtype)])

        local = tf.function(local_sums, jit_compile=True, autograph=False) if jit_compile else local_sums

        def eval_step(batch: Batch, stop: tf.Tensor) -> dict[str, tf.Tensor]:
            sums = local(batch)
            (sums,) = all_reduce([tf.concat([sums, tf.cast(stop, sums.dtype)[None]], 0)])
            loss_sum, weight, tokens, valid, stopped = tf.unstack(sums)
            return {"loss_sum": loss_sum, "weight": weight, "tokens": tokens, "valid": valid > 0, "stop": stopped > 0}

        return eval_step

    replicas = [step_of(replica) for replica in range(strategy.local_replicas())]
    return lambda batch, stop, replica: replicas[replica](batch, stop)


def run(steps: Steps, iterator: Any, max_steps: int = 0) -> EvalResult:
    """Reads the input to its end, or `max_steps` batches (0: no limit). Adds up in float64 on the host."""
    loss_sum = weight = tokens = 0.0
    taken, stopped = 0, False
    while True:
        n = min(_STEPS_PER_TURN, max_steps - taken) if max_steps else _STEPS_PER_TURN
        outputs, done = steps(iterator, n)
        loss_sum += math.fsum(outputs["loss_sum"])
        weight += math.fsum(outputs["weight"])
        tokens += math.fsum(outputs["tokens"])
        taken += done
        stopped = outputs["stop"].any()
        if stopped or done < n or taken == max_steps:
            break
    return EvalResult(loss_sum / weight if weight else math.nan, weight, round(tokens), not stopped)
