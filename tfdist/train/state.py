"""Everything that training changes: the model, the optimizer, and how many global batches have been consumed."""

from collections.abc import Mapping

import keras
import numpy as np

from tfdist.checkpoint import keys
from tfdist.errors import CheckpointError, UserError
from tfdist.strategies.base import Strategy

MODEL = "model/"


class TrainState:
    """Built under the strategy's scope. `step` counts global batches consumed, skipped ones included."""

    def __init__(self, strategy: Strategy, model: keras.Model, optimizer: keras.optimizers.Optimizer):
        self.model, self.optimizer = model, optimizer
        created_here = strategy.tf_strategy.extended.variable_created_in_scope
        strange = [v.path for v in [*model.variables, *optimizer.variables] if not created_here(v.value)]
        if strange:
            raise UserError(
                f"expected a model and an optimizer made under its scope (`with strategy.scope():`), found {strange[0]} "
                f"and {len(strange) - 1} more made outside"
            )
        with strategy.scope():
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
            self.step = keras.Variable(0, dtype="int64", trainable=False, aggregation="only_first_replica", name="step")

    @property
    def trainable(self) -> list[keras.Variable]:
        return self.model.trainable_variables

    @property
    def written_by_forward(self) -> list[keras.Variable]:
        """Weights that are no one's gradient's: moving statistics, counters of a user's layer."""
        return self.model.non_trainable_weights

    @property
    def layer_seeds(self) -> list[keras.Variable]:
        """The states of stock Keras random layers: in `variables` but not in `weights`."""
        weights = {id(variable) for variable in self.model.weights}
        return [v for v in self.model.variables if id(v) not in weights and v.name == "seed_generator_state"]

    @property
    def variables(self) -> list[keras.Variable]:
        """All that a step may read or write."""
        return [*self.model.variables, *self.optimizer.variables, self.step]

    def values(self) -> dict[str, keras.Variable]:
        """What a checkpoint holds, by stable key. Layer seeds are not in it: they are derived from the step."""
        model = {MODEL + key: v for key, v in keys.model_keys(self.model).items()}
        optimizer = {f"optimizer/{key}": v for key, v in keys.optimizer_keys(self.optimizer, self.model).items()}
        return model | optimizer | {"step": self.step}


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
        raise CheckpointError(f"checkpoint: {origin} does not fit the model: {'; '.join(problems[:5])}{more}")
    for key, variable in values.items():
        variable.assign(arrays[key])
