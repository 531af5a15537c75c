"""What users do around `fit` in the scope of two replicas means what it means on one device. python fit_by_hand.py"""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.strategies.sync import Mirrored, OneDevice  # by their place, not as tfdist.Mirrored

hook = sys.excepthook
assert tfdist.Mirrored is Mirrored and sys.excepthook is hook and "tfdist.fit" not in sys.modules  # reading changes nothing
strategy = Mirrored(2)
assert sys.excepthook is not hook, "making a strategy installs the exit codes"
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(20, 3)).astype("float32"), rng.normal(size=(20, 1)).astype("float32")


def dense(units: int = 1) -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(units, kernel_initializer="ones")])


# ---- losses and metrics that are called by hand: in the scope, after it, in a callback ----
found = []


class ByHand(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        found.append(float(keras.losses.MeanSquaredError()(np.zeros((1, 1)), np.full((1, 1), 3.0))))
        iou.reset_state()
        iou.update_state([0, 0, 1, 1], [0, 1, 0, 1])
        iou.update_state([0], [0])
        found.append(float(iou.result()))


with strategy.scope():
    iou, mean = keras.metrics.MeanIoU(num_classes=2), keras.metrics.Mean()
    model = dense()
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0, callbacks=[ByHand()])
    ByHand().on_epoch_end(0)
    mean.update_state([1.0, 2.0], sample_weight=[3.0, 1.0])
assert "fit" in vars(model), "made in the scope: trains with tfdist"
model.fit(X, Y, verbose=0, callbacks=[ByHand()])
ByHand().on_epoch_end(0)
assert np.allclose(found, [9.0, (2 / 4 + 1 / 3) / 2] * 4), found
mean.update_state([7.0])
assert np.isclose(float(mean.result()), 12 / 5)

# ---- an optimizer that is applied by hand; stock Keras with the same gradients ----


def stepped(optimizer) -> list[np.ndarray]:
    variables = [keras.Variable(np.ones((2, 2)), name="a"), keras.Variable(np.ones(3), name="b")]
    gradients = [tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.IndexedSlices(tf.constant([9.0, 1.0]), [2, 2], [3])]
    for _ in range(3):
        optimizer.apply(gradients, variables)
    assert int(optimizer.iterations) == 3
    return [np.array(variable) for variable in variables]


for make in (lambda: keras.optimizers.Adam(0.1, global_clipnorm=1.0), lambda: keras.optimizers.SGD(0.1, momentum=0.9)):
    expected = stepped(make())
    with strategy.scope():
        values = stepped(make())
    for one, other in zip(expected, values, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)

# ---- a new session inside of the scope, as notebooks begin one ----
with strategy.scope():
    keras.backend.clear_session()
    model = dense()
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(X, Y, verbose=0)
model.fit(X, Y, verbose=0)

# ---- a model that is told how many rows a replica has ----


class Halves(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return keras.ops.reshape(self.dense(x), (20 // strategy.num_replicas_in_sync, 1))


with strategy.scope():
    model = Halves()
    model.compile("sgd", "mse")
model.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(20, drop_remainder=True), verbose=0)

# ---- a loss that is a number of Python; outputs of ragged lengths; an input that is None ----


class Cut(keras.Model):
    def call(self, x):
        return tf.ragged.range(x % 3)


with strategy.scope():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])
    model.compile("sgd", ["mse", lambda y_true, y_pred: 0.0])
    ragged = Cut()
assert model.fit(X, [Y, Y], verbose=0).history["loss"][0] > 0
rows = ragged.predict(np.arange(9), batch_size=4, verbose=0)
assert isinstance(rows, tf.RaggedTensor) and rows.to_list() == [list(range(i % 3)) for i in range(9)]


class Optional(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, inputs):
        x, other = inputs
        return self.dense(x) if other is None else self.dense(x + other)


for one in (strategy, OneDevice()):
    with one.scope():
        model = Optional()
    batches = [((X[:8], None),), ((X[8:], None),)]
    np.testing.assert_allclose(model.predict((batch for batch in batches), verbose=0), X.sum(1, keepdims=True), rtol=1e-5)


# ---- what several replicas cannot do with the numbers of one is refused ----
class Step(keras.Model):
    def __init__(self, loss):
        super().__init__()
        self.dense, self.loss_of = keras.layers.Dense(1), loss

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(tf.square(self(data[0]) - data[1]))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


def counted(losses):
    outside.update_state(losses)
    return tf.reduce_mean(losses)


class BothWays(keras.layers.Layer):
    def build(self, _):
        self.table = self.add_weight(shape=(3, 1))

    def call(self, x):
        return tf.gather(self.table, tf.cast(x > 0, tf.int32))[:, :, 0] + tf.gather(self.table, tf.range(3))[:, 0]


class Unclear(BothWays):
    def call(self, x):
        cut = tf.boolean_mask(x, x[:, 0] > 0)
        return x * tf.reduce_mean(tf.gather(self.table, tf.range(tf.shape(cut)[0]) % 3))


class Added(keras.layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.sum(keras.ops.square(x)))
        return x


def refused(model, message: str, **options) -> None:
    model.compile("sgd", "mse", **options)
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, verbose=0)


def in_scope(make):
    with strategy.scope():
        return make()


class Mixing(keras.layers.Layer):
    """A layer in which rows see each other."""

    def __init__(self, mix):
        super().__init__()
        self.mix, self.most = mix, self.add_weight(name="most", trainable=False)

    def call(self, x):
        return self.mix(self, x)


