"""One step under parameter servers: a worker pulls the variables, computes, and pushes its gradients; each server updates
what it holds. The rules are those of `step`: sum, divide, check, clip, update."""

import dataclasses
import itertools
from collections.abc import Callable

import keras
import tensorflow as tf
from absl import logging

from tfdist import patches
from tfdist.errors import UserError
from tfdist.patches import servers
from tfdist.strategies.base import Batch
from tfdist.strategies.parameter_server import ParameterServer
from tfdist.strategies.remote import ServerStep
from tfdist.train import step
from tfdist.train.loss import Loss, output_weights
from tfdist.train.state import TrainState
from tfdist.train.step import Replica, StepOptions


@dataclasses.dataclass(frozen=True)
class Piece:
    """The gradient of one part of a variable."""

    index: int  # of the trainable variable
    place: int  # of the part
    part: tf.Variable
    gradient: tf.Tensor | tf.IndexedSlices | None  # of the part's own rows; None: its average alone moves
    at: str | None  # the device where it is; None: here

    @property
    def values(self) -> tf.Tensor:
        return self.gradient.values if isinstance(self.gradient, tf.IndexedSlices) else self.gradient

    def on_server(self, values: tf.Tensor) -> "Piece":
        """All of it here: what a lock is held for must not wait for a worker."""
        if isinstance(self.gradient, tf.IndexedSlices):
            shape = servers.dense_shape(self.part.shape)
            return dataclasses.replace(self, gradient=tf.IndexedSlices(values, tf.identity(self.gradient.indices), shape))
        return dataclasses.replace(self, gradient=values)

    def with_values(self, values: tf.Tensor) -> "Piece":
        if isinstance(self.gradient, tf.IndexedSlices):
            values = tf.IndexedSlices(values, self.gradient.indices, self.gradient.dense_shape)
        return dataclasses.replace(self, gradient=values)


class TrainStep(ServerStep):
    """What `ParameterServer.make_steps` runs to train."""

    def __init__(self, strategy: ParameterServer, state: TrainState, loss: Loss, options: StepOptions):
        self.strategy, self.state, self.loss, self.options = strategy, state, loss, options
        self.updates = Updates(strategy, state.updating, state.trainable, options.clip_norm)
        self.by_rows: tuple[keras.Variable, ...] | None = None  # found when the first batch is there
        self.slots = Slots(strategy.parts) if strategy.parts > 1 else None
        if strategy.parts > 1:
            _check_parts(state, loss)
            self.update = self._update_from_slots

    def compute(self, batch: Batch, step_number: tf.Tensor, part: int) -> dict[str, tf.Tensor]:
        replica = Replica(0, part, self.strategy.parts)
        if self.by_rows is None and self.options.whole_tables:
            self.by_rows = ()
        if self.by_rows is None:
            tables = servers.tables(patches.all_layers(self.state.model), self.state.trainable)
            self.by_rows = looked_up_only(tables, lambda: self._sums(batch, step_number, replica, tables))
        began_at = tf.identity(self.updates.counter)
        gradients, stats, written = self._sums(batch, step_number, replica, self.by_rows)
        if not any(gradient is not None for gradient in gradients):
            raise UserError("expected a loss that depends on the model's trainable variables, found no gradient at all")
        pieces = cut(self.state.trainable, gradients)
        if self.slots is None:
            return self.updates.apply(pieces, stats, written, began_at)
        self.slots.put(step_number, part, pieces, stats)
        return {"valid": stats[3] > 0}

    def _sums(self, batch: Batch, step_number: tf.Tensor, replica: Replica, by_rows: tuple[keras.Variable, ...]):
        """Gradients, stats [5] and what the forward pass wrote, less what was there before."""
        state, compiled = self.state, self.options.jit_compile and not by_rows
        with servers.Pulled([*state.model.variables, state.step], by_rows) as pulled, servers.pulled_values():
            servers.in_place(state.step).assign(step_number)
            before = [servers.in_place(variable).tensor for variable in state.written_by_forward]
            totals = output_weights(self.loss, batch.weight)
            held = [servers.in_place(variable) for variable in state.model.variables]
            fresh = [(local, local.tensor) for local in held if isinstance(local, servers.Local)]

            def forward_backward():
                gradients, stats = step.accumulate(
                    state, self.loss, batch, totals, self.options.seed, replica, sources=pulled,
                    unrolled=bool(by_rows or state.written_by_forward),
                )  # fmt: skip
                return gradients, stats, [servers.in_place(variable).tensor for variable in state.written_by_forward]

            # made anew for each graph, whose tensors it captures
            function = tf.function(forward_backward, jit_compile=True, autograph=False) if compiled else forward_backward
            gradients, stats, after = function()
            for local, tensor in fresh:  # what the function's own graph has put there is of no use outside
                local.tensor = tensor
            return gradients, stats, list(zip(state.written_by_forward, before, after, strict=True))

    def _update_from_slots(self, step_number: tf.Tensor) -> dict[str, tf.Tensor]:
        pieces, stats = self.slots.sums(step_number)
        outputs = self.updates.apply(pieces, stats, [], tf.identity(self.updates.counter))
        del outputs["valid"]
        return outputs

    def begin(self) -> None:
        if self.slots is not None:
            self.slots.clear()

    def done(self, step_number: int) -> None:
        self.state.step.assign(step_number)


