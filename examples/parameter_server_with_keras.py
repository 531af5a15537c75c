"""The program of TensorFlow's tutorial "Parameter server training", with Keras `fit` and with its own loop, for Keras 3.

    tfdist launch --workers=2 --ps=1 -- python examples/parameter_server_with_keras.py

Keras 3 alone cannot run the tutorial. The line that makes the strategy is the one that is tfdist's: in a worker and in a
server it serves, and never comes back.
"""

import keras
import numpy as np
import tensorflow as tf

import tfdist

FEATURES = ["avenger", "ironman", "batman", "hulk", "spiderman", "kingkong", "wonder_woman"]
LIKED = {"avenger", "ironman", "hulk", "spiderman", "wonder_woman"}


def example_rows(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Three features each, as ids; the label: whether most of them are liked."""
    ids = np.random.default_rng(0).integers(0, len(FEATURES), (number, 3))
    liked = np.isin(np.array(FEATURES)[ids], list(LIKED)).sum(1)
    return ids.astype("int64"), (liked >= 2).astype("float32")


def build_model() -> keras.Model:
    return keras.Sequential([
        keras.Input((3,), dtype="int64"),
        keras.layers.Embedding(len(FEATURES), 16),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(1, activation="sigmoid"),
    ])  # fmt: skip


def main() -> None:
    strategy = tfdist.ParameterServer()
    keras.utils.set_random_seed(0)
    ids, liked = example_rows(200)

    # Keras `fit`
    with strategy.scope():
        model = build_model()
        model.compile(keras.optimizers.RMSprop(0.1), "binary_crossentropy", metrics=["accuracy"])
    dataset = tf.data.Dataset.from_tensor_slices((ids, liked)).shuffle(200, seed=0).repeat().batch(20)
    history = model.fit(dataset, epochs=5, steps_per_epoch=20, verbose=0).history
    print(f"fit: accuracy {history['accuracy'][-1]:.3f}")

    # a loop of one's own
    with strategy.scope():
        model, optimizer = build_model(), keras.optimizers.RMSprop(0.1)

    def dataset_fn(context):
        return tf.data.Dataset.from_tensor_slices((ids, liked)).batch(20).repeat().skip(context.start_step)

    loss = keras.losses.BinaryCrossentropy(reduction="none")
    trainer = tfdist.Trainer(strategy, model, optimizer, lambda y, p: loss(y[:, None], p), writers=[])
    trainer.train(dataset_fn, num_steps=100)
    print(f"loop: loss {trainer.evaluate(dataset_fn, max_steps=10).loss:.3f}, {strategy.report()['reason']}")


if __name__ == "__main__":
    main()
