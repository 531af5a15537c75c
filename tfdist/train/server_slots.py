"""Several gradients for one update, under parameter servers: they wait on the servers until all are there."""

import dataclasses
import itertools

import tensorflow as tf

from tfdist.patches import servers
from tfdist.train.server_updates import Piece

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
