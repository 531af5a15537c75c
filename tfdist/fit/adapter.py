"""Keras `fit` under a tfdist strategy: models that are made under its scope train, evaluate and predict with the numbers of
one device, on every strategy. Nothing of Keras is changed but while one of their methods runs."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras

from tfdist import patches
from tfdist.fit import replica
from tfdist.fit.functions import Steps
from tfdist.fit.input import Input
from tfdist.strategies import base

METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")


@contextlib.contextmanager
def models_made_here(strategy: base.Strategy):
    """Inside, each Keras model that is made gets an `Adapter`."""
    with patches.models_made(lambda model: Adapter(strategy, model)):
        yield


class Adapter:
    """Of one model: puts itself in front of its methods."""

    def __init__(self, strategy: base.Strategy, model: keras.Model):
        self.strategy, self.model = strategy, model
        self.input = Input(strategy)
        self.depth = 0  # `fit` calls `evaluate`
        patches.own_methods(model, **{name: self._wrapped(name) for name in METHODS})

    def _wrapped(self, name: str) -> Callable:
        stock = getattr(type(self.model), name)

        @functools.wraps(stock)
        def method(*args, **kwargs):
            with self._in_force():
                return stock(self.model, *args, **kwargs)

        return method

    @contextlib.contextmanager
    def _in_force(self):
        self.depth += 1
        try:
            with contextlib.ExitStack() as stack:
                if self.depth == 1:
                    for part in self._parts():
                        stack.enter_context(part)
                yield
        finally:
            self.depth -= 1

    def _parts(self) -> list:
        make = {f"make_{name}_function": functools.partial(self._make, name) for name in ("train", "test", "predict")}
        return [
            patches.fit_parts(self.model, self.input, self._build, **make),
            patches.losses_of_replicas(replica.in_replica, replica.reduce_loss),
            patches.means_of_replicas(replica.weight_of_mean),
            patches.updates_of_replicas(replica.in_replica, replica.apply_gradients),
            patches.writes_noted(replica.note_written),
        ]

    def _build(self, stock: Callable, iterator: Any = None, data_batch: Any = None) -> None:
        """Makes the variables of model, metrics and optimizer, from shapes and types alone."""
        with patches.strategy_of(self.model, self.strategy.tf_strategy):
            stock(data_batch=self.input.symbolic(data_batch))

    def _make(self, name: str, force: bool = False) -> Callable:
        function = getattr(self.model, f"{name}_function")
        if function is None or force:
            if not self.model.built:
                with self.strategy.scope():
                    self.model(keras.utils.unpack_x_y_sample_weight(self.input.symbolic())[0])
            steps = Steps(self.strategy, self.model, self.input, seed=0)
            function = getattr(steps, f"{name}_function")()
            setattr(self.model, f"{name}_function", function)
        return function


base.IN_SCOPE.append(models_made_here)
