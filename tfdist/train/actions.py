"""Work that happens at some steps: log, evaluate, checkpoint, stop when the numbers are gone."""

import math
from typing import TYPE_CHECKING, Any

from absl import logging

from tfdist.checkpoint import policy
from tfdist.errors import CheckpointError, NotFiniteError
from tfdist.strategies.base import DatasetFn
from tfdist.train.evaluate import EvalResult
from tfdist.train.loop import Turn

if TYPE_CHECKING:
    from tfdist.train.trainer import Trainer


class Every:
    """Due at the multiples of `every_steps`; 0: never."""

    def __init__(self, every_steps: int):
        self.every_steps = every_steps

    def next_due(self, step: int) -> int | None:
        return (step // self.every_steps + 1) * self.every_steps if self.every_steps else None

    def is_due(self, step: int) -> bool:
        return bool(self.every_steps) and step % self.every_steps == 0


class Log:
    """Writes a train row for every `every_steps`-th step. Never a reason for the compiled loop to come up.

    `flops_per_token` and `peak_flops` (of all devices together, per second) give `mfu`; without them it is 0.
    """

    def __init__(self, every_steps: int = 1, flops_per_token: float = 0.0, peak_flops: float = 0.0):
        self.every_steps, self.flops_per_token, self.peak_flops = every_steps, flops_per_token, peak_flops

    def next_due(self, step: int) -> int | None:
        return None

    def maybe(self, trainer: "Trainer", turn: Turn) -> None:
        done = turn.step - turn.first_step
        if turn.last and (report := trainer.strategy.report()):
            trainer.write(
                {"kind": "event", "name": "workers", "step": turn.step, "updates": trainer.state.updates, **report}
            )
        if not done:
            return
        tokens_per_s = math.fsum(turn.outputs["tokens"]) / turn.seconds
        mfu = tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else 0.0
        for i, step in enumerate(range(turn.first_step + 1, turn.step + 1)):
            outputs = {name: float(values[i]) for name, values in turn.outputs.items()}
            if outputs["skipped"]:
                what, replica = trainer.first_not_finite(outputs)
                row = {"kind": "event", "name": "skip_step", "step": step, "loss": outputs["loss"]}
                trainer.write(row | {"not_finite": what, "replica": replica})
            if step % self.every_steps:
                continue
            row = {
                "kind": "train",
                "step": step,
                "loss": outputs["loss"],
                "loss_hex": outputs["loss"].hex(),
                "grad_norm": outputs["grad_norm"],
                "learning_rate": outputs["learning_rate"],
                "tokens": round(outputs["tokens"]),
                "tokens_per_s": tokens_per_s,
                "step_time_s": turn.seconds / done,
                "data_wait_s": outputs["data_wait_s"],
                "mfu": mfu,
            }
            trainer.write(row | {name: outputs[name] for name in ("loss_scale", "staleness") if name in outputs})


class Evaluate(Every):
    """Writes an eval row. `bytes_per_token` turns nats per token into bits per byte; 0 leaves that out."""

    def __init__(self, dataset_fn: DatasetFn, every_steps: int, bytes_per_token: float = 0.0, max_steps: int = 0):
        super().__init__(every_steps)
        self.dataset_fn, self.bytes_per_token, self.max_steps = dataset_fn, bytes_per_token, max_steps

    def maybe(self, trainer: "Trainer", turn: Turn) -> None:
        if self.is_due(turn.step) and turn.step < turn.num_steps and not turn.last:
            write_evaluation(trainer, self.dataset_fn, self.bytes_per_token, self.max_steps)


def write_evaluation(trainer: "Trainer", dataset_fn: DatasetFn, bytes_per_token: float, max_steps: int = 0):
    """Evaluates now and writes the row, unless a stop request cuts it short. Returns the result."""
    result = trainer.evaluate(dataset_fn, max_steps)
    if not result.complete:
        return result
    trainer.write(evaluation_row(trainer.step, result, bytes_per_token))
    return result


def evaluation_row(step: int, result: EvalResult, bytes_per_token: float = 0.0) -> dict[str, Any]:
    row = {
        "kind": "eval",
        "step": step,
        "loss": result.loss,
        "loss_hex": result.loss.hex(),
        "perplexity": result.perplexity,
        "tokens": result.tokens,
    }
    bits = {"bits_per_byte": result.bits_per_byte(bytes_per_token)} if bytes_per_token else {}
    return row | bits | dict(result.metrics)


class Checkpoint(Every):
    """Saves into the trainer's workdir at its steps, at the end and when told to stop.

    A disk that does not take a checkpoint is a warning while training goes on, and an error at the end.
    """

    def __init__(self, every_steps: int, keep_last: int = 3, keep_every_steps: int = 0):
        super().__init__(every_steps)
        self.keep, self.saved_step = policy.Keep(keep_last, keep_every_steps), -1

    def maybe(self, trainer: "Trainer", turn: Turn) -> None:
        if not (turn.last or self.is_due(turn.step)) or turn.step == self.saved_step:
            return
        if not trainer.strategy.is_chief:
            return
        try:
            trainer.save(self.keep)
        except CheckpointError as error:
            if turn.last:
                raise
            logging.warning("%s; training goes on, the last good checkpoint is kept", error)
            trainer.write({"kind": "event", "name": "checkpoint_failed", "step": turn.step, "reason": str(error)})
            return
        self.saved_step = turn.step


class StopIfNotFinite:
    """Ends the run after `max_skipped_steps` steps in a row whose loss or gradients were not finite.

    It saves first, so that nothing is lost.
    """

    def __init__(self, max_skipped_steps: int = 20):
        self.max_skipped_steps, self.in_a_row = max_skipped_steps, 0

    def next_due(self, step: int) -> int | None:
        return None

    def maybe(self, trainer: "Trainer", turn: Turn) -> None:
        for i, skipped in enumerate(turn.outputs.get("skipped", ())):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if self.in_a_row >= self.max_skipped_steps:
                trainer.strategy.barrier()  # no step runs while variables are read
                if trainer.workdir is not None and trainer.strategy.is_chief:
                    try:
                        trainer.save()
                    except CheckpointError as error:
                        logging.error("%s", error)
                trainer.strategy.barrier()  # the first one to leave ends the group, also while the chief still saves
                raise NotFiniteError(
                    f"the loss or the gradients were not finite for {self.in_a_row} steps in a row, up to step "
                    f"{turn.first_step + i + 1}, there first {_first_not_finite(trainer, turn, i)}; no variable was changed "
                    "by them. Lower the learning rate, or look at the data of these steps"
                )


def _first_not_finite(trainer: "Trainer", turn: Turn, i: int) -> str:
    what, replica = trainer.first_not_finite({name: float(values[i]) for name, values in turn.outputs.items()})
    return f"{what} on replica {replica}" if replica >= 0 else f"{what}, summed over the replicas"
