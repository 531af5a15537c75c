"""What runs on the workers of a parameter-server cluster: functions of a step, their input, and how results come back."""

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tfdist.strategies import input_checks, layout
from tfdist.strategies.base import Batch, DatasetFn, InputContext
from tfdist.strategies.crew import Ended, Worker
from tfdist.strategies.schedule import Schedule, Task


class ServerStep:
    """What `ParameterServer.make_steps` is given: `compute(batch, step, part)` -> scalars, traced once for each part and run
    on a worker; `update(step)` -> scalars, once for each step after all its parts, by the chief; `done(step)`, there too.
    """

    compute: Callable[[Batch, tf.Tensor, int], dict[str, tf.Tensor]]
    update: Callable[[tf.Tensor], dict[str, tf.Tensor]] | None = None

    def begin(self) -> None:
        """Steps of an input begin, the first or another one."""

    def done(self, step: int) -> None:
        """So many steps are done; nothing of them runs any more."""


class Plain(ServerStep):
    """A replica step that changes nothing: an evaluation."""

    def __init__(self, replica_step):
        self._step = replica_step

    def compute(self, batch: Batch, step: tf.Tensor, part: int) -> dict[str, tf.Tensor]:
        outputs = self._step(batch, tf.constant(0), 0)
        return {name: value for name, value in outputs.items() if name != "stop"}


class ServerInput:
    """The input of one run of steps: on each worker an iterator, made when it is first needed there."""

    def __init__(
        self, schedule: Schedule, dataset_fn: DatasetFn, accumulate_steps: int, start_step: int, num_steps: int, whole: bool
    ):  # fmt: skip
        self.schedule, self.step = schedule, start_step
        self.is_begun = self.has_ended = False
        self.reruns_seen = 0
        self.parts_done: dict[int, dict[int, np.ndarray]] = {}
        self._dataset_fn, self._accumulate_steps = dataset_fn, accumulate_steps
        self._making = threading.Lock()
        self._queues: list[tf.queue.FIFOQueue] = []
        context = self._context(0, start_step)
        dataset = dataset_fn(context)
        input_checks.check_order(dataset, context)
        input_checks.check_runs_elsewhere(dataset)
        self.by_number = context.steps_were_read
        if start_step and not context.start_step_was_read:
            logging.info("dataset_fn does not use start_step: workers read and drop the first %d batches", start_step)
            dataset = dataset.skip(start_step)
        input_checks.check_length(dataset, start_step, num_steps, whole)
        self._rows = [self._rows_of(part) for part in range(schedule.parts)]
        self.spec = self._lay_out(dataset, 0).element_spec
        batches = int(dataset.cardinality())  # also of steps() with a take(n), of which a worker reads no n of its own
        self.end = start_step + batches if batches >= 0 else context.end if self.by_number else None

    def _context(self, part: int, start_step: int, given=None) -> InputContext:
        return InputContext(part, self.schedule.parts, self.schedule.parts, start_step, given_steps=given)

    def _rows_of(self, part: int) -> int:
        dataset = self._dataset_fn(self._context(part, 0))
        rows = layout.static_rows(dataset)
        return layout.first_rows(dataset) if rows is None else rows

    def _lay_out(self, dataset: tf.data.Dataset, part: int) -> tf.data.Dataset:
        return layout.lay_out(dataset, self._rows, part, self._accumulate_steps, 1)

    def feed(self, worker: Worker, task: Task) -> tuple[Any, tf.Tensor, int]:
        """(iterator, queue of step numbers, how many elements to drop first) for a task, on its worker."""
        of_parts = worker.made.setdefault(self, {})
        made = of_parts.get(task.part)
        if made is None or (not self.by_number and made[2] > task.step):
            # dataset functions are the user's, and run in one thread at a time
            with self._making, tf.device(f"{worker.device}/device:CPU:0"):
                made = self._make(task)
        iterator, queue, at = made
        of_parts[task.part] = (iterator, queue, task.step + 1)
        if queue not in self._queues:
            self._queues.append(queue)
        return iterator, queue.queue_ref, task.step - at

    def close(self) -> None:
        """Nobody reads it any more. A pipeline that still waits for a step's number must not when it is taken apart: a
        worker can crash of that."""
        for queue in self._queues:
            with contextlib.suppress(tf.errors.OpError):  # of a worker that is gone
                queue.close(cancel_pending_enqueues=True)

    def _make(self, task: Task):
        queue = tf.queue.FIFOQueue(1 << 20, [tf.int64], [[]])

        def given():
            endless = tf.data.Dataset.from_tensors(0).repeat()
            return endless.map(lambda _: queue.dequeue())

        context = self._context(task.part, task.step, given if self.by_number else None)
        dataset = self._dataset_fn(context)
        if not context.start_step_was_read and task.step:
            dataset = dataset.skip(task.step)
        laid_out = self._lay_out(dataset, task.part).with_options(layout.without_autotune())
        return iter(laid_out), queue, task.step


