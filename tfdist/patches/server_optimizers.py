"""Keras optimizers on parameter servers: their variables are in parts, and each part is updated by itself."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from tfdist.patches.servers import Local, bound, components


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Those that it was built for. What: `Optimizer._trainable_variables`. Versions: Keras 3.10-3.15."""
    return list(optimizer._trainable_variables)


@contextlib.contextmanager
def _known(optimizer: keras.optimizers.Optimizer, variable: keras.Variable):
    """Inside, the optimizer finds what it keeps for a variable that is bound to something else.

    What: `Optimizer._trainable_variables_indices`, `_var_key`. Versions: Keras 3.10-3.15.
    """
    indices, key = optimizer._trainable_variables_indices, optimizer._var_key(variable)
    before = indices.get(key)
    indices[key] = _index_of(optimizer, variable)
    try:
        yield
    finally:
        indices.pop(key) if before is None else indices.update({key: before})


def _index_of(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> int:
    return next(i for i, one in enumerate(optimizer._trainable_variables) if one is variable)


@contextlib.contextmanager
def on_part(optimizer: keras.optimizers.Optimizer, variable: keras.Variable, place: int, values: dict[int, Any]):
    """Inside, a variable and the optimizer's slots are their parts number `place`, and its scalars the given `values`.
    Why: Keras' optimizers raise on a ShardedVariable."""

    def value(one: keras.Variable):
        parts = components(one)
        return values[id(one)] if id(one) in values else parts[min(place, len(parts) - 1)]

    with bound([(one, value(one)) for one in (variable, *optimizer.variables)]), _known(optimizer, variable):
        yield


@contextlib.contextmanager
def on_rows(optimizer: keras.optimizers.Optimizer, variable: keras.Variable, rows: tf.Tensor):
    """Inside `on_part`: the variable and its slots are these rows of theirs alone, written back at the end."""
    shape = variable._value.shape
    rows_of = [(one, one._value, Local(tf.gather(one._value, rows)))
             for one in (variable, *_slots_of(optimizer, variable)) if one._value.shape == shape]  # fmt: skip
    read = [local.tensor for _, _, local in rows_of]
    with bound([(one, local) for one, _, local in rows_of]), _known(optimizer, variable):
        yield
    for (_, part, local), old in zip(rows_of, read, strict=True):
        if local.tensor is not old:
            part.scatter_update(tf.IndexedSlices(local.tensor, rows))


def _slots_of(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> list[keras.Variable]:
    """What the optimizer keeps for it.

    What: the lists of an optimizer that run beside `_trainable_variables`. Versions: Keras 3.10-3.15.
    """
    index = _index_of(optimizer, variable)
    own, number = {id(one) for one in optimizer.variables}, len(optimizer._trainable_variables)
    others = ("_variables", "_trainable_variables")
    lists = [value for name, value in vars(optimizer).items()
             if name not in others and isinstance(value, list) and len(value) == number]  # fmt: skip
    return [value[index] for value in lists if id(value[index]) in own]


def scalars(optimizer: keras.optimizers.Optimizer, count: tf.Tensor) -> dict[int, Any]:
    """By id: what its scalar variables are for one update; `count`: how many came before it."""
    slots = {id(slot) for one in optimizer._trainable_variables for slot in _slots_of(optimizer, one)}
    own = [v for v in optimizer.variables if not len(v._shape) and id(v) not in slots]
    found = {id(v): tf.convert_to_tensor(components(v)[0]) for v in own}
    return found | {id(optimizer._iterations): tf.cast(count, optimizer._iterations._dtype)}


@contextlib.contextmanager
def bound_scalars(optimizer: keras.optimizers.Optimizer, count: tf.Tensor):
    """Inside, the optimizer's scalars are those of one update."""
    values = scalars(optimizer, count)
    with bound([(one, values[id(one)]) for one in optimizer.variables if id(one) in values]):
        yield


def updates_all_at_once(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether it keeps something that changes once per update and belongs to no variable (Nadam).

    What: an own `_backend_update_step`. Why: here each variable is updated by itself. Versions: Keras 3.10-3.15.
    """
    return type(optimizer)._backend_update_step is not keras.optimizers.SGD._backend_update_step
