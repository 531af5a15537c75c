"""Variables that live on several replicas, seen from outside of a step."""

import numpy as np
import tensorflow as tf


def act_as_numbers() -> None:
    """From now on `float`, `int` and NumPy take a variable of several replicas for its value, as they take a plain one.

    What: `DistributedVariable.__float__`, `__int__`, `__array__`, which stay: callbacks read variables long after the scope.
    Why: `float(model.optimizer.learning_rate)` in a callback fails. Versions: TensorFlow 2.19-2.21.
    """
    from tensorflow.python.distribute.values import DistributedVariable

    def array(self, dtype=None, copy=None):
        return np.array(self.numpy(), dtype)  # a copy always

    if not hasattr(DistributedVariable, "__float__"):
        DistributedVariable.__array__ = array
        DistributedVariable.__float__ = lambda self: float(self.numpy())
        DistributedVariable.__int__ = lambda self: int(self.numpy())


def sums_stay_whole(strategy: tf.distribute.Strategy, holds_sums: bool) -> None:
    """From now on a value that is assigned, outside of a step, to a variable whose replicas add up is what they add up to.

    What: `SyncOnReadVariable.assign`, for this strategy. Why: TensorFlow gives each replica its part of the value, and
    parts of whole numbers are cut: a confusion matrix that is updated by hand stays 0. Versions: TensorFlow 2.19-2.21.

    Args:
        holds_sums: whether the first replica of this process is the one that gets the value; all others get 0.
    """
    from tensorflow.python.distribute import distribute_lib, values, values_util

    stock = values.SyncOnReadVariable.assign
    strategy.tfdist_holds_sums = holds_sums
    if hasattr(stock, "of_tfdist"):
        return

    def assign(self, value, *args, **kwargs):
        holds = getattr(self.distribute_strategy, "tfdist_holds_sums", None)
        adds_up = holds is not None and self.aggregation == tf.VariableAggregation.SUM
        if not adds_up or values_util.is_saving_non_distributed():
            return stock(self, value, *args, **kwargs)
        with distribute_lib.enter_or_assert_strategy(self.distribute_strategy):
            if not tf.distribute.in_cross_replica_context() or values_util.in_replica_update_context():
                return stock(self, value, *args, **kwargs)
            for i, part in enumerate(self.values):
                part.assign(tf.cast(value, part.dtype) if holds and i == 0 else tf.zeros_like(part))
        return self

    assign.of_tfdist = True
    values.SyncOnReadVariable.assign = assign
