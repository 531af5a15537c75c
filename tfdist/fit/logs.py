"""What a step of Keras `fit` logs on one of several replicas, and which logs are results of metrics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from absl import logging

from tfdist.fit.rows import Of
from tfdist.patches import graphs, servers

if TYPE_CHECKING:
    from tfdist.fit.replica import Replica


class ComputedFromResults(Exception):
    """A step logs what is computed from the result of a metric: it needs that of all replicas while it runs."""


class Logs:
    """Those of one replica's step.

    `metrics`: all that the model keeps. `whole_results`: their results are those of all replicas already in the step.
    """

    def __init__(self, replica: "Replica", metrics: Sequence[keras.Metric], whole_results: bool):
        self.replica, self.metrics, self.whole_results = replica, metrics, whole_results
        self.results: dict[int, tuple[keras.Metric, str | None, tf.Tensor]] = {}  # of metrics, in this step: by their id
        self.added: set[str] = set()  # logs that are sums over the replicas, not means
        self.logged: dict[str, tuple[keras.Metric, str | None] | None] = {}  # each log: which result it is, if it is one
        self.state_began_with: set[int] = set()  # ids of tensors, on a worker of parameter servers
        self.before: dict[int, tf.Tensor] = {}  # the step: what metrics held, by the id of their variable

    def result(self, stock, metric: keras.Metric):
        """A metric's result: of this replica, or, with `whole_results`, of all."""
        result = stock()
        if self.whole_results:
            state = [tf.where(self.replica.rows > 0, v.value, self.before.get(id(v), v.value)) for v in metric.variables]
            with servers.locals_in_place(list(zip(metric.variables, self.replica.sum(state), strict=True))):
                result = stock()
        for key, tensor in result.items() if isinstance(result, dict) else [(None, result)]:
            self.results[id(tensor)] = metric, key, tensor  # which stays alive, and so does its id
        return result

    def note(self, logs) -> dict[str, Any]:
        """By name, as Keras logs them; and which of them are results of metrics, whatever their names."""
        logs = logs if isinstance(logs, dict) else {"": logs}
        for name in [name for name, value in logs.items() if isinstance(value, dict)]:
            logs = {key: value for key, value in logs.items() if key != name} | logs[name]
        found = {name: self.results.get(id(value)) for name, value in logs.items()}
        self.logged = {name: result and result[:2] for name, result in found.items()}
        state = set() if self.whole_results else self.state_ids()
        for name, value in logs.items():
            if not found[name] and tf.is_tensor(value) and graphs.reads(value, state):
                raise ComputedFromResults(name)
            if not found[name] and tf.is_tensor(value) and not tf.executing_eagerly():
                self._note_kind(name, self.replica.of(value))
        return logs

    def _note_kind(self, name: str, of: Of) -> None:
        if of in (Of.SUM, Of.COUNT):
            self.added.add(name)
        elif of not in (Of.MEAN, Of.NOTHING):
            logging.log_first_n(
                logging.WARNING,
                "fit: the log %r is no mean and no sum over rows: it is the mean of what each replica has, not what one "
                "device has; a metric that is given y_true and y_pred has that", 8, name,
            )  # fmt: skip

    def state_ids(self) -> set[int]:
        """Ids of what holds it: handles of variables, or, on a worker of parameter servers, the tensors it began with."""
        return self.state_began_with or {
            id(getattr(v.value, "handle", v.value)) for metric in self.metrics for v in metric.variables
        }
