"""Which step runs next, under parameter servers: pure, without TensorFlow, safe to call from many threads."""

import collections
import dataclasses
import threading
import time
from typing import Any


@dataclasses.dataclass(eq=False)
class Task:
    """One part of a step. A task that is run again is another `Task` with the same numbers."""

    step: int
    part: int
    begun_s: float
    in_flight: int  # others at its begin: each may write between what it reads and what it writes
    begun_after: int = 0  # tasks that began later, while it ran


class Schedule:
    """Deals out the steps from `first` on, each in `parts`.

    A step's parts are all dealt out before the next step's; with more than one, no step begins before the one before has
    been `applied`. `max_staleness`: so many updates at most come between what a step reads and what it writes; None: any
    number. Steps of a lost worker come first.
    """

    def __init__(
        self, first: int, parts: int = 1, max_staleness: int | None = None, changed: threading.Condition | None = None
    ):  # fmt: skip
        self.parts, self.max_staleness = parts, max_staleness
        self.next = (first, 0)
        self.until = first  # steps from here on must not begin yet
        self.again: collections.deque[tuple[int, int]] = collections.deque()
        self.running: dict[Task, str] = {}  # task -> worker
        self.finished: collections.deque[tuple[Task, str, Any]] = collections.deque()
        self.applied = first  # parts > 1: steps whose update is done
        self.reruns: list[int] = []  # steps that were begun again
        self.error: BaseException | None = None
        self.changed = changed or threading.Condition()  # of all schedules that the same workers look at

    def allow(self, until: int) -> None:
        """Steps below `until` may begin."""
        with self.changed:
            self.until = until
            self.changed.notify_all()

    def take(self, worker: str) -> Task | None:
        """The next task for a worker that is free; None if there is none now."""
        with self.changed:
            if not self._may_begin():
                return None
            if self.again:
                step, part = self.again.popleft()
            else:
                step, part = self.next
                self.next = (step, part + 1) if part + 1 < self.parts else (step + 1, 0)
            task = Task(step, part, time.monotonic(), len(self.running))
            for other in self.running:
                other.begun_after += 1
            self.running[task] = worker
            return task

    def _may_begin(self) -> bool:
        if self.error is not None:
            return False
        if not self.again:
            step = self.next[0]
            if step >= self.until or (self.parts > 1 and step > self.applied):
                return False
        if self.max_staleness is None or self.parts > 1:
            return True
        return len(self.running) <= self.max_staleness and all(
            task.in_flight + task.begun_after + 1 <= self.max_staleness for task in self.running
        )

    def finish(self, task: Task, result: Any) -> bool:
        """False: it was given to somebody else meanwhile, and its result does not count."""
        with self.changed:
            worker = self.running.pop(task, None)
            if worker is not None:
                self.finished.append((task, worker, result))
                self.changed.notify_all()
            return worker is not None

    def lost(self, task: Task) -> bool:
        """Its worker is gone: somebody else runs it again, on the same rows."""
        with self.changed:
            if self.running.pop(task, None) is None:
                return False
            self.again.append((task.step, task.part))
            self.reruns.append(task.step)
            self.changed.notify_all()
            return True

    def of_worker(self, worker: str) -> list[Task]:
        with self.changed:
            return [task for task, who in self.running.items() if who == worker]

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def step_applied(self) -> None:
        with self.changed:
            self.applied += 1
            self.changed.notify_all()

    def stop(self) -> None:
        """Nothing new begins; what was begun, and the other parts of its step, go on."""
        with self.changed:
            step, part = self.next
            self.until = min(self.until, step + 1 if part else step)
            self.changed.notify_all()

    @property
    def is_quiet(self) -> bool:
        """Nothing runs, and nothing may begin."""
        with self.changed:
            return not self.running and not self.again and self.next[0] >= self.until

    def results(self, enough: int, timeout_s: float) -> list[tuple[Task, str, Any]]:
        """What has finished, once that is `enough` or nothing more will; sooner when the time is up. Raises what made a
        worker fail."""
        with self.changed:
            self.changed.wait_for(lambda: self.error is not None or len(self.finished) >= enough or self.is_quiet, timeout_s)
            if self.error is not None:
                raise self.error
            found = list(self.finished)[:enough]
            for _ in found:
                self.finished.popleft()
            return found
