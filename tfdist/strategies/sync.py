"""The synchronous strategies: every replica takes part in every step. They differ only in how they are built."""

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfdist.cluster.link import supervisor
from tfdist.cluster.resolve import resolve, wants_legacy_keras
from tfdist.cluster.spec import Cluster
from tfdist.errors import DataError, PeerLost, UserError, exit_with_codes
from tfdist.patches import variables
from tfdist.patches.layers import ComponentVariables
from tfdist.strategies import base, devices, input_checks, joined, layout, messages, multi_worker
from tfdist.strategies.base import DatasetFn, InputContext, ReplicaStep, Steps


class Synchronous:
    """The shared implementation of `base.Strategy`; see there for the methods."""

    needs_static_shapes = False  # of what the input yields
    num_servers = 0

    def __new__(cls, *_, **__):
        exit_with_codes()  # before anything can fail
        return super().__new__(cls)

    def __init__(
        self, tf_strategy: tf.distribute.Strategy, cluster: Cluster | None = None, worker_weights: Sequence[float] = ()
    ):  # fmt: skip
        if keras.backend.backend() != "tensorflow":
            raise UserError(
                f"expected the Keras backend tensorflow, found {keras.backend.backend()}; "
                "set KERAS_BACKEND=tensorflow before Keras is imported"
            )
        if wants_legacy_keras():
            raise UserError(
                "expected Keras 3, found TF_USE_LEGACY_KERAS=1, with which tf.keras is tf_keras (Keras 2, not supported); "
                "unset it and `import keras`"
            )
        self.tf_strategy = tf_strategy
        self.cluster = cluster or Cluster()
        workers = self.cluster.collective or (self.cluster.task,)
        self.num_workers, self.worker = len(workers), workers.index(self.cluster.task)
        self.num_replicas = self.num_replicas_in_sync = tf_strategy.num_replicas_in_sync
        self.worker_weights = tuple(worker_weights)
        InputContext(self.worker, self.num_workers, weights=self.worker_weights)  # refuses as many as do not fit
        self.first_replica = self.worker * self.local_replicas()
        self.is_chief = self.worker == 0
        with tf.device("CPU:0"):
            self._stop = tf.Variable(0, dtype=tf.int32, trainable=False)
            self._batches = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        variables.act_as_numbers()
        variables.sums_stay_whole(tf_strategy, self.is_chief)
        supervisor().watch(self.progress)

    def __getattr__(self, name: str):
        raise base.no_such_name(self, name)

    def __repr__(self) -> str:
        workers = f", num_workers={self.num_workers}" if self.num_workers > 1 else ""
        return f"{type(self).__name__}(num_replicas={self.num_replicas}{workers})"

    @contextlib.contextmanager
    def scope(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.tf_strategy.scope())
            stack.enter_context(base.scope_of_fit(self))
            stack.enter_context(self.peers())
            yield self

    @contextlib.contextmanager
    def peers(self):
        """A collective that breaks because somebody else is gone is `PeerLost`, not a bug of this process."""
        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError,
                tf.errors.DeadlineExceededError) as error:  # fmt: skip
            if self.num_workers == 1:
                raise
            raise PeerLost(f"another worker is lost ({type(error).__name__} in a collective)") from error
        except tf.errors.InvalidArgumentError as error:
            if "Shape mismatch in the collective" not in str(error):
                raise
            raise DataError(
                "expected all workers to be at the same place, found one at another: give every worker datasets with the "
                "same number of batches, and let all of them make the same calls"
            ) from error

    def components(self, variables, local: int) -> ComponentVariables:
        """Inside of it they are those of one of this process' replicas."""
        return ComponentVariables(self.tf_strategy, variables, local)

    def copies(self, variable) -> Sequence[tf.Variable]:
        return self.tf_strategy.experimental_local_results(variable.value)

    def report(self) -> dict[str, Any]:
        return {}

    def local_replicas(self) -> int:
        return len(self.tf_strategy.extended.worker_devices)

    # ---- input ----

    def distribute(
        self, dataset_fn: DatasetFn, *, accumulate_steps: int = 1, start_step: int = 0, num_steps: int = 0,
        whole: bool = False,
    ) -> Any:  # fmt: skip
        context = self._input_context(start_step)
        dataset = dataset_fn(context)
        input_checks.check_order(dataset, context)
        num_rows = layout.static_rows(dataset)
        if num_rows is None:  # from the very first batch, so that a resumed run lays its batches out alike
            num_rows = layout.first_rows(dataset_fn(self._input_context()))
        rows_of_workers = [int(rows) for rows in self.exchange(str(num_rows).encode())]
        if start_step and not context.start_step_was_read:
            logging.info("dataset_fn does not use start_step: reading and dropping the first %d batches", start_step)
            dataset = dataset.skip(start_step)
        input_checks.check_length(dataset, start_step, num_steps, whole)
        if self.needs_static_shapes:
            input_checks.check_shapes(dataset)
        laid_out = layout.lay_out(dataset, rows_of_workers, self.worker, accumulate_steps, self.local_replicas())
        laid_out = laid_out.prefetch(2).with_options(layout.without_autotune())
        # not TensorFlow's distributed iterator: on CPU devices it makes every step wait for its threads (half of an
        # evaluation step on two replicas); here each replica takes its slice of one element
        return iter(laid_out)

    def release(self, iterator: Any) -> None:
        """TensorFlow gives it back with the object."""

    def _input_context(self, start_step: int = 0) -> InputContext:
        return InputContext(self.worker, self.num_workers, self.num_replicas, start_step, self.worker_weights)

    # ---- steps ----

    def make_steps(self, replica_step: ReplicaStep) -> Steps:
        names: list[str] = []  # filled while the loop is traced

        def on_replica(batches, stop):
            replica = local_replica(self.tf_strategy)
            return replica_step(tf.nest.map_structure(lambda t: t[replica], batches), stop, replica)

        def one_step(iterator):
            asked_s = tf.timestamp()
            with tf.control_dependencies([asked_s]):
                batches = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batches)):
                data_wait_s = tf.timestamp() - asked_s
                fetched = self._batches.assign_add(1)
            with tf.control_dependencies([fetched]):  # a request that comes while waiting for the input counts
                stop = self._stop.read_value()
            outputs = self.tf_strategy.run(on_replica, args=(batches, stop))
            outputs = {name: self.tf_strategy.experimental_local_results(v)[0] for name, v in outputs.items()}
            outputs["data_wait_s"] = data_wait_s
            valid = tf.cast(outputs.pop("valid"), tf.bool)
            names[:] = list(outputs)
            row = tf.stack([tf.cast(value, tf.float64) for value in outputs.values()])
            with tf.control_dependencies([row, valid]):
                self._steps.assign_add(1)
            return valid, tf.cast(outputs["stop"], tf.bool), row

        @tf.function(autograph=False)
        def loop(iterator, n):
            def more(done, ended, _):
                return tf.logical_and(done < n, tf.logical_not(ended))

            def body(done, _, table):
                valid, stop, row = one_step(iterator)
                table = tf.cond(valid, lambda: table.write(done, row), lambda: table)
                return done + tf.cast(valid, tf.int32), tf.logical_or(tf.logical_not(valid), stop), table

            table = tf.TensorArray(tf.float64, size=0, dynamic_size=True, clear_after_read=False)
            # one step at a time, or the clock of data_wait_s would start while the step before still runs
            done, _, table = tf.while_loop(more, body, (0, False, table), parallel_iterations=1)
            return done, table.stack()

        def steps(iterator, n: int, ahead: int = 0) -> tuple[dict[str, np.ndarray], int]:
            with self.peers():
                done, table = loop(iterator, tf.constant(n, tf.int32))
                done, columns = int(done), table.numpy().T
            if not done:
                return {name: np.zeros([0]) for name in names}, 0
            return dict(zip(names, columns, strict=True)), done

        return steps

    def request_stop(self, requested: bool = True) -> None:
        self._stop.assign(int(requested))

    def stop_requested(self) -> tf.Tensor:
        """int32, for a step to read: whether this process was asked to stop."""
        return self._stop.read_value()

    def progress(self) -> tuple[int, int]:
        return int(self._batches.numpy()), int(self._steps.numpy())

    # ---- between the workers ----

    def exchange(self, message: bytes) -> list[bytes]:
        if self.num_workers == 1:
            return [message]
        return messages.exchange(self._sum_over_workers, message, self.worker, self.num_workers)

    def broadcast(self, data: bytes) -> bytes:
        if self.num_workers == 1:
            return data
        return messages.broadcast(self._sum_over_workers, data, self.worker, self.num_workers)

    def barrier(self) -> None:
        self.exchange(b"")

    def _sum_over_workers(self, array: np.ndarray) -> np.ndarray:
        supervisor().tick()  # sending a large state takes long
        with self.peers():
            return self._sum(tf.constant(array, tf.float32)).numpy()

    @functools.cached_property
    def _sum(self):
        def on_replica(array):
            # counts once per worker; an argument itself has no device, which the reduction asks for
            array = tf.zeros_like(array) if local_replica(self.tf_strategy) else tf.identity(array)
            return tf.distribute.get_replica_context().all_reduce("SUM", array)

        @tf.function(autograph=False)
        def total(array):
            return self.tf_strategy.experimental_local_results(self.tf_strategy.run(on_replica, args=(array,)))[0]

        return total

    def close(self) -> None:
        """TensorFlow frees devices with the process; nothing to give back."""


