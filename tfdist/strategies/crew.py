"""The workers of a parameter-server cluster, as the coordinator sees them: one thread each, which takes steps, runs them
there, and waits for the worker when it is lost.

TensorFlow's ClusterCoordinator does this too; it has no way to bound staleness, to say which step runs again, or to go on
while one worker never answers.
"""

import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging

from tfdist.cluster.link import supervisor
from tfdist.cluster.spec import Cluster, Task, split_address
from tfdist.errors import PeerLost
from tfdist.patches.server_runtime import Remote, connect_again
from tfdist.strategies.schedule import Schedule
from tfdist.strategies.schedule import Task as StepTask

# how the death of a peer shows; everything else is an error of the program
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError,
        tf.errors.InternalError)  # fmt: skip
# the same, when a worker has died and is back before anybody has asked it: it knows nothing of what was sent to it before
_LOST_TEXTS = (
    "unknown device",
    "Primary device is not remote",
    "Unable to find the relevant tensor remote_handle",
    "contains an invalid device",
    "is neither a type of a primitive operation nor a name of a function registered",
)
_TIMES = 3
_IDLE_S = 0.5
_PROBE_S, _PROBE_EVERY_S = 1.0, 0.1
# TensorFlow tries an address that was gone again every second; asked sooner it would wait, and no thread of Python run
_CHANNEL_S = 1.2
_GONE_AFTER_S = 3.0  # a server that answers nobody for so long is lost

# (worker, task) -> result; runs inside the worker's scope
Run = Callable[["Worker", StepTask], Any]


class Ended(Exception):
    """Nobody wants the result of a step any more."""


def is_loss(error: BaseException) -> bool:
    """Whether a worker, or a server, is gone; see `_is_worker_failure` of TensorFlow's cluster_coordinator.py."""
    unknown = isinstance(error, (tf.errors.InvalidArgumentError, tf.errors.NotFoundError))
    return isinstance(error, LOST) or (unknown and any(text in str(error) for text in _LOST_TEXTS))


class Worker:
    """One of them."""

    def __init__(self, task: Task):
        self.task, self.name = task, str(task)
        self.device = f"/job:worker/replica:0/task:{task.index}"
        self.remote = Remote(self.device)
        self.is_there = True
        # of each input that is in use, its iterators; those that a process of it had which is gone, are gone with it
        self.made: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()
        self._gone: list[Any] = []
        self.steps_done = 0

    def forget(self) -> None:
        """Of a process that is gone; its handles are kept, because TensorFlow would send word that they are not needed."""
        self._gone.append(self.made)
        self.made = weakref.WeakKeyDictionary()


class Crew:
    """All workers. A `Schedule` that has begun is worked on until its end; the newest one first."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self.workers = [Worker(task) for task in cluster.tasks if task.type == "worker"]
        self._open: list[tuple[Schedule, Run]] = []
        self._connecting = threading.Lock()
        self._failures: Counter[tuple[int, int, int]] = Counter()
        self.changed = threading.Condition()  # of all schedules too
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"tfdist {worker.name}", daemon=True)
            for worker in self.workers
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, schedule: Schedule, run: Run) -> None:
        with self.changed:
            self._open.append((schedule, run))
            self.changed.notify_all()

    def end(self, schedule: Schedule) -> None:
        with self.changed:
            self._open = [one for one in self._open if one[0] is not schedule]

    def open_schedules(self) -> list[Schedule]:
        with self.changed:
            return [schedule for schedule, _ in self._open]

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def abandon(self, task: Task) -> None:
        """A worker whose machine is gone, which no error will ever say: its steps go to others at once."""
        for worker in self.workers:
            if worker.task == task and worker.is_there:
                worker.is_there = False
                logging.warning("%s is lost; training goes on without it", worker.name)
                for schedule, _ in list(self._open):
                    for one in schedule.of_worker(worker.name):
                        schedule.lost(one)
        if not any(worker.is_there for worker in self.workers):
            self._fail(PeerLost("all workers are lost"))

    # ---- one worker's thread ----

    def _work(self, worker: Worker) -> None:
        while (next_one := self._next(worker)) is not None:
            schedule, run, task = next_one
            try:
                with worker.remote.scope():
                    result = run(worker, task)
                worker.steps_done += schedule.finish(task, result)
            except Ended:
                schedule.finish(task, None)
            except BaseException as error:
                if not is_loss(error) or self._fails_again(worker, schedule, task):  # the step's own: it would fail anywhere
                    logging.error("step %d failed on %s (%s)", task.step, worker.name, type(error).__name__)
                    schedule.fail(error)
                    continue
                if schedule.lost(task):
                    logging.warning(
                        "%s was lost in step %d, which runs again (%s)", worker.name, task.step, type(error).__name__
                    )
                logging.debug("%s: %s", worker.name, error)
                try:
                    self._wait_for(worker)
                except PeerLost as lost:
                    self._fail(lost)
                    return

    def _fails_again(self, worker: Worker, schedule: Schedule, task: StepTask) -> bool:
        """Whether a step has failed several times on workers that were there: some errors of a step look like a loss."""
        if not self._answers(worker.task):
            return False
        key = (id(schedule), task.step, task.part)
        self._failures[key] += 1
        return self._failures[key] >= _TIMES

    def _next(self, worker: Worker) -> tuple[Schedule, Run, StepTask] | None:
        """Blocks until there is something to do; None: never again."""
        with self.changed:
            while not self._closed and worker.is_there:
                for schedule, run in reversed(self._open):
                    task = schedule.take(worker.name)
                    if task is not None:
                        return schedule, run, task
                self.changed.wait(_IDLE_S)
        return None

    def _fail(self, error: BaseException) -> None:
        for schedule, _ in list(self._open):
            schedule.fail(error)

    def _wait_for(self, worker: Worker) -> None:
        """Until a process answers at its address again. Raises `PeerLost` if it was a server that was lost."""
        lost_s = time.monotonic()
        self._check_servers()
        while not self._answers(worker.task):
            if self._closed or not worker.is_there:
                return
            time.sleep(_PROBE_EVERY_S)
            self._check_servers()
        worker.forget()
        time.sleep(_CHANNEL_S)
        while not self._connect_again():
            if self._closed or not worker.is_there:
                return
            self._check_servers()
            time.sleep(_PROBE_EVERY_S)
        logging.warning("%s is there again after %.1f s", worker.name, time.monotonic() - lost_s)

    def _connect_again(self) -> bool:
        """Without those that do not answer now: TensorFlow would wait for them."""
        with self._connecting:
            absent = {worker.task.index for worker in self.workers if not self._answers(worker.task)}
            try:
                with supervisor().connecting():
                    connect_again(absent)
            except BaseException as error:
                if not is_loss(error):
                    raise
                logging.debug("connecting again: %s", error)  # another one was lost meanwhile
                return False
            return True

    def _check_servers(self) -> None:
        for task in (task for task in self._cluster.tasks if task.type == "ps"):
            since_s = time.monotonic()
            while not self._answers(task):
                if time.monotonic() - since_s > _GONE_AFTER_S:
                    raise PeerLost(f"{task} is lost: it does not answer at {self._cluster.address(task)}")
                time.sleep(_PROBE_EVERY_S)

    def _answers(self, task: Task) -> bool:
        try:
            socket.create_connection(split_address(self._cluster.address(task)), _PROBE_S).close()
        except OSError:
            return False
        return True
