"""The program of TensorFlow's tutorial "Multi-worker training with Keras", for Keras 3 and with images made here.

    python examples/multi_worker_with_keras.py FOLDER
    tfdist launch --workers=2 -- python examples/multi_worker_with_keras.py FOLDER

What it trains does not depend on the number of workers. The line that makes the strategy is the one that is tfdist's.
"""

import os
import sys

import keras
import numpy as np
import tensorflow as tf

import tfdist

GLOBAL_BATCH_SIZE = 64


def digits_dataset(batch_size):
    """Images of 28 x 28 with a bar whose place and direction are the class, shuffled and repeated."""
    rng = np.random.default_rng(0)
    y_train = rng.integers(0, 10, 2000)
    x_train = rng.uniform(0, 0.5, (2000, 28, 28)).astype("float32")
    for image, digit in zip(x_train, y_train, strict=True):
        bar = slice(5 * (digit % 5) + 1, 5 * (digit % 5) + 4)
        image[(bar, slice(None)) if digit < 5 else (slice(None), bar)] += 0.5
    dataset = tf.data.Dataset.from_tensor_slices((x_train, y_train.astype("int64")))
    return dataset.shuffle(2000).repeat().batch(batch_size)


def build_and_compile_cnn_model():
    model = keras.Sequential([
        keras.Input(shape=(28, 28)),
        keras.layers.Reshape(target_shape=(28, 28, 1)),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dense(10),
    ])  # fmt: skip
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.SGD(learning_rate=0.05),
        metrics=["accuracy"],
    )
    return model


def main(folder: str) -> None:
    strategy = tfdist.from_environment()  # first of all: how much randomness it takes depends on its kind
    keras.utils.set_random_seed(0)
    dataset = digits_dataset(GLOBAL_BATCH_SIZE)
    with strategy.scope():
        model = build_and_compile_cnn_model()
    callbacks = [
        keras.callbacks.BackupAndRestore(backup_dir=os.path.join(folder, "backup")),
        keras.callbacks.ModelCheckpoint(os.path.join(folder, "epoch-{epoch}.weights.h5"), save_weights_only=True),
    ]
    history = model.fit(dataset, epochs=3, steps_per_epoch=20, callbacks=callbacks).history
    model.save(os.path.join(folder, "model.keras"))  # every worker may: each save is whole
    loaded = keras.models.load_model(os.path.join(folder, "model.keras"))
    print("loss of each epoch:", " ".join(loss.hex() for loss in history["loss"]))
    print(f"accuracy: {history['accuracy'][-1]:.3f}, loaded: {loaded.evaluate(dataset, steps=5, verbose=0)[1]:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