class OneDevice(Synchronous):
    """One device: the first GPU, else the CPU. The oracle that every other strategy must equal."""

    def __init__(self, device: str | None = None):
        super().__init__(tf.distribute.OneDeviceStrategy(device or devices.default_device()))


class Mirrored(Synchronous):
    """All GPUs of this machine, or `num_devices` of them, or that many logical devices on the CPU.

    Logical CPU devices must be asked for before TensorFlow uses the CPU; too late is an error that says so.
    """

    def __init__(self, num_devices: int = 0):
        super().__init__(tf.distribute.MirroredStrategy(devices.mirrored_devices(num_devices)))


class MultiWorkerMirrored(Synchronous):
    """Several processes, each with its devices. Every worker makes it, before any other TensorFlow work.

    Args:
        cluster: who trains together; default: what the environment says (TF_CONFIG, Slurm, Kubernetes).
        num_devices: replicas per worker. 0: all GPUs, else one; more on a CPU are logical devices, for trying things out.
        communication: "auto", "ring" (gRPC) or "nccl" (GPUs).
        bytes_per_pack: gradients are reduced in packs of at least this size; 0: in one.
        timeout_s: of one collective; 0: none, a supervisor watches over the steps.
        start_timeout_s: how long to wait for the others when no supervisor has met them already.
        worker_weights: how many rows of each batch each worker computes, in proportion, where machines differ in speed:
            2, 1 gives worker 0 twice the rows of worker 1. The numbers stay those of one device.

    Raises `UserError` when the cluster has no other process or TensorFlow has already started, and `PeerLost` when
    another worker does not come.
    """

    def __init__(
        self, cluster: Cluster | None = None, *, num_devices: int = 0, communication: str = "auto",
        bytes_per_pack: int = 0, timeout_s: float = 0.0, start_timeout_s: float = 300.0,
        worker_weights: Sequence[float] = (),
    ):  # fmt: skip
        cluster = cluster or resolve()
        options = {
            "num_devices": num_devices, "communication": communication, "bytes_per_pack": bytes_per_pack,
            "timeout_s": timeout_s,
        }  # fmt: skip
        all_options = options | {"worker_weights": tuple(worker_weights)}
        if (before := joined.before(self, cluster, all_options)) is not None:
            self.__dict__ = before.__dict__  # the same one: its variables are there, on every worker
            return
        tf_strategy = multi_worker.connect(cluster, **options, start_timeout_s=start_timeout_s)
        joined.remember(self, cluster, all_options)
        super().__init__(tf_strategy, cluster, worker_weights)
        if tf.compat.v1.get_seed(None) == (None, None):  # what shuffles without a seed does so alike on all workers
            tf.random.set_seed(int.from_bytes(self.exchange(os.urandom(4))[0], "little"))


def local_replica(tf_strategy) -> int:
    """This replica's index among those of this process; a Python number, known when the graph is traced."""
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    static = replica if isinstance(replica, int) else tf.get_static_value(replica)
    return int(static) % len(tf_strategy.extended.worker_devices)