def make_train_step(strategy: ParameterServer, state: TrainState, loss: Loss, options: StepOptions) -> TrainStep:
    """Returns the step that `ParameterServer.make_steps` runs."""
    check(state.optimizer, state.trainable)
    return TrainStep(strategy, state, loss, options)


def check(optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]) -> None:
    """Raises `UserError` for optimizers that cannot update parts of a variable, on several servers."""
    name = type(optimizer).__name__
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError(
            "ParameterServer: expected a model in float32, bfloat16 or mixed_bfloat16, found one whose loss is scaled "
            "(mixed_float16): workers would lower the scale for each other's steps"
        )
    if getattr(optimizer, "optimizers", None):
        raise UserError("ParameterServer: expected one optimizer, found a MultiOptimizer; use another strategy")
    if servers.updates_all_at_once(optimizer):
        raise UserError(f"ParameterServer: {name} keeps a number for all variables together, which several servers cannot "
                        "update as one; use Adam, AdamW, Adagrad or SGD")  # fmt: skip
    sharded = [v.path for v in variables if len(servers.components(v)) > 1]
    if sharded and name in ("Adafactor", "Muon", "Lamb"):
        raise UserError(
            f"ParameterServer: {name} updates a variable as a whole, but {sharded[0]} is cut over the servers; use "
            "partitioner='none' (strategy.partitioner=none), or another optimizer"
        )
    constrained = [v.path for v in variables if v.constraint is not None and len(servers.components(v)) > 1]
    if constrained:
        raise UserError(
            f"ParameterServer: the constraint of {constrained[0]} is of the whole variable, which is cut over the servers; "
            "use partitioner='none'"
        )


def _check_parts(state: TrainState, loss: Loss) -> None:
    if state.batch_norms or state.written_by_forward:
        raise UserError("gradients_per_update: expected 1 for a model whose layers keep statistics (batch normalisation), "
                        "found more: the parts of a batch do not see each other; use MultiWorkerMirrored")  # fmt: skip
    if not callable(loss):
        raise UserError("gradients_per_update: expected 1 for a model with several outputs, found more")


def looked_up_only(tables: tuple[keras.Variable, ...], sums: Callable) -> tuple[keras.Variable, ...]:
    """Tables of which a step reads rows alone, found by tracing `sums`, which is then thrown away. A table that is also read
    as a whole (tied embeddings) is pulled as a whole, once."""
    if not tables:
        return ()
    read: list[bool] = []

    def look():
        with servers.watched_tables() as made:
            sums()
        read.extend(
            any(table.was_read_whole for table in made if table.parts[0] is servers.components(v)[0]) for v in tables
        )
        return tf.zeros([])

    tf.function(look, autograph=False).get_concrete_function()
    only = tuple(table for table, whole in zip(tables, read, strict=True) if not whole)
    if only:
        logging.info("looked up by row on the servers: %s", ", ".join(table.path for table in only))
    return only