class Functions:
    """The functions of one `ServerStep`, traced for an input and run on the workers."""

    def __init__(self, server_step: ServerStep):
        self._step, self._traced = server_step, {}
        self.updates = server_step.update is not None
        self._update, self.names = None, []  # names filled while a function is traced

    def trace(self, iterator: ServerInput) -> None:
        """In the program's own thread: Keras' state is bound while a function is traced."""
        for part in range(iterator.schedule.parts):
            key = self._key(iterator, part)
            if key not in self._traced:
                function = self._function(part, iterator.by_number)
                self._traced[key] = function.get_concrete_function(
                    tf.data.IteratorSpec(iterator.spec), tf.TensorSpec([], tf.resource), tf.TensorSpec([2], tf.int64)
                )  # fmt: skip
        if self.updates and self._update is None:

            @tf.function(autograph=False)
            def update(step):
                outputs = self._step.update(step)
                self.names[:] = [*outputs, "data_wait_s"]
                return tf.stack([tf.cast(value, tf.float64) for value in (*outputs.values(), 0.0)])

            self._update = update.get_concrete_function(tf.TensorSpec([], tf.int64))

    def _key(self, iterator: ServerInput, part: int):
        return part, iterator.by_number, str(iterator.spec)

    def _function(self, part: int, by_number: bool):
        @tf.function(autograph=False)
        def on_worker(iterator, queue, numbers):
            drop, step = tf.unstack(numbers)
            asked_s = tf.timestamp()
            with tf.control_dependencies([asked_s]):
                if by_number:
                    ready = tf.raw_ops.QueueEnqueueV2(handle=queue, components=[step])
                else:

                    def dropped(i):
                        with tf.control_dependencies(tf.nest.flatten(next(iterator))):
                            return (i + 1,)

                    (ready,) = tf.while_loop(lambda i: i < drop, dropped, (tf.zeros([], tf.int64),), parallel_iterations=1)
            with tf.control_dependencies([ready]):
                batch = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batch)):
                data_wait_s = tf.timestamp() - asked_s
            outputs = self._step.compute(tf.nest.map_structure(lambda t: t[0], batch), step, part)
            valid = outputs.pop("valid")
            outputs["data_wait_s"] = data_wait_s
            if not self.updates:
                self.names[:] = list(outputs)
            return tf.stack([tf.cast(value, tf.float64) for value in (valid, *outputs.values())])

        return on_worker

    def run(self, iterator: ServerInput, worker: Worker, task: Task) -> np.ndarray:
        fed, queue, drop = iterator.feed(worker, task)
        function = self._traced[self._key(iterator, task.part)]
        numbers = here(lambda: tf.constant([drop, task.step], tf.int64))  # one tensor: each is a message
        return fetch(function(fed, queue, numbers))

    def update(self, step: int) -> np.ndarray:
        return self._update(tf.constant(step, tf.int64)).numpy()


_CHIEF = "/job:chief/replica:0/task:0/device:CPU:0"


def here(make: Callable[[], Any]) -> Any:
    """What is made on the chief, also by a worker's thread: made there, it would wait for the worker with Python's lock
    held, and a worker that is frozen would freeze the chief."""
    with tf.device(_CHIEF):
        return make()


def fetch(outputs: Any) -> Any:
    """Tensors of a worker as arrays. `numpy` of a remote tensor would wait with Python's lock held; an op does not."""
    flat = tf.nest.flatten(outputs)
    local = here(lambda: tf.identity_n(flat)) if flat else []
    return tf.nest.pack_sequence_as(outputs, [tensor.numpy() for tensor in local])


def run_of(iterator: weakref.ref, functions: Functions, worker: Worker, task: Task) -> np.ndarray:
    """A task of an input that may be gone by now."""
    alive = iterator()
    if alive is None:
        raise Ended
    return functions.run(alive, worker, task)
