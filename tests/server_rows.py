"""Step s looks up row s of a table, and no other: after training the table says which steps were applied, and with which
learning rates, whatever was killed meanwhile. A program for parameter servers, told to stop by SIGTERM."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import tfdist

ROWS = 1 << 20


class RateOfUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """1 for the first update, 2 for the second, and so on."""

    def __call__(self, step):
        return tf.cast(step, tf.float64) + 1

    def get_config(self):
        return {}


def dataset(context):
    return context.steps().map(lambda step: (step[None, None], tf.zeros([1], tf.float64)))


def main(workdir: str) -> None:
    keras.config.set_floatx("float64")
    strategy = tfdist.ParameterServer(min_shard_bytes=64)
    with strategy.scope():
        table = keras.layers.Embedding(ROWS, 1, embeddings_initializer="zeros")
        model = keras.Sequential([keras.Input((1,), dtype="int64"), table])
        optimizer = keras.optimizers.SGD(RateOfUpdate())
    trainer = tfdist.Trainer(strategy, model, optimizer, lambda y, p: p[:, 0, 0] - y)
    trainer.restore(workdir)
    evaluated = trainer.evaluate(lambda context: dataset(context).take(7))
    assert evaluated.tokens == 7, "a batch counts once, whoever reads it"
    trainer.train(dataset, ROWS, [tfdist.actions.Log(1), tfdist.actions.Checkpoint(every_steps=0)])


if __name__ == "__main__":
    main(*sys.argv[1:])
