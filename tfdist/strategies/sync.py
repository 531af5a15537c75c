"""The synchronous strategies: every replica takes part in every step. They differ only in how they are built."""

import contextlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfdist.errors import UserError
from tfdist.strategies import devices, layout
from tfdist.strategies.base import DatasetFn, InputContext, ReplicaStep, Steps


class Synchronous:
    """The shared implementation of `base.Strategy`; see there for the methods."""

    def __init__(self, tf_strategy: tf.distribute.Strategy):
        if keras.backend.backend() != "tensorflow":
            raise UserError(
                f"expected the Keras backend tensorflow, found {keras.backend.backend()}; "
                "set KERAS_BACKEND=tensorflow before Keras is imported"
            )
        self.tf_strategy = tf_strategy
        self.cluster = None
        self.num_replicas = tf_strategy.num_replicas_in_sync
        self.is_chief = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_replicas={self.num_replicas})"

    @contextlib.contextmanager
    def scope(self):
        with self.tf_strategy.scope():
            yield self

    def local_replicas(self) -> int:
        return self.num_replicas

    def distribute(self, dataset_fn: DatasetFn, *, accumulate_steps: int = 1, start_step: int = 0) -> Any:
        context = InputContext(replicas=self.num_replicas, start_step=start_step)
        dataset = dataset_fn(context)
        num_rows = layout.static_rows(dataset)
        if num_rows is None:  # from the very first batch, so that a resumed run lays its batches out alike
            num_rows = layout.first_rows(dataset_fn(InputContext(replicas=self.num_replicas)))
        if start_step and not context.start_step_was_read:
            logging.info("dataset_fn does not use start_step: reading and dropping the first %d batches", start_step)
            dataset = dataset.skip(start_step)
        laid_out = layout.lay_out(dataset, num_rows, accumulate_steps, self.local_replicas())
        laid_out = laid_out.prefetch(2).with_options(_without_autotune())
        # not TensorFlow's distributed iterator: on CPU devices it makes every step wait for its threads (half of an
        # evaluation step on two replicas); here each replica takes its slice of one element
        return iter(laid_out)

    def make_steps(self, replica_step: ReplicaStep) -> Steps:
        names: list[str] = []  # filled while the loop is traced

        def on_replica(batches):
            replica = _local_replica(self.tf_strategy)
            return replica_step(tf.nest.map_structure(lambda t: t[replica], batches), replica)

        def one_step(iterator):
            asked_s = tf.timestamp()
            with tf.control_dependencies([asked_s]):
                batches = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batches)):
                data_wait_s = tf.timestamp() - asked_s
            outputs = self.tf_strategy.run(on_replica, args=(batches,))
            outputs = {name: self.tf_strategy.experimental_local_results(v)[0] for name, v in outputs.items()}
            outputs["data_wait_s"] = data_wait_s
            valid = tf.cast(outputs.pop("valid"), tf.bool)
            names[:] = list(outputs)
            return valid, tf.stack([tf.cast(value, tf.float64) for value in outputs.values()])

        @tf.function(autograph=False)
        def loop(iterator, n):
            def more(done, ended, _):
                return tf.logical_and(done < n, tf.logical_not(ended))

            def body(done, _, table):
                valid, row = one_step(iterator)
                table = tf.cond(valid, lambda: table.write(done, row), lambda: table)
                return done + tf.cast(valid, tf.int32), tf.logical_not(valid), table

            table = tf.TensorArray(tf.float64, size=0, dynamic_size=True, clear_after_read=False)
            # one step at a time, or the clock of data_wait_s would start while the step before still runs
            done, _, table = tf.while_loop(more, body, (0, False, table), parallel_iterations=1)
            return done, table.stack()

        def steps(iterator, n: int) -> tuple[dict[str, np.ndarray], int]:
            done, table = loop(iterator, tf.constant(n, tf.int32))
            done, columns = int(done), table.numpy().T
            if not done:
                return {name: np.zeros([0]) for name in names}, 0
            return dict(zip(names, columns, strict=True)), done

        return steps

    def barrier(self) -> None:
        """One process: nobody to wait for."""

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


def _without_autotune() -> tf.data.Options:
    """Destroying an iterator waits for its autotune thread, which sleeps up to a minute: every exit would."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def _local_replica(tf_strategy) -> int:
    """This replica's index among those of this process; a Python number, known when the graph is traced."""
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    static = replica if isinstance(replica, int) else tf.get_static_value(replica)
    return int(static) % len(tf_strategy.extended.worker_devices)
