"""One replica's part of a step of Keras `fit`, and what makes the parts add up to the step of one device.

A replica computes on its rows of the global batch. Keras' losses and gradients are then those of a mean over its rows, and
`rows / total` is its share: the loss of the batch is the sum over the replicas of share x loss, and so is the gradient.
"""

import contextlib
import contextvars
from collections.abc import Sequence

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.fit.gradients import Gradients
from tfdist.fit.logs import Logs
from tfdist.fit.rows import Of, Rows
from tfdist.fit.whole import Whole
from tfdist.patches.fit import Quirks
from tfdist.patches.layers import ComponentVariables
from tfdist.train import batch_norm, step

_OTHER_ROWS = (
    "fit: expected a loss or a metric to be given an entry for each row of the batch, found another number; on several "
    "replicas one that is no sum over rows needs that"
)
_current: contextvars.ContextVar["Replica | None"] = contextvars.ContextVar("replica", default=None)


def current() -> "Replica | None":
    """The replica that computes here, if a step does."""
    return _current.get()


class Communicates(Exception):
    """A forward or backward pass that is being compiled needs a sum over the replicas in the middle."""


class Replica:
    """Which one computes, on what: made anew whenever a step is traced.

    `rows`: how many of its rows count, a scalar int32. Without any it computes on one row that does not.
    `total`: rows of the global batch.
    `own_step`: whether the `train_step` is the model's own.
    """

    def __init__(
        self, model: keras.Model, components: ComponentVariables, local: int, index: int, count: int,
        rows: tf.Tensor, first_row: tf.Tensor, total: tf.Tensor, fingerprint: tf.Tensor, quirks: Quirks,
        metrics: Sequence[keras.Metric] = (), whole_results: bool = False, own_step: bool = False,
    ):  # fmt: skip
        self.model, self.components, self.quirks = model, components, quirks
        self.local, self.index, self.count = local, index, count
        self.rows, self.first_row, self.total, self.fingerprint = rows, first_row, total, fingerprint
        self.compiled = False  # inside of XLA no collective can stand
        self.seed_generator: keras.random.SeedGenerator | None = None  # of random numbers without a seed of their own
        self.in_step = False  # while the model's own code runs, on one of several replicas
        self.written: dict[int, keras.Variable] = {}  # in this step so far, by id
        self.gradients, self.logs = Gradients(self, own_step), Logs(self, metrics, whole_results)
        self.whole = Whole(self)
        self.reader: Rows | None = None  # of the graph that is being traced
        self.known: dict[int, tuple[Of, tf.Tensor]] = {}  # tensors that the graph alone does not explain, by their id
        for tensor, of in ((rows, Of.COUNT), (total, Of.NOTHING)):
            self.know(tensor, of)

    def know(self, tensor, of: Of):
        """Returns a tensor of this step, of which this is known from now on."""
        self.known[id(tensor)] = of, tensor  # which stays alive, and so does its id
        if self.reader is not None:
            self.reader.know(tensor, of)
        return tensor

    def of(self, tensor: tf.Tensor) -> Of:
        """How a tensor of this step, which is being traced, goes with the rows of the batch."""
        if self.reader is None:
            state = dict.fromkeys(self.logs.state_ids(), Of.UNKNOWN)  # of metrics: each replica has its own
            self.reader = Rows(self.gradients.batch, state | {key: of for key, (of, _) in self.known.items()})
        return self.reader.of(tensor)

    def share(self, dtype) -> tf.Tensor:
        return tf.cast(self.rows / self.total, dtype)

    @contextlib.contextmanager
    def computing(self):
        """Inside, Keras computes for this replica: on its copies of all variables, with batch normalisation over all."""
        token = _current.set(self)
        layers = batch_norm.layers_of(self.model) if self.count > 1 else []
        try:
            epsilon = keras.backend.epsilon()
            with self.components, batch_norm.statistics(layers, self._counts, self._sum_for_batch_norm, epsilon):
                yield
        finally:
            _current.reset(token)

    def _counts(self, layer, inputs) -> tf.Tensor:
        """Whether rows count: all or none, so that inputs may have been reshaped before."""
        return tf.fill([tf.shape(inputs)[0]], self.rows > 0)

    def _sum_for_batch_norm(self, tensor: tf.Tensor) -> tf.Tensor:
        """With the gradient in terms of this replica's loss: others' losses count by their shares."""

        @tf.custom_gradient
        def total(tensor):
            @tf.custom_gradient
            def gradient(upstream):
                mine = tf.where(self.rows > 0, upstream * tf.cast(self.rows, upstream.dtype), tf.zeros_like(upstream))
                return self.sum([mine])[0] / tf.cast(tf.maximum(self.rows, 1), upstream.dtype), refuse

            def refuse(*_):
                raise UserError(
                    "fit: expected batch normalisation that is differentiated once, found the gradient of a gradient "
                    "through it (a gradient penalty); on several replicas use another normalisation"
                )

            return self.sum([tensor])[0], gradient

        return total(tensor)

    def note_written(self, variable: keras.Variable, value) -> None:
        """A variable is assigned. Raises `UserError` for a value that the replicas cannot agree on."""
        if self.count > 1 and variable.aggregation == "sum" and not self.components.holds(variable):
            raise UserError(
                f"fit: expected metrics that a step updates to be attributes of the model, found {variable.path}, which is "
                "of none; without that several replicas cannot add it up"
            )
        self.written[id(variable)] = variable
        if not self.in_step or tf.executing_eagerly() or not tf.is_tensor(value):
            return
        of_metric = id(getattr(variable.value, "handle", variable.value)) in self.logs.state_ids()
        refused = (Of.MIXED,) if variable.aggregation == "sum" else (Of.MIXED, Of.SUM)
        if not of_metric and self.of(value) in refused:
            raise UserError(
                f"fit: expected a step to write means over rows into {variable.path}, or what does not depend on the batch, "
                "found a sum, a maximum or the like, on which several replicas cannot agree; write a mean, or train on one "
                "device"
            )

    # ---- between the replicas ----

    def sum(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """Over all replicas, also in the middle of a forward pass."""
        if self.compiled:
            raise Communicates
        with self.components.suspended(self.model):
            sums = step.all_reduce([tf.identity(tensor) for tensor in tensors])
        return [self.know(total, Of.NOTHING) for total in sums]

    def sum_by_shares(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        return self.sum([self.weighted(tensor) for tensor in tensors]) if tensors else []

    def weighted(self, gradient: tf.Tensor) -> tf.Tensor:
        gradient = tf.convert_to_tensor(gradient)
        weighted = gradient * self.share(gradient.dtype)
        return tf.where(self.rows > 0, weighted, tf.zeros_like(gradient))  # without rows it may be anything

    def means(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Over all rows, of what each replica has for its own."""
        floats = [tf.cast(v, v.dtype if v.dtype.is_floating else tf.float32) for v in values]
        return self.sum_by_shares(floats)

    def gather_rows(self, values: tf.Tensor | tf.RaggedTensor) -> tf.Tensor | tf.RaggedTensor:
        """Of all replicas, in order: [rows, ...] of each -> [total, ...]."""
        mine = values[: self.rows]
        if isinstance(mine, tf.RaggedTensor):
            flat, *lengths = (self._one_after_another(one) for one in (mine.flat_values, *mine.nested_row_lengths()))
            return tf.RaggedTensor.from_nested_row_lengths(flat, lengths)
        return self._one_after_another(mine)

    def _one_after_another(self, mine: tf.Tensor) -> tf.Tensor:
        sent = tf.cast(mine, tf.int32) if mine.dtype == tf.bool else mine  # collectives know no bool
        with self.components.suspended(self.model):
            return tf.cast(tf.distribute.get_replica_context().all_gather(sent, axis=0), mine.dtype)

    def rows_of_all(self, mine: tf.Tensor) -> tf.Tensor:
        """`gather_rows` of a tensor, in the middle of a forward pass. Its gradient is in terms of this replica's loss."""
        if self.compiled:
            raise Communicates

        @tf.custom_gradient
        def gathered(mine):
            whole = self.gather_rows(mine)

            def gradient(upstream):
                first = tf.cast(self.first_row, tf.int32)
                own = upstream[first : first + self.rows] / self.share(upstream.dtype)
                return tf.pad(own, [[0, tf.shape(mine)[0] - self.rows], *[[0, 0]] * (len(mine.shape) - 1)])

            return whole, gradient

        as_many = tf.debugging.assert_equal(tf.shape(mine)[0], tf.maximum(self.rows, 1), _OTHER_ROWS)
        with tf.control_dependencies([as_many] if as_many is not None else []):
            return self.know(gathered(tf.identity(mine)), Of.NOTHING)

    def gather(self, slices: list[tf.IndexedSlices]) -> list[tf.IndexedSlices]:
        """Those of all replicas, one after another."""
        if not slices:
            return []
        if self.compiled:
            raise Communicates
        with self.components.suspended(self.model):
            return tf.distribute.get_replica_context().all_reduce("SUM", slices)
