"""One step under parameter servers: a worker pulls the variables, computes, and pushes its gradients; each server updates
what it holds. The rules are those of `step`: sum, divide, check, clip, update."""

from collections.abc import Callable

import keras
import tensorflow as tf
from absl import logging

from tfdist.errors import UserError
from tfdist.patches import server_optimizers, servers
from tfdist.patches.layers import all_layers
from tfdist.strategies.base import Batch
from tfdist.strategies.parameter_server import ParameterServer
from tfdist.strategies.remote import ServerStep
from tfdist.train import step
from tfdist.train.loss import Loss, output_weights
from tfdist.train.server_slots import Slots
from tfdist.train.server_updates import Updates, cut
from tfdist.train.state import TrainState
from tfdist.train.step import Replica, StepOptions


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
            tables = servers.tables(all_layers(self.state.model), self.state.trainable)
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
    if server_optimizers.updates_all_at_once(optimizer):
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
