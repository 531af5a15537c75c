"""Parameter servers: the chief coordinates, workers compute one step each at their own pace, servers hold the variables."""

import contextlib
import functools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tfdist.cluster import preflight, resolve
from tfdist.cluster.link import supervisor
from tfdist.cluster.spec import Cluster, check_strategy
from tfdist.errors import PeerLost, UserError
from tfdist.patches import server_runtime, servers
from tfdist.strategies import base, devices, joined
from tfdist.strategies.base import DatasetFn, Steps
from tfdist.strategies.crew import LOST, Crew
from tfdist.strategies.remote import Functions, Plain, ServerInput, ServerStep, run_of
from tfdist.strategies.schedule import Schedule, Task
from tfdist.strategies.serve import serve

PARTITIONERS = ("min_size", "max_size", "fixed", "none")
_LOOK_EVERY_S = 0.2


class ParameterServer:
    """Asynchronous training: workers read the variables, compute a step, and send gradients, each at its own pace.

    Made by the chief alone; in a worker or a server this serves and never returns. For each step a worker reads
    each variable whole, but of a table that is only looked up just the rows that it needs.

    Args:
        cluster: who takes part; default: what the environment says (TF_CONFIG).
        partitioner: how a variable is cut along its first axis: "min_size" (a part for each server, of at least
            `min_shard_bytes`), "max_size" (parts of at most `max_shard_bytes`), "fixed" (`num_shards` parts), "none".
        num_shards: of "fixed", and at most so many of "min_size" and "max_size"; 0: as many as there are servers.
        max_staleness: so many updates at most between a step's reading and its writing; None: no bound. 0 lets one worker
            compute at a time. A bound makes fast workers wait for slow ones.
        gradients_per_update: into so many parts each global batch is split, for as many workers; the update comes when all
            are there. 1: each worker updates by itself. With more, training is synchronous and equals one device.
        start_timeout_s: how long to wait for the others when no supervisor has met them already.
    """

    num_workers, first_replica, is_chief, worker_weights = 1, 0, True, ()  # one process runs the program
    worker = 0

    def __init__(
        self, cluster: Cluster | None = None, *, partitioner: str = "min_size", min_shard_bytes: int = 256 << 10,
        max_shard_bytes: int = 16 << 20, num_shards: int = 0, max_staleness: int | None = None,
        gradients_per_update: int = 1, start_timeout_s: float = 300.0,
    ):  # fmt: skip
        self.cluster = cluster = cluster or resolve.resolve()
        check_strategy(cluster, "parameter_server")
        if cluster.task.type in ("worker", "ps"):
            serve(cluster, start_timeout_s)
        if cluster.task.type == "evaluator":
            raise UserError("ParameterServer: expected the chief, found an evaluator, which trains with nobody")
        if partitioner not in PARTITIONERS:
            raise UserError(f"partitioner: expected one of {', '.join(PARTITIONERS)}, found {partitioner!r}")
        if gradients_per_update < 1 or (max_staleness is not None and max_staleness < 0):
            raise UserError(
                f"expected gradients_per_update >= 1 and max_staleness >= 0, found {gradients_per_update}, {max_staleness}"
            )
        options = {
            "partitioner": partitioner, "min_shard_bytes": min_shard_bytes, "max_shard_bytes": max_shard_bytes,
            "num_shards": num_shards, "max_staleness": max_staleness, "gradients_per_update": gradients_per_update,
        }  # fmt: skip
        if (before := joined.before(self, cluster, options)) is not None:
            self.__dict__ = before.__dict__
            return
        self.num_replicas = self.num_replicas_in_sync = self.parts = gradients_per_update
        self.max_staleness, self.num_servers = max_staleness, len(cluster.ps)
        self.num_remote_workers = len(cluster.worker)
        cut = self._partitioner(partitioner, min_shard_bytes, max_shard_bytes, num_shards)
        self.tf_strategy = _connect(cluster, cut, start_timeout_s)
        joined.remember(self, cluster, options)
        servers.parts_are_arrays()
        self._bytes_on = [0] * self.num_servers
        self._stop = threading.Event()
        self._steps_done = 0
        self._staleness: Counter[int] = Counter()
        self._steps_of: Counter[str] = Counter()  # by worker: of training, where a part of a step counts as one
        self._reruns: list[int] = []
        self._longest_gap_s = 0.0
        self.crew = Crew(cluster)
        supervisor().on_lost(self.crew.abandon)
        supervisor().watch(self.progress)

    def __getattr__(self, name: str):
        raise base.no_such_name(self, name)

    def __repr__(self) -> str:
        return f"ParameterServer(num_workers={self.num_remote_workers}, num_servers={self.num_servers})"

    # ---- variables ----

    @contextlib.contextmanager
    def scope(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.tf_strategy.scope())
            stack.enter_context(server_runtime.placement(self.tf_strategy, self._server_of))
            stack.enter_context(base.scope_of_fit(self))
            stack.enter_context(self.peers())
            yield self

    def _partitioner(self, name: str, min_shard_bytes: int, max_shard_bytes: int, num_shards: int):
        known, shards = tf.distribute.experimental.partitioners, num_shards or self.num_servers
        if name == "none" or (name != "max_size" and shards == 1):
            return None
        if name == "fixed":
            return known.FixedShardsPartitioner(shards)
        if name == "max_size":
            return known.MaxSizePartitioner(max_shard_bytes, num_shards or None)
        return known.MinSizePartitioner(min_shard_bytes, shards)

    def _server_of(self, variable: dict[str, Any]) -> int:
        """The server with the fewest bytes takes the next variable, or the first part of one."""
        chosen = int(np.argmin(self._bytes_on))
        value, shape, dtype = (variable.get(name) for name in ("initial_value", "shape", "dtype"))
        if shape is None and not callable(value) and value is not None:
            shape = tf.convert_to_tensor(value).shape
        if shape is not None and tf.TensorShape(shape).is_fully_defined():
            size = tf.TensorShape(shape).num_elements() * (tf.as_dtype(dtype).size if dtype else 4)
        else:
            size = 4096  # its initial value is not known yet
        self._bytes_on[chosen] += size
        return chosen

    @functools.cached_property
    def locks(self) -> list[tf.CriticalSection]:
        """One on each server: who holds it updates alone there."""
        found = []
        for server in range(self.num_servers):
            with tf.device(f"/job:ps/task:{server}/device:CPU:0"):
                found.append(tf.CriticalSection(shared_name=f"tfdist/update/{server}"))
        return found

    def copies(self, variable) -> Sequence[tf.Variable]:
        return servers.components(variable)

    def lock_of(self, device: str) -> tf.CriticalSection:
        return self.locks[server_runtime.server_number(device)]

    def components(self, variables, local: int) -> servers.Pulled:
        """Inside of it they are what a worker has pulled."""
        return servers.Pulled(variables)

    @contextlib.contextmanager
    def peers(self):
        """A server that is gone is `PeerLost`, not a bug of this process."""
        try:
            yield
        except LOST as error:
            raise PeerLost(f"a server is lost ({type(error).__name__})") from error

    def local_replicas(self) -> int:
        return 1

    # ---- input ----

    def distribute(
        self, dataset_fn: DatasetFn, *, accumulate_steps: int = 1, start_step: int = 0, num_steps: int = 0,
        whole: bool = False,
    ) -> ServerInput:  # fmt: skip
        parts = 1 if whole else self.parts
        schedule = Schedule(start_step, parts, None if whole else self.max_staleness, self.crew.changed)
        return ServerInput(schedule, dataset_fn, accumulate_steps, start_step, num_steps, whole)

    def release(self, iterator: ServerInput) -> None:
        self.crew.end(iterator.schedule)
        iterator.close()

    # ---- steps ----

    def make_steps(self, replica_step) -> Steps:
        server_step = replica_step if isinstance(replica_step, ServerStep) else Plain(replica_step)
        functions = Functions(server_step)

        def steps(iterator: ServerInput, n: int, ahead: int = 0) -> tuple[dict[str, np.ndarray], int]:
            if not iterator.is_begun:
                server_step.begin()
            with self.peers():
                rows, stopped = self._run(iterator, functions, n, ahead)
            self._steps_done += len(rows)
            if rows and "staleness" in functions.names:
                self._staleness.update(int(row[functions.names.index("staleness")]) for row in rows)
            server_step.done(iterator.step)
            columns = np.array(rows).T if rows else np.zeros([len(functions.names), 0])
            outputs = dict(zip(functions.names, columns, strict=True))
            outputs["stop"] = np.zeros([len(rows)])
            if stopped:
                outputs["stop"] = np.append(np.zeros([max(len(rows) - 1, 0)]), 1.0)
            return outputs, len(rows)

        return steps

    def _run(
        self, iterator: ServerInput, functions: Functions, n: int, ahead: int
    ) -> tuple[list[np.ndarray], bool]:  # fmt: skip
        """The rows of outputs of the next `n` steps, in the order in which they ended, and whether a stop was asked for:
        then all that had begun has ended."""
        schedule = iterator.schedule
        functions.trace(iterator)
        until = iterator.step + n + ahead
        schedule.allow(until if iterator.end is None else min(until, iterator.end))
        is_first = not iterator.is_begun
        if is_first:
            itself = weakref.ref(iterator)  # an input that nobody reads any more ends, whatever is left of it
            weakref.finalize(iterator, self.crew.end, schedule)
            self.crew.begin(schedule, functools.partial(run_of, itself, functions))
            iterator.is_begun = True
        rows: list[np.ndarray] = []
        ended_s = time.monotonic()
        stopped, trains = False, "staleness" in functions.names
        while len(rows) < n or stopped or iterator.has_ended:
            stopped = stopped or self._stop.is_set()
            if stopped:
                schedule.stop()
            quiet = schedule.is_quiet  # before: what is finished by then is among the results
            for task, worker, row in schedule.results(1, _LOOK_EVERY_S):
                valid, row = bool(row[0]), row[1:]
                if not valid:
                    iterator.has_ended = True
                    schedule.stop()
                    continue
                if trains:
                    self._steps_of[worker] += 1
                if not self._is_whole(iterator, task, row):
                    continue
                rows.append(functions.update(task.step) if functions.updates else row)
                if schedule.parts > 1:
                    schedule.step_applied()
                iterator.step += 1
                if trains and not is_first:  # which compiles
                    self._longest_gap_s = max(self._longest_gap_s, time.monotonic() - ended_s)
                is_first = False
                ended_s = time.monotonic()
            if quiet and not schedule.finished:
                break
        if trains:
            self._reruns += schedule.reruns[iterator.reruns_seen :]
            iterator.reruns_seen = len(schedule.reruns)
        if iterator.has_ended or stopped or iterator.step == iterator.end:
            self.crew.end(schedule)
        return rows, stopped

    def run_on_workers(self, calls: list[Callable[[], Any]]) -> list[Any]:
        """What each call gives, run inside of the scope of whichever worker is free. In order."""
        schedule = Schedule(0, changed=self.crew.changed)
        schedule.allow(len(calls))
        self.crew.begin(schedule, lambda worker, task: calls[task.step]())
        found: dict[int, Any] = {}
        try:
            with self.peers():
                while len(found) < len(calls):
                    found |= {task.step: result for task, _, result in schedule.results(1, _LOOK_EVERY_S)}
        finally:
            self.crew.end(schedule)
        return [found[i] for i in range(len(calls))]

    def count_step(self, worker: str, staleness: int) -> None:
        """One more step of `fit` is done."""
        self._steps_done += 1
        self._steps_of[worker] += 1
        self._staleness[staleness] += 1

    def note_reruns(self, schedule: Schedule) -> None:
        self._reruns += schedule.reruns

    def _is_whole(self, iterator: ServerInput, task: Task, row: np.ndarray) -> bool:
        """Whether all parts of a task's step are there."""
        if iterator.schedule.parts == 1:
            return True
        there = iterator.parts_done.setdefault(task.step, {})
        there[task.part] = row
        if len(there) < iterator.schedule.parts:
            return False
        del iterator.parts_done[task.step]
        return True

    def report(self) -> dict[str, Any]:
        """What happened so far: steps of each worker, how many updates came between a step's reading and its writing, which
        steps were run again because their worker was lost, and the longest time without a step."""
        worst = max(self._staleness, default=0)
        steps = ", ".join(f"{worker.name} {self._steps_of[worker.name]}" for worker in self.crew.workers)
        return {
            "reason": f"steps of {steps}; run again: {len(self._reruns)}; staleness at most {worst}",
            "steps": {worker.name: self._steps_of[worker.name] for worker in self.crew.workers},
            "staleness": {str(updates): count for updates, count in sorted(self._staleness.items())},
            "rerun_steps": list(self._reruns),
            "longest_gap_s": self._longest_gap_s,
        }

    def request_stop(self, requested: bool = True) -> None:
        self._stop.set() if requested else self._stop.clear()

    def stop_requested(self) -> tf.Tensor:
        return tf.constant(int(self._stop.is_set()))

    def progress(self) -> tuple[int, int]:
        done = sum(worker.steps_done for worker in self.crew.workers)
        return done, self._steps_done

    # ---- one process runs the program ----

    def exchange(self, message: bytes) -> list[bytes]:
        return [message]

    def broadcast(self, data: bytes) -> bytes:
        return data

    def barrier(self) -> None:
        """Nobody else to wait for, but the steps that run: they end, and no more begin."""
        for schedule in self.crew.open_schedules():
            schedule.stop()
            while not schedule.is_quiet and schedule.error is None:
                time.sleep(_LOOK_EVERY_S / 10)

    def close(self) -> None:
        self.crew.close()
        joined.leave()


def _connect(cluster: Cluster, partitioner, start_timeout_s: float) -> tf.distribute.experimental.ParameterServerStrategy:
    """Blocks until all workers and servers serve."""
    if not supervisor().is_there:
        preflight.meet(cluster, resolve.job_token(cluster), start_timeout_s)
    members = {job: addresses for job, addresses in cluster.jobs().items() if job != "evaluator"}
    joined.begin()
    with devices.joining("tfdist.ParameterServer"), _warnings_alone():  # it says its whole configuration
        return tf.distribute.experimental.ParameterServerStrategy(
            tf.distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec(members), task_type="chief", task_id=0, rpc_layer="grpc"
            ),
            variable_partitioner=partitioner,
        )


@contextlib.contextmanager
def _warnings_alone():
    verbosity, level = logging.get_verbosity(), tf.get_logger().level
    logging.set_verbosity(min(verbosity, logging.WARNING))
    tf.get_logger().setLevel(max(level, tf.compat.v1.logging.WARN))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        tf.get_logger().setLevel(level)
