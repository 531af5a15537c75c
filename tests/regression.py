"""A user's own program on a cluster: a small regression with `tfdist.Trainer`, and ways to go wrong.

python tests/regression.py WORKDIR [BEHAVIOUR]        the behaviour is worker 1's
"""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tfdist
from tfdist.cluster.resolve import resolve


class Stuck:
    """An action that never returns."""

    def __init__(self, at_step: int):
        self.at_step = at_step

    def next_due(self, step: int) -> int | None:
        return self.at_step if step < self.at_step else None

    def maybe(self, trainer, turn) -> None:
        if turn.step == self.at_step:
            time.sleep(600)


def main(workdir: str, behaviour: str = "") -> None:
    if behaviour == "too_late":
        tf.constant(1) + 1
    if behaviour == "late" and resolve().task.index == 1:
        time.sleep(6)
    strategy = tfdist.MultiWorkerMirrored()
    mine = behaviour if strategy.worker == 1 else ""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        optimizer = keras.optimizers.Adam(1e-2)

    def dataset_fn(context):
        x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
        data = tf.data.Dataset.from_tensor_slices((x, x.sum(1))).shard(context.pipelines, context.pipeline)
        if mine == "stuck_input":
            data = data.map(lambda *row: tf.py_function(slow, row, [tf.float32, tf.float32]))
            data = data.map(lambda a, b: (tf.ensure_shape(a, [4]), tf.ensure_shape(b, [])))
        return data.repeat().batch(32 // context.pipelines)

    rows = 0

    def slow(a, b):
        nonlocal rows
        rows += 1
        if rows > 300:
            time.sleep(600)
        return a, b

    trainer = tfdist.Trainer(strategy, model, optimizer, lambda y, p: tf.square(p[:, 0] - y), steps_per_loop=5)
    trainer.restore(workdir)
    actions = [tfdist.actions.Log(), tfdist.actions.Checkpoint(every_steps=20)]
    if mine == "stuck_action":
        actions.append(Stuck(15))
    if mine == "raise":
        raise RuntimeError("worker 1 does not like this")
    trainer.train(dataset_fn, num_steps=60 if behaviour in ("", "late") else 10**6, actions=actions)
    print("exact", strategy.broadcast(b"x" * (strategy.worker == 0) * 5_000_001) == b"x" * 5_000_001)


if __name__ == "__main__":
    main(*sys.argv[1:])
