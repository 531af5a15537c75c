"""Exact evaluation: sums over the whole input, each element counted once whatever the batch or the replicas."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfdist.strategies.base import Batch, ReplicaStep, Steps, Strategy
from tfdist.train.loss import Loss, LossFn, metric_sums, per_output
from tfdist.train.step import all_reduce

_STEPS_PER_TURN = 50
_SUMS = ("sum", "weight", "tokens")  # of each quantity


@dataclasses.dataclass(frozen=True)
class EvalResult:
    loss: float  # sum(loss x weight) / sum(weight), of several outputs the sum; nats per token for a language model
    weight: float
    tokens: int  # elements with weight
    complete: bool = True  # False: a stop request cut it short
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # and "OUTPUT/loss" of several outputs

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


def make_eval_step(
    strategy: Strategy, model: keras.Model, loss: Loss, jit_compile: bool, metrics: Mapping[str, LossFn] | None = None
) -> ReplicaStep:  # fmt: skip
    """Sums of one batch, reduced over the replicas. `metrics`: functions like a loss, with a value per element."""

    def step_of(local: int) -> Callable[[Batch], dict[str, tf.Tensor]]:
        names: list[str] = []  # filled while it is traced
        components = strategy.components(model.variables, local)

        def local_sums(batch: Batch):
            x, y, weight = tf.nest.map_structure(lambda t: t[0], (batch.x, batch.y, batch.weight))
            predicted = model(x, training=False)
            found = {f"loss {name}": sums for name, sums in per_output(loss, y, predicted, weight).items()}
            of_metrics = metric_sums(metrics or {}, y, predicted, weight)
            found |= {f"metric {name}": sums for name, sums in of_metrics.items()}
            names[:] = [f"{kind} {name}" for name in found for kind in _SUMS]
            dtype = next(iter(found.values()))[0].dtype
            return tf.stack([tf.cast(t, dtype) for t in (*tf.nest.flatten(list(found.values())), batch.valid)])

        def eval_step(batch: Batch, stop: tf.Tensor) -> dict[str, tf.Tensor]:
            # made anew for each graph: under parameter servers it holds that graph's tensors
            sums_of = tf.function(local_sums, jit_compile=True, autograph=False) if jit_compile else local_sums
            with components:
                sums = sums_of(batch)
            (sums,) = all_reduce([tf.concat([sums, tf.cast(stop, sums.dtype)[None]], 0)])
            *sums, valid, stopped = tf.unstack(sums)
            return dict(zip(names, sums, strict=True)) | {"valid": valid > 0, "stop": stopped > 0}

        return eval_step

    replicas = [step_of(replica) for replica in range(strategy.local_replicas())]
    return lambda batch, stop, replica: replicas[replica](batch, stop)


def run(steps: Steps, iterator: Any, max_steps: int = 0) -> EvalResult:
    """Reads the input to its end, or `max_steps` batches (0: no limit). Adds up in float64 on the host."""
    totals: dict[str, float] = defaultdict(float)
    taken, stopped = 0, False
    while True:
        n = min(_STEPS_PER_TURN, max_steps - taken) if max_steps else _STEPS_PER_TURN
        outputs, done = steps(iterator, n)
        for name, values in outputs.items():
            totals[name] += math.fsum(values)
        taken += done
        stopped = outputs["stop"].any()
        if stopped or done < n or taken == max_steps:
            break
    losses = {name.removeprefix("sum loss ") for name in totals if name.startswith("sum loss ")}
    metrics = {name.removeprefix("sum metric ") for name in totals if name.startswith("sum metric ")}
    means = {name: _mean(totals, f"loss {name}") for name in losses}
    return EvalResult(
        loss=math.fsum(means.values()),
        weight=math.fsum(totals[f"weight loss {name}"] for name in losses),
        tokens=round(math.fsum(totals[f"tokens loss {name}"] for name in losses)),
        complete=not stopped,
        metrics={name: _mean(totals, f"metric {name}") for name in sorted(metrics)}
        | {f"{name}/loss": mean for name, mean in sorted(means.items()) if name},
    )


def _mean(totals: Mapping[str, float], name: str) -> float:
    weight = totals[f"weight {name}"]
    return totals[f"sum {name}"] / weight if weight else math.nan