def written(layer, x):
    layer.most.assign(keras.ops.maximum(layer.most, keras.ops.max(x)))
    return x


class Changed(Step):
    """Gradients that are changed by a number of this replica's rows."""

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(data[0]) - data[1]))
        gradients = [gradient * tf.where(loss > 1, 0.1, 1.0) for gradient in tape.gradient(loss, self.trainable_variables)]
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


class Penalised(Step):
    """The gradient of a gradient through batch normalisation."""

    def __init__(self):
        super().__init__(None)
        self.norm = keras.layers.BatchNormalization()

    def train_step(self, data):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(data[0])
                predicted = self.dense(self.norm(data[0], training=True))
            loss = tf.reduce_mean(tf.square(inner.gradient(predicted, data[0])))
        self.optimizer.apply(outer.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


def taken_apart(losses):
    return tf.while_loop(lambda i, _: i < tf.shape(losses)[0], lambda i, total: (i + 1, total + losses[i, 0]), (0, 0.0))[1]


another = "fit: expected losses that are means or sums over the rows of a batch, found another one"
for loss in (
    lambda losses: tf.sqrt(tf.reduce_mean(losses)),
    lambda losses: tf.reduce_sum(losses * X[0, 0]) / tf.reduce_sum(tf.cast(losses > 0.5, tf.float32)),
    lambda losses: tf.reduce_mean(losses) * tf.stop_gradient(tf.reduce_mean(losses)),
    lambda losses: tf.reduce_max(losses),
    lambda losses: tf.reduce_mean(tf.matmul(losses, losses, transpose_b=True)),
    lambda losses: tf.reduce_mean(tf.boolean_mask(losses, losses > 0.5)),
    taken_apart,
):
    refused(in_scope(lambda loss=loss: Step(loss)), another)
refused(in_scope(lambda: Step(lambda losses: tf.sqrt(tf.reduce_mean(losses)))), another, run_eagerly=True)
refused(in_scope(lambda: keras.Sequential([keras.layers.Dense(1), Added()])), another)
refused(
    in_scope(lambda: Step(lambda losses: tf.gradients(tf.reduce_sum(losses), losses)[0])), "found tf.gradients; use a tape"
)
alone = "fit: expected a model that computes each row by itself, found an output"
for mix in (
    lambda layer, x: x - tf.reduce_mean(x, axis=0),
    lambda layer, x: x / tf.cast(tf.shape(x)[0], x.dtype),
    lambda layer, x: x + tf.reduce_max(x, axis=0),
    lambda layer, x: tf.matmul(tf.nn.softmax(tf.matmul(x, x, transpose_b=True)), x),
):
    refused(in_scope(lambda mix=mix: keras.Sequential([Mixing(mix), keras.layers.Dense(1)])), alone)
refused(
    in_scope(lambda: keras.Sequential([Mixing(written), keras.layers.Dense(1)])), "expected a step to write means over rows"
)
refused(in_scope(lambda: Changed(None)), "expected a train_step to change gradients by what does not depend on the batch")
refused(in_scope(Penalised), "expected batch normalisation that is differentiated once")


class Tempered(Step):
    """Is given numbers that come with each batch, not with each row."""

    def call(self, inputs):
        return self.dense(inputs[0] if isinstance(inputs, tuple) else inputs)

    def train_step(self, data):
        (x, _), y = data
        return super().train_step((x, y))


for rows in (4, None):
    shapes = (tf.TensorSpec([rows, 3]), tf.TensorSpec([3])), tf.TensorSpec([rows, 1])
    data = tf.data.Dataset.from_generator(lambda: [((X[:4], np.ones(3)), Y[:4])], output_signature=shapes)
    model = in_scope(lambda: Tempered(tf.reduce_mean))
    model.compile("sgd")
    with pytest.raises(ValueError, match="expected every part of a batch to have an entry for each row, found parts"):
        model.fit(data, verbose=0)
for loss in (tf.reduce_mean, lambda losses: tf.reduce_sum(losses) / tf.cast(tf.shape(losses)[0], losses.dtype)):
    model = in_scope(lambda loss=loss: Step(loss))
    model.compile("sgd")
    model.fit(X, Y, verbose=0)
# random numbers without a seed of their own


class Noise(Step):
    def train_step(self, data):
        noise = keras.random.normal((keras.ops.shape(data[0])[0], 1))
        return super().train_step((data[0], noise)) | {"noise": keras.ops.sum(noise)}


model = in_scope(lambda: Noise(tf.reduce_mean))
model.compile("sgd")
model.fit(X, Y, verbose=0)
with strategy.scope():
    outside = keras.metrics.Mean(name="of_nobody")
refused(
    in_scope(lambda: Step(counted)),
    "expected metrics that a step updates to be attributes of the model, found of_nobody/total",
)
refused(in_scope(lambda: keras.Sequential([BothWays(), keras.layers.Dense(1)])), "leave out run_eagerly", run_eagerly=True)
refused(in_scope(lambda: keras.Sequential([Unclear(), keras.layers.Dense(1)])), "cannot tell whether it counts rows")

# ---- TensorFlow's own names ----
assert strategy.num_replicas_in_sync == 2 and not hasattr(strategy, "no_such_thing")
for name in ("run", "reduce", "experimental_distribute_dataset"):
    with pytest.raises(AttributeError, match=f"Mirrored.{name}: expected .* tfdist.Trainer .* strategy.tf_strategy.{name}"):
        getattr(strategy, name)
print("all is well")