# ---- cutting ----


def cut(variables: list[keras.Variable], gradients: list) -> list[Piece]:
    """The gradients of whole variables -> of their parts, where there is one."""
    pieces = []
    for index, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
        if gradient is None:
            continue
        parts, first = servers.components(variable), 0
        for place, part in enumerate(parts):
            end = first + (part.shape[0] if part.shape.rank else 0)
            own = gradient
            if isinstance(gradient, tf.IndexedSlices):
                ids = tf.cast(gradient.indices, tf.int64)
                if len(parts) > 1:
                    here = tf.reshape(tf.where((ids >= first) & (ids < end)), [-1])
                    own = tf.IndexedSlices(
                        tf.gather(gradient.values, here), tf.gather(ids, here) - first, servers.dense_shape(part.shape)
                    )
                else:
                    own = tf.IndexedSlices(gradient.values, ids, servers.dense_shape(part.shape))
            elif len(parts) > 1:
                own = gradient[first:end]
            pieces.append(Piece(index, place, part, own, None))
            first = end
    return pieces


def parts_without(variables: list[keras.Variable], found) -> list[Piece]:
    """All parts of the variables whose index is not among those `found`."""
    return [
        Piece(index, place, part, None, None)
        for index, variable in enumerate(variables) if index not in found
        for place, part in enumerate(servers.components(variable))
    ]  # fmt: skip


# ---- updating ----


