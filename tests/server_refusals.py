"""What parameter servers refuse, and in which words: one program of a cluster of 1 worker and 2 servers."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import UserError


def refused(message: str):
    return pytest.raises(UserError, match=message)


def main() -> None:
    strategy = tfdist.ParameterServer(partitioner="fixed", num_shards=2)

    def trainer(optimizer, gradients_per_update: int = 1, **layer):
        strategy.parts = gradients_per_update
        with strategy.scope():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, **layer), keras.layers.BatchNormalization()])
            made = optimizer()
        try:
            return tfdist.Trainer(strategy, model, made, lambda y, p: tf.square(p[:, 0] - y), writers=[])
        finally:
            strategy.parts = 1

    for name in ("Adafactor", "Muon", "Lamb"):
        if hasattr(keras.optimizers, name):
            with refused(f"{name} updates a variable as a whole, but .*kernel is cut over the servers"):
                trainer(getattr(keras.optimizers, name))
    with refused("Nadam keeps a number for all variables"):
        trainer(keras.optimizers.Nadam)
    with refused("found one whose loss is scaled"):
        trainer(lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    with refused("the constraint of .*kernel is of the whole variable"):
        trainer(keras.optimizers.SGD, kernel_constraint=keras.constraints.MaxNorm(1.0))
    with refused("gradients_per_update: expected 1 for a model whose layers keep statistics"):
        trainer(keras.optimizers.SGD, gradients_per_update=2)

    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    with refused("expected steps_per_epoch under parameter servers.*give the number of batches of an epoch"):
        model.fit(x, y, verbose=0)
    with refused("tfdist.fit.Checkpoint and SwapEMAWeights on ParameterServer"):
        model.fit(x, y, steps_per_epoch=1, callbacks=[tfdist.fit.Checkpoint("unused")], verbose=0)
    with strategy.scope():
        accumulating = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        accumulating.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "mse")
    with refused("expected no gradient_accumulation_steps under parameter servers, found 2"):
        accumulating.fit(x, y, steps_per_epoch=1, verbose=0)
    assert len(model.fit(x, y, batch_size=4, steps_per_epoch=2, verbose=0).history["loss"]) == 1
    print("all is well")


if __name__ == "__main__":
    main()
