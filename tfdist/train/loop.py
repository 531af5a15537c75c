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
    compiled: bool  # this turn also traced and compiled: its time says nothing
    last: bool  # nothing follows: the end of the run, of the input, or a stop


class Action(Protocol):
    """Work that happens at some steps: *when* (`next_due`) apart from *what* (`maybe`)."""

    def next_due(self, step: int) -> int | None:
        """The first step after `step` at which the loop must come up for this action; None: whenever it does."""

    def maybe(self, trainer: "Trainer", turn: Turn) -> None:
        """Called after every turn; acts when it is due."""


def next_stop(step: int, num_steps: int, steps_per_loop: int, actions: Sequence[Action]) -> int:
    """Where the compiled loop has to come up again: `steps_per_loop` never has to divide anything."""
    due = [action.next_due(step) for action in actions]
    return min([num_steps, step + steps_per_loop, *(d for d in due if d is not None)])


def run(trainer: "Trainer", iterator: Any, num_steps: int, actions: Sequence[Action], stop: StopRequest) -> int:
    """Trains up to step `num_steps`, the end of the input, or a stop. Returns the step reached."""
    first = step = trainer.step  # the one host sync per turn
    last = step >= num_steps
    while not last:
        steps_per_loop = trainer.steps_per_loop if step > first else 1  # the first turn compiles: time it by itself
        n = next_stop(step, num_steps, steps_per_loop, actions) - step
        started_s = time.perf_counter()
        outputs, done = trainer.train_steps(iterator, n)
        seconds = time.perf_counter() - started_s
        before, step = step, advance(trainer.state, step, done)
        last = done < n or step == num_steps or stop.requested
        turn = Turn(before, step, num_steps, outputs, seconds, compiled=before == first, last=last)
        for action in actions:
            action.maybe(trainer, turn)
        last = last or stop.requested
    return step


def advance(state: TrainState, step: int, done: int) -> int:
    """The step after `done` more, checked against the variable that the devices counted."""
    counted = int(state.step.numpy())
    assert counted == step + done, f"the loop did {done} steps from {step}, but the step variable says {counted}"
    return counted