class Updates:
    """The update of all variables, each on its server, one worker at a time there."""

    def __init__(
        self, strategy: ParameterServer, optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable],
        clip_norm: float = 0.0,
    ):  # fmt: skip
        self.strategy, self.optimizer, self.variables, self.clip_norm = strategy, optimizer, variables, clip_norm
        self.counter = servers.components(self.optimizer.iterations)[0]
        self.rows_alone = keeps_other_rows(self.optimizer)

    def apply(self, pieces: list[Piece], stats: tf.Tensor, written: list, began_at: tf.Tensor) -> dict[str, tf.Tensor]:
        """`pieces` are of the sum of gradients. A step without weight, or with a gradient that is not finite, changes
        nothing."""
        loss_sum, weight, tokens, valid, rows = tf.unstack(stats[:5])
        divisor = tf.where(weight > 0, weight, tf.ones_like(weight))
        loss = loss_sum / divisor
        checked = []
        for piece in pieces:
            with tf.device(piece.at):
                values = piece.values / tf.cast(divisor, piece.values.dtype)
                wide = tf.cast(values, tf.float32) if values.dtype.size < 4 else values
                finite, square = tf.reduce_all(tf.math.is_finite(values)), tf.reduce_sum(tf.square(wide))
            checked.append((piece.with_values(values), finite, square))
        finite = tf.stack([tf.math.is_finite(loss), *(one for _, one, _ in checked)])
        squares: dict[int, tf.Tensor] = {}  # of each variable
        for piece, _, square in checked:
            squares[piece.index] = squares[piece.index] + square if piece.index in squares else square
        wide = tf.float64 if any(square.dtype == tf.float64 for square in squares.values()) else tf.float32
        norm = tf.sqrt(tf.add_n([tf.cast(square, wide) for square in squares.values()]))
        applied = tf.reduce_all(finite) & (weight > 0)
        codes = tf.constant([1, *(2 + piece.index for piece in pieces)], tf.int32)
        count = self._count(applied)
        rate = self._learning_rate(count)
        own, factor = self.optimizer, {}
        limit = self.clip_norm or own.global_clipnorm or 0.0
        for index, square in squares.items():
            if limit:
                factor[index] = limit / tf.maximum(norm, tf.constant(limit, norm.dtype))
            elif own.clipnorm:
                factor[index] = own.clipnorm / tf.maximum(tf.sqrt(square), tf.constant(own.clipnorm, square.dtype))
        by_server: dict[str, list[Piece]] = {}
        for piece, _, _ in checked:
            by_server.setdefault(piece.part.device, []).append(piece)
        if own.use_ema:
            for piece in parts_without(self.variables, squares):
                by_server.setdefault(piece.part.device, []).append(piece)
        updated = [self._on_server(device, mine, factor, applied, count) for device, mine in by_server.items()]
        updated += [add_change(variable, before, after, applied) for variable, before, after in written]
        skipped = (valid > 0) & ~tf.reduce_all(finite)
        outputs = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "skipped": skipped,
            "not_finite": tf.where(skipped, tf.gather(codes, tf.argmin(tf.cast(finite, tf.int32))), 0),
            "not_finite_replica": 0,
            "staleness": tf.where(applied, count - tf.cast(began_at, tf.int64), 0),
            "valid": valid > 0,
        }
        with tf.control_dependencies(updated):
            return {name: tf.identity(value) for name, value in outputs.items()}

    def _count(self, applied: tf.Tensor) -> tf.Tensor:
        """How many updates came before this one, which is counted now: no two have the same number."""
        counter = self.counter
        with tf.device(counter.device):
            one = tf.cast(tf.identity(applied), counter.dtype)

            def count():
                before = tf.identity(counter.read_value())
                with tf.control_dependencies([before]), tf.control_dependencies([counter.assign_add(one, read_value=False)]):
                    return tf.identity(before)

            lock = self.strategy.lock_of(counter.device)
            return tf.cast(lock.execute(count, exclusive_resource_access=False), tf.int64)

    def _learning_rate(self, count: tf.Tensor) -> tf.Tensor:
        """Of this update."""
        with servers.bound_scalars(self.optimizer, count):
            return tf.convert_to_tensor(self.optimizer.learning_rate)

    def _on_server(self, device: str, pieces: list[Piece], factor: dict, applied, count) -> tf.Tensor:
        """Runs there, under its lock, after all that it needs has come."""
        optimizer, trainable = self.optimizer, self.variables
        with tf.device(device):
            here = []
            for piece in pieces:
                if piece.gradient is None:
                    here.append(piece)
                    continue
                values = tf.identity(piece.values)
                if piece.index in factor:
                    values = values * tf.cast(factor[piece.index], values.dtype)
                elif optimizer.clipvalue:
                    values = tf.clip_by_value(values, -optimizer.clipvalue, optimizer.clipvalue)
                here.append(piece.on_server(values))
            scalars = {key: tf.identity(value) for key, value in servers.scalars(optimizer, count).items()}
            do = tf.identity(applied)
            arrived = tf.nest.flatten([p.gradient for p in here if p.gradient is not None], expand_composites=True)

            def update():
                for piece in here:
                    variable, gradient = trainable[piece.index], piece.gradient
                    with servers.on_part(optimizer, variable, piece.place, scalars):
                        if gradient is None:
                            patches.update_moving_average(optimizer, variable)
                        elif isinstance(gradient, tf.IndexedSlices) and self.rows_alone:
                            with servers.on_rows(optimizer, variable, gradient.indices):
                                patches.apply_to(optimizer, gradient.values, variable)
                        else:
                            patches.apply_to(optimizer, tf.convert_to_tensor(gradient), variable)
                return tf.constant(True)

            def locked():
                return tf.cond(do, update, lambda: tf.constant(False))

            with tf.control_dependencies([*arrived, *scalars.values(), do]):
                return self.strategy.lock_of(device).execute(locked, exclusive_resource_access=False)


