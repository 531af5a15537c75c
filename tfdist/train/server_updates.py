"""Updates under parameter servers: the gradient of each part of a variable goes to the server that holds the part, which
updates it under a lock, with a number that no other update has."""

import dataclasses

import keras
import tensorflow as tf

from tfdist.patches import server_optimizers, servers
from tfdist.patches.optimizers import apply_to, update_moving_average
from tfdist.strategies.parameter_server import ParameterServer


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
        with server_optimizers.bound_scalars(self.optimizer, count):
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
            scalars = {key: tf.identity(value) for key, value in server_optimizers.scalars(optimizer, count).items()}
            do = tf.identity(applied)
            arrived = tf.nest.flatten([p.gradient for p in here if p.gradient is not None], expand_composites=True)

            def update():
                for piece in here:
                    variable, gradient = trainable[piece.index], piece.gradient
                    with server_optimizers.on_part(optimizer, variable, piece.place, scalars):
                        if gradient is None:
                            update_moving_average(optimizer, variable)
                        elif isinstance(gradient, tf.IndexedSlices) and self.rows_alone:
                            with server_optimizers.on_rows(optimizer, variable, gradient.indices):
                                apply_to(optimizer, gradient.values, variable)
                        else:
                            apply_to(optimizer, tf.convert_to_tensor(gradient), variable)
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
