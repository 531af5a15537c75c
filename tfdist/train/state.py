"""Everything that training changes: the model, the optimizer, and how many global batches have been consumed."""

import functools
import math
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from tfdist.checkpoint import keys
from tfdist.errors import CheckpointError, UserError, one_line
from tfdist.patches.layers import all_layers, state_of_layers
from tfdist.patches.optimizers import moving_averages
from tfdist.strategies.base import Strategy
from tfdist.train import batch_norm, loss_scale

MODEL = "model/"
_AVERAGES = "model_variables_moving_average/"


class TrainState:
    """Built under the strategy's scope. `step` counts global batches consumed, skipped ones included."""

    def __init__(self, strategy: Strategy, model: keras.Model, optimizer: keras.optimizers.Optimizer):
        self.model, self._strategy = model, strategy
        if not model.built:
            raise UserError(
                "expected a model with variables, found one that is not built yet; under the scope call it once on data, or "
                "model.build(input_shape)"
            )
        created_here = strategy.tf_strategy.extended.variable_created_in_scope
        strange = [v.path for v in [*model.variables, *optimizer.variables] if not created_here(v.value)]
        if strange:
            raise UserError(
                f"expected a model and an optimizer made under its scope (`with strategy.scope():`), found {strange[0]} "
                f"and {len(strange) - 1} more made outside"
            )
        with strategy.scope():
            self.optimizer = optimizer = loss_scale.with_scale(model, optimizer)
            if not optimizer.built:
                try:
                    optimizer.build(model.trainable_variables)
                except RuntimeError as error:
                    if "Mixing different" not in str(error):
                        raise
                    raise UserError(
                        "expected an optimizer made under its scope (`with strategy.scope():`), found one, or one inside of "
                        "it, made outside"
                    ) from error
            self.step = keras.Variable(0, dtype="int64", trainable=False, aggregation="only_first_replica", name="step")

    @property
    def trainable(self) -> list[keras.Variable]:
        return self.model.trainable_variables

    @functools.cached_property
    def written_by_forward(self) -> list[keras.Variable]:
        """Weights that are no one's gradient's: moving statistics, counters of a user's layer. Not frozen ones."""
        return state_of_layers(all_layers(self.model))

    @functools.cached_property
    def batch_norms(self) -> list[keras.layers.BatchNormalization]:
        return batch_norm.layers_of(self.model)

    @property
    def updating(self) -> keras.optimizers.Optimizer:
        """The optimizer that updates: the one inside of a LossScaleOptimizer."""
        return getattr(self.optimizer, "inner_optimizer", self.optimizer)

    @property
    def learning_rate(self):
        """Of the next update; of the first one of several optimizers."""
        return getattr(self.updating, "optimizers", [self.updating])[0].learning_rate

    @property
    def averages(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """(variable, its moving average) where evaluation uses the average: `use_ema` that never overwrites the variable."""
        uses_them = self.updating.use_ema and not self.updating.ema_overwrite_frequency
        return moving_averages(self.updating) if uses_them else []

    @property
    def updates(self) -> int:
        """How often the optimizer has updated; a skipped step is none."""
        return int(self.optimizer.iterations.numpy())

    def swap_averages(self) -> None:
        """Exchanges the variables with their moving averages, on every replica of this process. Twice changes nothing."""
        for variable, average in self.averages:
            for one, other in zip(*map(self._strategy.copies, (variable, average)), strict=True):
                held = one.read_value()
                one.assign(other)
                other.assign(held)

    def bytes_per_replica(self, accumulate_steps: int = 1) -> dict[str, int]:
        """What one replica holds: of the variables that are there, and of gradients in a step (a second copy of them while
        micro-batches are added up)."""

        def of(variables):
            return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)

        copies = 2 if accumulate_steps > 1 else 1
        return {
            "parameters": of(self.model.variables),
            "gradients": copies * of(self.trainable),
            "optimizer state": of(self.optimizer.variables),
        }

    @property
    def layer_seeds(self) -> list[keras.Variable]:
        return layer_seeds(self.model)

    @property
    def variables(self) -> list[keras.Variable]:
        """All that a step may read or write."""
        return [*self.model.variables, *self.optimizer.variables, self.step]

    def values(self) -> dict[str, keras.Variable]:
        """What a checkpoint holds, by stable key. Layer seeds are not in it: they are derived from the step."""
        model = {MODEL + key: v for key, v in keys.model_keys(self.model).items()}
        optimizer = {f"optimizer/{key}": v for key, v in keys.optimizer_keys(self.optimizer, self.model).items()}
        return model | optimizer | {"step": self.step}


def layer_seeds(model: keras.Model) -> list[keras.Variable]:
    """The states of stock Keras random layers: in `variables` but not in `weights`."""
    weights = {id(variable) for variable in model.weights}
    return [v for v in model.variables if id(v) not in weights and v.name == "seed_generator_state"]


def load(values: Mapping[str, keras.Variable], arrays: Mapping[str, np.ndarray], origin: str, exact: bool = True) -> None:
    """Assigns every value, on every replica. Raises `CheckpointError` for names, shapes or, if `exact`, dtypes that
    differ; then nothing was assigned."""
    problems = [f"missing {key} ({values[key].path})" for key in values if key not in arrays]
    problems += [f"unexpected {key}" for key in arrays if key not in values]
    problems += [
        f"{key} has shape {list(arrays[key].shape)}, the model needs {list(variable.shape)}"
        for key, variable in values.items()
        if key in arrays and tuple(arrays[key].shape) != tuple(variable.shape)
    ]
    if exact:
        problems += [
            f"{key} is {arrays[key].dtype.name}, the model needs {variable.dtype}"
            for key, variable in values.items()
            if key in arrays and arrays[key].dtype.name != variable.dtype
        ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        shown = "; ".join(one_line(problem, 120) for problem in problems[:5])
        raise CheckpointError(f"checkpoint: {origin} does not fit the model: {shown}{more}")
    for key, variable in values.items():
        variable.assign(arrays[key])


def share(strategy: Strategy, variables: list[keras.Variable], changed: bool = True) -> None:
    """Every worker takes the chief's values; all of them call it. `changed`: whether the chief's differ from the others'."""
    if strategy.num_workers == 1:
        return
    whole = b"".join(np.asarray(v.numpy()).tobytes() for v in variables) if changed and strategy.is_chief else b""
    whole = strategy.broadcast(whole)
    start = 0
    for variable in variables if whole and not strategy.is_chief else ():
        dtype = np.dtype(variable.dtype)
        count = int(np.prod(variable.shape, dtype=np.int64))
        variable.assign(np.frombuffer(whole, dtype, count, start).reshape(variable.shape))
        start += count * dtype.itemsize


def averaged(arrays: Mapping[str, np.ndarray], origin: str = "a checkpoint") -> dict[str, np.ndarray]:
    """The weights of a checkpoint, for evaluation: the moving averages, where the optimizer keeps them and has updated."""
    weights = {key: array for key, array in arrays.items() if key.startswith(MODEL)}
    for key, array in arrays.items():
        before, found, name = key.partition(_AVERAGES)
        if not found:
            continue
        updates = arrays.get(f"{before}iterations", np.zeros(0))
        if updates.shape:
            raise CheckpointError(f"checkpoint: {origin}: expected the number of updates beside averages, found none")
        if updates:
            weights[MODEL + name] = array
    return weights