def keeps_other_rows(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether rows without gradient do not move, so that a row update equals the dense one."""
    plain = type(optimizer) is keras.optimizers.Adagrad or (
        type(optimizer) is keras.optimizers.SGD and not optimizer.momentum
    )
    return plain and not optimizer.use_ema and optimizer.weight_decay is None


def add_change(variable: keras.Variable, before: tf.Tensor, after: tf.Tensor, applied: tf.Tensor) -> tf.Tensor:
    """Statistics and counters: what a forward pass has changed is added, so that no worker's is lost."""
    first, parts = 0, servers.components(variable)
    for part in parts:
        own = slice(first, first + part.shape[0]) if len(parts) > 1 else ...
        first = own.stop if len(parts) > 1 else 0
        with tf.device(part.device):
            if part.dtype == tf.bool:
                part.assign(tf.where(applied, after[own], part.read_value()))
            else:
                part.assign_add(tf.where(applied, after[own] - before[own], tf.zeros_like(after[own])))
    return tf.constant(True)


# ---- several gradients for one update ----


_numbers = itertools.count()  # of all `Slots` of this process


class Slots:
    """The gradients of the parts of a step, on the servers, until all are there. A part that is computed again finds its
    place taken, so that none counts twice."""

    def __init__(self, parts: int):
        self.parts, self.pieces, self.stats = parts, [], None  # what a step puts there: the same for each of its parts
        self.number = next(_numbers)

    def put(self, step_number: tf.Tensor, part: int, pieces: list[Piece], stats: tf.Tensor) -> None:
        self.pieces, self.stats = pieces, stats
        for name, device, tensors in self._places():
            with tf.device(device):
                tensors = [tf.identity(tensor) for tensor in tensors]
                tf.raw_ops.MapStage(
                    key=step_number * self.parts + part, indices=list(range(len(tensors))), values=tensors,
                    dtypes=[tensor.dtype for tensor in tensors], shared_name=name,
                )  # fmt: skip

    def sums(self, step_number: tf.Tensor) -> tuple[list[Piece], tf.Tensor]:
        """Over all parts of a step, which are gone from there then."""
        taken = []
        for name, device, tensors in self._places():
            with tf.device(device):
                taken.append([self._take(name, step_number * self.parts + part, tensors) for part in range(self.parts)])
        *of_pieces, stats = taken
        pieces = []
        for piece, parts in zip(self.pieces, of_pieces, strict=True):
            with tf.device(piece.part.device):
                if isinstance(piece.gradient, tf.IndexedSlices):
                    shape = servers.dense_shape(piece.part.shape)
                    total = servers.add_slices([tf.IndexedSlices(values, ids, shape) for values, ids in parts])
                else:
                    total = tf.add_n([values for (values,) in parts])
            pieces.append(dataclasses.replace(piece, gradient=total, at=piece.part.device))
        return pieces, tf.add_n([values for (values,) in stats])

    def clear(self) -> None:
        """What an input that ended in the middle of a step has left."""
        for name, device, tensors in self._places() if self.pieces else ():
            with tf.device(device):
                tf.raw_ops.MapClear(dtypes=[tensor.dtype for tensor in tensors], shared_name=name)

    def _take(self, name: str, key: tf.Tensor, like: list[tf.Tensor]) -> list[tf.Tensor]:
        taken = tf.raw_ops.MapUnstage(
            key=key, indices=list(range(len(like))), dtypes=[tensor.dtype for tensor in like], shared_name=name
        )
        return [tf.ensure_shape(tensor, one.shape) for tensor, one in zip(taken, like, strict=True)]

    def _places(self) -> list[tuple[str, str, list[tf.Tensor]]]:
        """(name, server, tensors) of each piece, and of the step's own numbers."""
        found = []
        for piece in self.pieces:
            slices = isinstance(piece.gradient, tf.IndexedSlices)
            tensors = [piece.gradient.values, piece.gradient.indices] if slices else [piece.gradient]
            found.append((f"tfdist/slot/{self.number}/{piece.index}/{piece.place}", piece.part.device, tensors))
        return [*found, (f"tfdist/slot/{self.number}/numbers", self.pieces[0].part.device, [self.stats])]
