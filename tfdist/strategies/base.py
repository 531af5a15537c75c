"""What the loop and the step need of a strategy, and no more."""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from tfdist.cluster.spec import Cluster
from tfdist.errors import UserError


class InputContext:
    """What a `dataset_fn` is told. Its dataset yields, per element, this pipeline's rows of one global batch.

    Which rows those are, `rows` says: micro-batches, dropout masks and batch statistics then are those of one device.
    `pipeline` of `pipelines`: which input pipeline this is; one per worker. `replicas`: over all workers, as many in each.
    `weights`: how many rows each pipeline reads, in proportion; none: as many each.
    `given_steps`: what `steps` gives, where they are dealt out.
    `start_step`: the first element must be the one of this step; a function that never looks at it gets
    `Dataset.skip(start_step)`.
    """

    def __init__(
        self, pipeline: int = 0, pipelines: int = 1, replicas: int = 0, start_step: int = 0, weights: Sequence[float] = (),
        given_steps: Callable[[], tf.data.Dataset] | None = None,
    ):  # fmt: skip
        self.pipeline, self.pipelines, self.replicas = pipeline, pipelines, replicas or pipelines
        if weights and len(weights) != pipelines:
            raise UserError(f"worker_weights: expected one for each of {pipelines} workers, found {len(weights)}")
        self.weights = tuple(weights)
        self._start_step, self.start_step_was_read = start_step, False
        self.steps_were_read, self.end = False, None  # what `steps` was asked for
        self._given_steps = given_steps

    @property
    def start_step(self) -> int:
        self.start_step_was_read = True
        return self._start_step

    def steps(self, end: int | None = None) -> tf.data.Dataset:
        """The numbers of the steps that this pipeline reads, int64: from `start_step` on, below `end` if there is one. Under
        parameter servers just those that are this worker's, one when it is due: a dataset that is a `map` of them reads
        nothing in vain there."""
        self.start_step_was_read = self.steps_were_read = True
        self.end = end
        if self._given_steps is not None:
            return self._given_steps()
        return tf.data.Dataset.range(self._start_step, np.iinfo(np.int64).max if end is None else end)

    def rows(self, global_batch_size: int, accumulate_steps: int = 1) -> np.ndarray:
        """Which rows of every global batch this pipeline reads: its part of each micro-batch. Disjoint and complete.

        Micro-batch m is the m-th contiguous block of the batch, on any number of replicas; it goes to one replica after
        another.
        """
        block = -(-global_batch_size // accumulate_steps)  # rows per micro-batch
        first, end = (self._bound(block, pipeline) for pipeline in (self.pipeline, self.pipeline + 1))
        part = np.arange(first, end)
        rows = (np.arange(accumulate_steps)[:, None] * block + part).reshape(-1)
        return rows[rows < global_batch_size]

    def _bound(self, block: int, pipeline: int) -> int:
        """Which row of a micro-batch is the first of a pipeline: with equal weights shares differ by one at most."""
        weights = self.weights or (1.0,) * self.pipelines
        return round(block * math.fsum(weights[:pipeline]) / math.fsum(weights))


DatasetFn = Callable[[InputContext], tf.data.Dataset]


class Batch(NamedTuple):
    """One replica's share of one global batch: M micro-batches of c rows."""

    x: Any  # nest of [M, c, ...]
    y: Any  # nest of [M, c, ...]
    weight: Any  # [M, c, ...] float, or a dict of them; 0 for rows that are padding
    first_row: tf.Tensor  # [M] int64: index within the global batch of each micro-batch's row 0
    rows: tf.Tensor  # [M] int32: how many of the c rows of each micro-batch are real; padding comes after them
    block_rows: tf.Tensor  # scalar int32: rows of a whole micro-batch, over all replicas
    valid: tf.Tensor  # scalar bool: False once the input has ended


# One replica's step: (its batch, whether its process was asked to stop, its local replica index) -> scalars that are
# equal on every replica. The key "valid" says whether any replica still had input, "stop" whether any process was asked
# to stop: with that step the loop ends, on all of them.
ReplicaStep = Callable[[Batch, tf.Tensor, int], dict[str, tf.Tensor]]

# (iterator, n, ahead) -> (per-step scalars, each of shape [done]; done). done < n at the end of the input, or when a
# process was asked to stop: then the last entry of "stop" is 1. `ahead`: so many steps more may be begun, where steps
# run beside each other; they are done when that many more were asked for, or when all stop (then done > n may be).
Steps = Callable[[Any, int, int], tuple[dict[str, np.ndarray], int]]


def scope_of_fit(strategy: "Strategy") -> AbstractContextManager:
    """What holds inside of every scope: Keras models that are made there train with tfdist. Loaded by name, because `fit`
    stands above: the one arrow of the house that points up."""
    return importlib.import_module("tfdist.fit").models_made_here(strategy)


def no_such_name(strategy: "Strategy", name: str) -> AttributeError:
    """The error for a name that a strategy does not have: TensorFlow's own have, which its tutorials use."""
    if name.startswith("_") or not hasattr(tf.distribute.Strategy, name):
        return AttributeError(f"{type(strategy).__name__} has no attribute {name!r}")
    return AttributeError(
        f"{type(strategy).__name__}.{name}: expected a loop of tfdist's, found one of TensorFlow's own; use "
        f"tfdist.Trainer or Keras `fit`, which reduce, clip and weigh as one device does, or strategy.tf_strategy.{name}"
    )


class Strategy(Protocol):
    """A cluster of devices that trains one model. Constructed by every worker; the chief alone writes."""

    tf_strategy: tf.distribute.Strategy
    cluster: Cluster  # the processes that train together
    num_workers: int
    num_replicas: int  # over all workers
    num_replicas_in_sync: int  # the same, by TensorFlow's name
    first_replica: int  # the global index of this process' replica 0
    is_chief: bool  # the one process that writes
    num_servers: int  # that hold the variables; 0: every replica has its own

    def scope(self) -> AbstractContextManager:
        """Variables made inside live on every replica."""

    def distribute(
        self, dataset_fn: DatasetFn, *, accumulate_steps: int = 1, start_step: int = 0, num_steps: int = 0,
        whole: bool = False,
    ) -> Any:  # fmt: skip
        """An endless iterator for `steps`; batches that are not valid follow the end of the input.

        `num_steps`: how many will be asked for; `whole`: all there are. What cannot be is reported here, not at the end.
        """

    def release(self, iterator: Any) -> None:
        """An input that is not read any more."""

    def make_steps(self, replica_step: ReplicaStep) -> Steps:
        """Compiles a loop of any length around one replica step."""

    def components(self, variables: list, local: int) -> AbstractContextManager:
        """Inside, Keras variables are what one replica of this process computes with: plain and compilable."""

    def copies(self, variable) -> Sequence[tf.Variable]:
        """The plain variables that hold it: one on each replica of this process, or its parts on the servers."""

    def report(self) -> dict[str, Any]:
        """What is worth a line at the end of a run; empty: nothing."""

    def local_replicas(self) -> int:
        """How many replicas this process drives."""

    def exchange(self, message: bytes) -> list[bytes]:
        """Everybody's message (at most 1,000 bytes each), in the order of the workers. Every worker calls it."""

    def broadcast(self, data: bytes) -> bytes:
        """The chief's data, on every worker; what the others pass is not looked at. Every worker calls it."""

    def barrier(self) -> None:
        """Returns when every worker has come here."""

    def request_stop(self, requested: bool = True) -> None:
        """Asks the running loop to end after the step in flight, on every worker. From any thread."""

    def stop_requested(self) -> tf.Tensor:
        """int32, for a step of one's own to read: whether this process was asked to stop."""

    def progress(self) -> tuple[int, int]:
        """(batches fetched, steps done) of all loops so far, also while one runs. From any thread."""

    def close(self) -> None:
        """Gives back what the strategy holds. It cannot be used afterwards."""
