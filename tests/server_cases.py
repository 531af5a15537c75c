"""What parameter servers refuse, and in which words; and that Keras saves models that are in parts. One program of a cluster
of 1 worker and 2 servers; argument: a folder."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import UserError
from tfdist.patches import servers


def refused(message: str):
    return pytest.raises(UserError, match=message)


def main(folder: str) -> None:
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

    def rows():
        yield from ([(np.ones(4, "float32"), np.float32(1))] * 8)

    spec = (tf.TensorSpec([4], tf.float32), tf.TensorSpec([], tf.float32))

    def generated(context):
        return tf.data.Dataset.from_generator(rows, output_signature=spec).batch(4).repeat()

    def mapped(context):
        def label(i):
            return tf.numpy_function(lambda i: i.astype("float32"), [i], tf.float32)

        return tf.data.Dataset.range(8).batch(4).map(lambda i: (tf.ones([4, 4]), tf.ensure_shape(label(i), [4])))

    for dataset_fn in (generated, mapped):
        with refused("expected TensorFlow operations alone under parameter servers.*found a call of Python"):
            trainer(lambda: keras.optimizers.SGD(0.1)).train(dataset_fn, 2)

    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    assert len(model.fit(x, y, batch_size=3, epochs=2, verbose=0).history["loss"]) == 2
    with refused("tfdist.fit.Checkpoint and SwapEMAWeights on ParameterServer"):
        model.fit(x, y, steps_per_epoch=1, callbacks=[tfdist.fit.Checkpoint("unused")], verbose=0)
    with strategy.scope():
        accumulating = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        accumulating.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "mse")
    with refused("expected no gradient_accumulation_steps under parameter servers, found 2"):
        accumulating.fit(x, y, steps_per_epoch=1, verbose=0)
    assert len(model.fit(x, y, batch_size=4, steps_per_epoch=2, verbose=0).history["loss"]) == 1
    with strategy.scope():
        again = ComputesAgain([keras.Input((4,)), keras.layers.Dense(1)])
        again.compile("sgd", "mse")
    with refused("computes again after an update .* on ParameterServer: .*compute all gradients first"):
        again.fit(x, y, verbose=0)
    assert_saved_and_loaded(model, folder)
    print("all is well")


class ComputesAgain(keras.Sequential):
    def train_step(self, data):
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(self(data[0]))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


def assert_saved_and_loaded(model, folder: str) -> None:
    """By `fit` and by hand; loaded in one process, and back into the servers."""
    saved, weights = os.path.join(folder, "model.keras"), os.path.join(folder, "model.weights.h5")
    x, y = np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), np.ones((8, 1), "float32")
    model.fit(x, y, batch_size=4, steps_per_epoch=2, verbose=0, callbacks=[keras.callbacks.ModelCheckpoint(saved)])
    expected = [variable.numpy() for variable in model.weights]
    assert len(servers.components(model.weights[0])) == 2
    for found in (keras.models.load_model(saved).weights, model.weights):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other.numpy())
    model.save_weights(weights)
    model.fit(x, y, batch_size=4, steps_per_epoch=2, verbose=0)
    assert (model.weights[0].numpy() != expected[0]).any()
    model.load_weights(weights)
    for one, other in zip(expected, model.weights, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


if __name__ == "__main__":
    main(sys.argv[1])
