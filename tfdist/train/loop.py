"""The whole loop: compiled inner loop, host-side outer loop, one number moves work between them."""

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tfdist.train.signals import StopRequest
from tfdist.train.state import TrainState

if TYPE_CHECKING:
    from tfdist.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one call of the compiled loop did: the steps after `first_step` up to and including `step`."""

    first_step: int
    step: int
    num_steps: int  # where the run ends
    outputs: dict[str, np.ndarray]  # per-step scalars, [step - first_step]
    seconds: float
    last: bool = False  # the empty turn that closes a run: its end, that of the input, or a stop


class Action(Protocol):
    """Work that happens at some steps: *when* (`next_due`) apart from *what* (`maybe`)."""

    def next_due(self, step: int) -> int | None:
        """The first step after `step` at which the loop must come up for this action; None: whenever it does."""

    def maybe(self, trainer: "Trainer", turn: Turn) -> None:
        """Called after every turn; acts when it is due."""


def next_stop(step: int, num_steps: int, steps_per_loop: int, actions: Sequence[Action]) -> tuple[int, int]:
    """Where the compiled loop has to come up again, and where an action or the end wants all steps done: `steps_per_loop`
    never has to divide anything."""
    due = [action.next_due(step) for action in actions]
    all_done = min([num_steps, *(d for d in due if d is not None)])
    return min(all_done, step + steps_per_loop), all_done


def run(
    trainer: "Trainer", iterator: Any, num_steps: int, actions: Sequence[Action], stop: StopRequest, whole_run: int = 0
) -> int:  # fmt: skip
    """Trains up to step `num_steps`, the end of the input, or a stop. Returns the step reached."""
    first = step = trainer.step  # the one host sync per turn
    ended, outputs = False, {}
    # a stop is seen in the outputs, where all workers agree on the step; this process' own request may be earlier
    while step < num_steps and not ended:
        steps_per_loop = trainer.steps_per_loop if step > first else 1  # the first turn compiles: time it by itself
        end, all_done = next_stop(step, num_steps, steps_per_loop, actions)
        trainer.phase("train" if step > first else "compile")
        started_s = time.perf_counter()
        outputs, done = trainer.train_steps(iterator, end - step, all_done - end)
        turn = Turn(step, step + done, whole_run or num_steps, outputs, time.perf_counter() - started_s)
        stop.requested |= bool(outputs["stop"].any())
        step, ended = advance(trainer.state, step, done), done < end - step or bool(outputs["stop"].any())
        for action in actions:
            action.maybe(trainer, turn)
    # a stop can come at any time, also while an action runs: saving at the end does not depend on when
    closing = Turn(
        step, step, whole_run or num_steps, {name: values[:0] for name, values in outputs.items()}, 0.0, last=True
    )
    for action in actions:
        action.maybe(trainer, closing)
    return step


def advance(state: TrainState, step: int, done: int) -> int:
    """The step after `done` more, checked against the variable that the devices counted."""
    counted = int(state.step.numpy())
    assert counted == step + done, f"the loop did {done} steps from {step}, but the step variable says {counted}"
    return counted
