"""Keras layers and variables: one replica's component of a variable, statistics of batch normalisation, layers of layers."""

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any

import keras


class ComponentVariables:
    """Inside, each Keras variable is its component on local replica `replica`: a plain, compilable resource variable.

    What: swaps `keras.Variable._value`.
    Why: assigning to a MirroredVariable in a replica calls `merge_call`, which XLA cannot compile; on components the
    whole optimizer update compiles and costs nothing over a one-device step. Traced per replica, one thread at a time.
    Upstream: Keras has no public way to bind a variable's value. Versions: Keras 3.10-3.15.
    """

    def __init__(self, tf_strategy, variables: list[Any], replica: int):
        self._variables, self._held = list(variables), {id(variable) for variable in variables}
        self._whole = [variable._value for variable in self._variables]
        self._components = [tf_strategy.experimental_local_results(value)[replica] for value in self._whole]

    def holds(self, variable) -> bool:
        return id(variable) in self._held

    def __enter__(self):
        for variable, value in zip(self._variables, self._components, strict=True):
            variable._value = value
        return self

    def __exit__(self, *_):
        for variable, value in zip(self._variables, self._whole, strict=True):
            variable._value = value

    @contextlib.contextmanager
    def suspended(self, model: keras.Layer):
        """Around a collective in the middle of a forward or backward pass: there Mirrored goes on with the thread of the
        next replica, which must find everything as this one found it, and this one again what its layers noted so far:
        losses added, tensors kept for later."""
        layers = all_layers(model)
        held = [(vars(layer), {name: (v, _copy(v)) for name, v in vars(layer).items()}) for layer in layers]
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
            for attributes, before in held:
                for name, (value, content) in before.items():
                    attributes[name] = value
                    if content is not None and not _same(value, content):
                        value.clear()
                        value.update(content) if isinstance(value, dict) else value.extend(content)


def _same(value, content) -> bool:
    pairs = zip(_flat(value), _flat(content), strict=False)
    return len(value) == len(content) and all(a is b for a, b in pairs)


def _flat(value) -> list:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _copy(value):
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else None


_moments_of_this_thread: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("moments", default=None)


@contextlib.contextmanager
def batch_norm_moments(moments: Callable):
    """Inside, every BatchNormalization takes `moments(layer, inputs, mask)` for the mean and variance of its batch.

    What: `BatchNormalization._moments`, once, by one that asks this thread: Mirrored traces its replicas in turns.
    Why: `synchronized=True` weighs replicas alike and counts padding rows, a mask turns the synchronisation off, and a layer
    made without it cannot be told later. Versions: Keras 3.10-3.15.
    """
    layer = keras.layers.BatchNormalization
    if not hasattr(layer._moments, "without_tfdist"):
        stock = layer._moments

        def chosen(self, inputs, mask):
            return (_moments_of_this_thread.get() or stock)(self, inputs, mask)

        chosen.without_tfdist = stock
        layer._moments = chosen
    token = _moments_of_this_thread.set(moments)
    try:
        yield
    finally:
        _moments_of_this_thread.reset(token)


@contextlib.contextmanager
def batch_norm_put_back():
    """After it, `BatchNormalization._moments` is Keras' own again, if it was before."""
    layer = keras.layers.BatchNormalization
    was_stock = not hasattr(layer._moments, "without_tfdist")
    try:
        yield
    finally:
        if was_stock and hasattr(layer._moments, "without_tfdist"):
            layer._moments = layer._moments.without_tfdist


def state_of_layers(layers: list[keras.Layer]) -> list[keras.Variable]:
    """Weights that were made as not trainable: moving statistics, counters. Not those of a frozen layer.

    What: `Layer._non_trainable_variables`. Why: `non_trainable_weights` lists frozen weights too. Versions: Keras 3.10-3.15.
    """
    found = {id(v): v for layer in layers for v in layer._non_trainable_variables}
    return list(found.values())


def metrics_of_layers(layers: list[keras.Layer]) -> list[keras.Metric]:
    """Metrics that are attributes of layers. What: `Layer._metrics`. Why: a model's own `metrics` may leave some out.
    Versions: Keras 3.10-3.15."""
    return [metric for layer in layers for metric in layer._metrics]


def all_layers(model: keras.Layer) -> list[keras.Layer]:
    """The model and every layer inside it, at any depth.

    What: `Layer._flatten_layers`. Why: public `Model.layers` lists the top level only. Versions: Keras 3.10-3.15.
    """
    return list(model._flatten_layers(include_self=True))
