"""A model with every feature, and bugs that PLANT names: what `tfdist.verify` must find. Imported by its processes."""

import os

import keras
import numpy as np
import tensorflow as tf

from tfdist.models.dropout import Dropout
from tfdist.patches import optimizers
from tfdist.train import batch_norm, step

OPTIONS = {"clip_norm": 0.3, "accumulate_steps": 2}


def build() -> keras.Model:
    return keras.Sequential([
        keras.Input((5,)),
        keras.layers.Dense(6, use_bias=False),
        keras.layers.BatchNormalization(momentum=0.8),
        Dropout(0.4, "hidden"),
        keras.layers.Dense(1),
    ])  # fmt: skip


def with_stock_dropout() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(6), keras.layers.Dropout(0.4), keras.layers.Dense(1)])


def optimizer(model) -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(1e-2, use_ema=True, ema_momentum=0.5)


def loss(y, predicted):
    return tf.square(predicted[:, 0] - tf.cast(y, predicted.dtype))


def loss_of_equal_types(y, predicted):
    return tf.square(predicted[:, 0] - y)


def data(context) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    rows, mine = 16, context.rows(16, OPTIONS["accumulate_steps"])
    x, y, weight = rng.normal(size=(9, rows, 5)), rng.normal(size=(9, rows)), rng.choice([0.0, 1.0, 3.0], (9, rows))
    x, y = x.astype("float32"), y.astype("float32")
    return tf.data.Dataset.from_tensor_slices((x[:, mine], y[:, mine], weight[:, mine])).repeat()


# ---- the bugs: each leaves one device alone ----


def clip_before_reduce():
    whole, make = step.accumulate, step.make_train_step
    clip_norm = []

    def clipped(*args):
        gradients, stats = whole(*args)
        norm = step.global_norm(gradients) / stats[1]
        return step.clip(gradients, norm, None, clip_norm[-1]), stats

    def make_train_step(strategy, state, loss, options):
        clip_norm.append(options.clip_norm or 1e30)
        return make(strategy, state, loss, options)

    step.accumulate, step.make_train_step = clipped, make_train_step  # the clipping behind the reduction is idle now


def mean_of_means():
    whole = step.accumulate

    def averaged(*args):
        gradients, stats = whole(*args)
        weight = tf.maximum(stats[1], 1e-9)
        return [g / tf.cast(weight, g.dtype) for g in gradients], stats / tf.stack([weight, weight, 1, 1, 1])

    step.accumulate = averaged


def same_dropout_seed():
    whole = step.accumulate

    def same(state, loss, batch, totals, seed, replica, *rest):
        places = batch.weight.shape[1]
        return whole(
            state, loss, batch._replace(first_row=batch.first_row - replica.index * places), totals, seed, replica, *rest
        )

    step.accumulate = same


def unsynchronised_batch_norm():
    batch_norm._sum_over_replicas = lambda suspended: lambda tensor: tensor


def double_all_reduce():
    once = step.all_reduce

    def twice(tensors, *options, narrow=0, **named):
        reduced = once(tensors, *options, narrow=narrow, **named)
        return [*once(reduced[:narrow]), *reduced[narrow:]] if narrow else reduced

    step.all_reduce = twice


def lost_accumulation():
    whole = step.gradient_sums

    def first_only(state, loss, part, totals, seed, replica, *sources):
        gradients, stats = whole(state, loss, part, totals, seed, replica, *sources)
        counts = tf.cast(tf.equal(part.m, 0) if replica.count > 1 else True, stats.dtype)
        return [g * tf.cast(counts, g.dtype) for g in gradients], stats

    step.gradient_sums = first_only


def stale_ema():
    update = step.apply_sums
    average = optimizers._update_moving_averages

    def stale(*args):
        replica = args[-1]
        optimizers._update_moving_averages = average if replica.index == 0 else lambda optimizer: None
        return update(*args)

    step.apply_sums = stale


def shifted_data():
    global data
    whole = data

    def data(context):
        return whole(context).skip(1 if context.replicas > 1 else 0)


def same_seed_in_stock_layers():
    seeds = step.set_layer_seeds
    step.set_layer_seeds = lambda state, seed, number, m, replica: seeds(state, seed, number, m, 0)


if os.environ.get("PLANT"):
    globals()[os.environ["PLANT"]]()
