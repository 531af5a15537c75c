"""What parameter servers are for: a table of a million rows, of which a step touches a few hundred.

    tfdist launch --workers=2 --ps=2 -- python -m tfdist.configs.recommender_ps --workdir=runs/recommender

A program of its own, not a config for `tfdist train`: two towers over clicks that it makes itself. Users and items are
skewed, few come often. Every user belongs to one of 8 groups, every item too, and the pair of groups decides how likely a
click is; the model is told ids alone. 1,500 steps of 512 clicks: AUC 0.71 on clicks it has not seen, where knowing the
groups would give 0.82 (2 CPU cores, 2 workers and 2 servers: a minute).
"""

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfdist

NUM_USERS, NUM_ITEMS, NUM_GROUPS, DIM = 1_000_000, 100_000, 8, 16
TASTE = np.random.default_rng(0).normal(0.0, 1.8, (NUM_GROUPS, NUM_GROUPS)).astype("float32")  # of a group for a group
HELD_OUT = 1 << 40  # a step that training never reaches

flags.DEFINE_string("workdir", "runs/recommender", "checkpoints and metrics")
flags.DEFINE_integer("num_steps", 1500, "up to this step")
flags.DEFINE_integer("batch_size", 512, "clicks per step")


def clicks(step: tf.Tensor, number: int) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
    """The batch of a step, of a `number` of rows: (ids, clicked or not); the same wherever and whenever."""
    draw = tf.random.stateless_uniform([number, 3], tf.stack([step, 7]))
    user = tf.cast(NUM_USERS * draw[:, 0] ** 12, tf.int64)  # half of them are of the first 0.02%
    item = tf.cast(NUM_ITEMS * draw[:, 1] ** 8, tf.int64)
    groups = tf.stack([group(user), group(item + NUM_USERS)], 1)
    clicked = tf.cast(draw[:, 2] < tf.sigmoid(tf.gather_nd(TASTE, groups)), tf.float32)
    return {"user": user, "item": item}, clicked


def group(ids: tf.Tensor) -> tf.Tensor:
    return tf.strings.to_hash_bucket_fast(tf.strings.as_string(ids), NUM_GROUPS)


def dataset_fn(batch_size: int):
    def dataset(context: tfdist.InputContext) -> tf.data.Dataset:
        rows = tf.constant(context.rows(batch_size))

        def batch(step):
            return tf.nest.map_structure(lambda all_rows: tf.gather(all_rows, rows), clicks(step, batch_size))

        return context.steps().map(batch, num_parallel_calls=2)

    return dataset


def build_model() -> keras.Model:
    def tower(name: str, size: int):
        ids = keras.Input((), dtype="int64", name=name)
        near_zero = keras.initializers.RandomUniform(-0.05, 0.05, seed=len(name))
        vector = keras.layers.Embedding(size, DIM, embeddings_initializer=near_zero, name=f"{name}s")(ids)
        return ids, keras.layers.Dense(DIM, name=f"{name}_tower")(vector)

    user_id, user = tower("user", NUM_USERS)
    item_id, item = tower("item", NUM_ITEMS)
    return keras.Model({"user": user_id, "item": item_id}, keras.layers.Dot(1)([user, item])[:, 0])


def loss(clicked: tf.Tensor, logit: tf.Tensor) -> tf.Tensor:
    return tf.nn.sigmoid_cross_entropy_with_logits(clicked, logit)


def auc(clicked: np.ndarray, score: np.ndarray) -> float:
    """How often a click scores higher than what was not clicked (the Mann-Whitney statistic)."""
    ranks = np.empty(len(score))
    ranks[np.argsort(score, kind="stable")] = np.arange(1, len(score) + 1)
    positive = clicked > 0
    return float((ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum())


def main(_) -> None:
    strategy = tfdist.from_environment()  # a worker or a server serves here, and never comes back
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model, optimizer = build_model(), keras.optimizers.Adagrad(0.1, initial_accumulator_value=1e-5)
    trainer = tfdist.Trainer(strategy, model, optimizer, loss, steps_per_loop=100)
    trainer.restore(flags.FLAGS.workdir)
    todo = [tfdist.actions.Log(100), tfdist.actions.Checkpoint(every_steps=500)]
    trainer.train(dataset_fn(flags.FLAGS.batch_size), flags.FLAGS.num_steps, todo)
    x, clicked = clicks(tf.constant(HELD_OUT, tf.int64), 20_000)
    score = model.predict(tf.data.Dataset.from_tensors(x), verbose=0)
    if strategy.is_chief:
        print(f"AUC {auc(clicked.numpy(), score):.4f} on 20,000 clicks that were held out")


if __name__ == "__main__":
    app.run(main)
