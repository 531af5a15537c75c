"""Entries for parameter servers: variables that are not where the computation is."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def components(variable: keras.Variable) -> list[tf.Variable]:
    """The plain variables on the servers that hold it: one, or the parts of its first axis, in order.

    What: `ShardedVariable.variables`, and what TensorFlow wraps around each (`CachingVariable`, `AggregatingVariable`).
    Why: gradients and Keras' optimizers fail on a ShardedVariable; they work on its parts. Versions: TensorFlow 2.19-2.21.
    """
    return plain(variable._value)


def plain(value) -> list[tf.Variable]:
    """`components` of what a Keras variable holds."""
    if isinstance(value, (tf.Tensor, Local, Table)):
        raise AssertionError("a variable of the servers was expected, found the value of a step")
    found = list(getattr(value, "variables", [value]))
    while any(hasattr(one, "_v") for one in found):
        found = [getattr(one, "_v", one) for one in found]
    return found


def parts_are_arrays() -> None:
    """From now on NumPy takes a variable that is cut for its whole value.

    What: `ShardedVariable.__array__`, which stays: a model is saved long after its scope. Why: Keras saves through it.
    Versions: TensorFlow 2.19-2.21.
    """
    from tensorflow.python.distribute.sharded_variable import ShardedVariable

    def array(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype)

    if not hasattr(ShardedVariable, "__array__"):
        ShardedVariable.__array__ = array


def whole(variable: keras.Variable) -> tf.Tensor:
    """Its value, of all parts."""
    parts = [part.read_value() for part in components(variable)]
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def in_place(variable: keras.Variable):
    """What it is bound to now."""
    return variable._value


def results_after(model: keras.Model, wait: Callable[[], None]) -> dict[str, Callable]:
    """Methods of a model whose metrics are read at the end of an epoch after `wait`.

    What: `Trainer._get_metrics_result_or_logs`. Why: steps may still run then. Versions: Keras 3.10-3.15.
    """
    stock = model._get_metrics_result_or_logs

    def results(logs):
        wait()
        return stock(logs)

    return {"_get_metrics_result_or_logs": results}


class Local:
    """A value that a step may write: stands for a variable of the servers."""

    def __init__(self, tensor: tf.Tensor):
        self.tensor = tensor

    def __getattr__(self, name: str):
        return getattr(self.__dict__["tensor"], name)

    @property
    def _unique_id(self) -> str:
        return f"local_{id(self)}"

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self.tensor, dtype, name=name)

    def assign(self, value, *args, **kwargs):
        self.tensor = tf.cast(value, self.tensor.dtype)
        return self

    def assign_add(self, delta, *args, **kwargs):
        return self.assign(self.tensor + tf.cast(tf.convert_to_tensor(delta), self.tensor.dtype))

    def assign_sub(self, delta, *args, **kwargs):
        return self.assign(self.tensor - tf.cast(tf.convert_to_tensor(delta), self.tensor.dtype))

    def read_value(self) -> tf.Tensor:
        return self.tensor


class Table:
    """Stands for the table of an Embedding: rows come from the servers when they are looked up, each once."""

    def __init__(self, parts: list[tf.Variable], dtype: str, shape):
        self.parts, self.dtype, self.shape = parts, tf.as_dtype(dtype), tf.TensorShape(shape)
        self.tape: tf.GradientTape | None = None
        self.found: list[tuple[tf.Tensor, tf.Tensor]] = []  # (ids, rows) of each look-up
        self.was_read_whole = False
        if _made is not None:
            _made.append(self)

    def __tf_tensor__(self, dtype=None, name=None):
        self.was_read_whole = True
        parts = [part.read_value() for part in self.parts]
        return tf.convert_to_tensor(parts[0] if len(parts) == 1 else tf.concat(parts, 0), dtype, name=name)

    def look_up(self, ids: tf.Tensor) -> tf.Tensor:
        """ids [...] -> rows [..., dim]."""
        unique, places = tf.unique(tf.reshape(ids, [-1]))
        parts = self.parts if len(self.parts) > 1 else self.parts[0]
        rows = tf.compat.v1.nn.embedding_lookup(parts, unique, partition_strategy="div")
        if self.tape is not None:
            self.tape.watch(rows)
            self.found.append((unique, rows))
        return tf.reshape(tf.gather(rows, places), tf.concat([tf.shape(ids), self.shape[1:]], 0))


class Pulled:
    """Inside, each Keras variable is its value as a worker has taken it from the servers, for one step.

    What: swaps `keras.Variable._value`: weights become tensors, what a forward pass may write a `Local`, and the tables that
    are `by_rows` a `Table`.
    Why: a compiled function cannot hold a variable of another machine, every read of one would cross the network, and Keras
    can neither differentiate nor update a ShardedVariable. Upstream: Keras has no public way to bind a variable's value.
    Versions: Keras 3.10-3.15.
    """

    def __init__(self, variables: list[keras.Variable], by_rows: tuple[keras.Variable, ...] = ()):
        self._variables, self._by_rows = list(variables), {id(variable) for variable in by_rows}
        self.tape: tf.GradientTape | None = None

    def __enter__(self):
        self._whole = [variable._value for variable in self._variables]
        for variable, value in zip(self._variables, self._whole, strict=True):
            parts = plain(value)
            if id(variable) in self._by_rows:
                variable._value = Table(parts, variable._dtype, variable._shape)
                continue
            read = [part.read_value() for part in parts]
            tensor = read[0] if len(read) == 1 else tf.concat(read, 0)
            variable._value = tensor if variable.trainable else Local(tensor)
        return self

    def __exit__(self, *_):
        for variable, value in zip(self._variables, self._whole, strict=True):
            variable._value = value

    # ---- gradients: `train.step` differentiates through these ----

    def watch(self, tape: tf.GradientTape, variables: list[keras.Variable]) -> None:
        for variable in variables:
            value = variable._value
            if isinstance(value, Table):
                value.tape, value.found = tape, []
            else:
                tape.watch(value.tensor if isinstance(value, Local) else value)

    def gradients(self, tape: tf.GradientTape, target: tf.Tensor, variables: list[keras.Variable]) -> list:
        """None, a tensor, or for a table that is looked up the IndexedSlices of its rows, each row once."""
        values = [variable._value for variable in variables]
        sources = [
            [rows for _, rows in value.found] if isinstance(value, Table)
            else value.tensor if isinstance(value, Local) else value
            for value in values
        ]  # fmt: skip
        found = tape.gradient(target, sources)
        return [
            slices_of_table(value, gradient) if isinstance(value, Table)
            else None if gradient is None else tf.convert_to_tensor(gradient)
            for value, gradient in zip(values, found, strict=True)
        ]  # fmt: skip


def slices_of_table(table: Table, gradients: list) -> tf.IndexedSlices | None:
    pairs = [(ids, g) for (ids, _), g in zip(table.found, gradients, strict=True) if g is not None]
    if not pairs:
        return None
    slices = [
        tf.IndexedSlices(tf.convert_to_tensor(g), tf.cast(ids, tf.int64), dense_shape(table.shape)) for ids, g in pairs
    ]
    return add_slices(slices)


def dense_shape(shape) -> tf.Tensor:
    """As IndexedSlices want it."""
    return tf.constant(tf.TensorShape(shape).as_list(), tf.int64)


def add_slices(slices: list[tf.IndexedSlices]) -> tf.IndexedSlices:
    """Their sum, each row once."""
    if len(slices) == 1:
        return slices[0]
    ids, places = tf.unique(tf.concat([one.indices for one in slices], 0))
    values = tf.math.unsorted_segment_sum(tf.concat([one.values for one in slices], 0), places, tf.size(ids))
    return tf.IndexedSlices(values, ids, slices[0].dense_shape)


_made: list[Table] | None = None


@contextlib.contextmanager
def watched_tables():
    """Inside, every `Table` that is made is also put into the list that this gives."""
    global _made
    _made = []
    try:
        yield _made
    finally:
        _made = None


@contextlib.contextmanager
def pulled_values():
    """Inside, layers work with what `Pulled` puts in place of their variables.

    What: `Embedding.call`: looks up the rows of a `Table` on the servers; `ops.take` would read all of it first, 25 MB for
    16 kB of rows. `tf.recompute_grad`: keeps activations instead; it finds no gradient for weights that are no variables.
    Keras: no issue known. Versions: Keras 3.10-3.15, TensorFlow 2.19-2.21.
    """
    layer = keras.layers.Embedding
    stock = layer.call

    def call(self, inputs):
        table = getattr(self, "_embeddings", None)
        table = table if table is not None else self.embeddings
        if not isinstance(getattr(table, "_value", None), Table):
            return stock(self, inputs)
        ids = tf.convert_to_tensor(inputs)
        ids = ids if ids.dtype in (tf.int32, tf.int64) else tf.cast(ids, tf.int32)
        return tf.cast(table._value.look_up(ids), self.compute_dtype)

    layer.call = call
    recompute = tf.recompute_grad
    tf.recompute_grad = lambda fn: fn
    try:
        yield
    finally:
        layer.call, tf.recompute_grad = stock, recompute


def tables(layers: list[keras.Layer], trainable: list[keras.Variable]) -> tuple[keras.Variable, ...]:
    """The tables of stock Embedding layers among the trainable variables."""
    found = [one for one in layers if isinstance(one, keras.layers.Embedding)]
    plain_ones = [one for one in found if type(one).call is keras.layers.Embedding.call and not one.lora_enabled]
    held = {id(v) for one in plain_ones for v in one.variables if one.embeddings_constraint is None}
    return tuple(variable for variable in trainable if id(variable) in held)


@contextlib.contextmanager
def tapes_of(pulled: Pulled, variables: list[keras.Variable], before_each: Callable[[], None]):
    """Inside, a GradientTape that somebody else makes (Keras' `train_step`) calls `before_each` when it begins, watches the
    values of `variables`, and can be asked for the gradient of a `Table`.

    What: `tf.GradientTape.__enter__` and `gradient`. Why: a tape watches variables by itself, tensors not.
    """
    stock_enter, stock_gradient = tf.GradientTape.__enter__, tf.GradientTape.gradient

    def enter(self):
        before_each()
        tape = stock_enter(self)
        pulled.watch(tape, variables)
        return tape

    def gradient(self, target, sources, *args, **kwargs):
        if not isinstance(sources, (list, tuple)):
            return stock_gradient(self, target, sources, *args, **kwargs)
        sources = [one._value if isinstance(one, keras.Variable) else one for one in sources]
        inner = [
            [rows for _, rows in one.found] if isinstance(one, Table) else one.tensor if isinstance(one, Local) else one
            for one in sources
        ]
        found = stock_gradient(self, target, inner, *args, **kwargs)
        pairs = zip(sources, found, strict=True)
        # of a value that was pulled as a whole, each occurrence of a row would count by itself
        return [
            slices_of_table(one, g) if isinstance(one, Table) else None if g is None else tf.convert_to_tensor(g)
            for one, g in pairs
        ]

    tf.GradientTape.__enter__, tf.GradientTape.gradient = enter, gradient
    try:
        yield
    finally:
        tf.GradientTape.__enter__, tf.GradientTape.gradient = stock_enter, stock_gradient


def locals_in_place(values: list[tuple[keras.Variable, tf.Tensor]]):
    """Inside, each variable is a `Local` with that value."""
    return bound([(variable, Local(value)) for variable, value in values])


@contextlib.contextmanager
def bound(values: list[tuple[keras.Variable, Any]]):
    """Inside, each variable has that value, and the shape of it.

    What: `keras.Variable._value`, `_shape`. Versions: Keras 3.10-3.15.
    """
    before = [(variable, variable._value, variable._shape) for variable, _ in values]
    for variable, value in values:
        variable._value, variable._shape = value, tuple(value.shape)
    try:
        yield
    finally:
        for variable, value, shape in before:
            variable._value, variable._shape = value, shape
