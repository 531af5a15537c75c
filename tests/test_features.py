"""Features on one device against the NumPy formula. That other strategies equal one device: test_equality.py."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_trainer import batches, linear, make, regression, squared, train

import tfdist
from tfdist.checkpoint import keys
from tfdist.errors import NotFiniteError, UserError
from tfdist.models.transformer import next_token_loss, token_accuracy, training_loss
from tfdist.train.state import MODEL, averaged


@pytest.fixture(scope="module")
def strategy():
    strategy = tfdist.OneDevice()
    with strategy.scope():
        yield strategy


# ---- batch normalisation ----


def test_statistics_are_of_the_real_rows_of_each_micro_batch(strategy):
    """11 rows in 3 micro-batches of 4: the last one has 3 rows, and a place that only fills it up."""
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(11, 3))
    layer = keras.layers.BatchNormalization(momentum=0.9, dtype="float64")
    model = keras.Sequential([keras.Input((3,), dtype="float64"), layer, keras.layers.Dense(1, dtype="float64")])
    trainer = make(strategy, model, accumulate_steps=3)
    train(trainer, lambda context: tf.data.Dataset.from_tensors((x, x.sum(1))), 1)
    mean, variance = np.zeros(3), np.ones(3)
    for part in (x[:4], x[4:8], x[8:]):
        mean, variance = mean * 0.9 + part.mean(0) * 0.1, variance * 0.9 + part.var(0) * 0.1
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-12)


def test_statistics_leave_out_masked_places_and_padding(strategy):
    x = np.random.default_rng(0).normal(size=(3, 4, 2))
    x[0, 2:] = x[2, 1:] = 0
    layer = keras.layers.BatchNormalization(momentum=0.0, dtype="float64")
    stack = [keras.layers.Masking(dtype="float64"), layer, keras.layers.Flatten(), keras.layers.Dense(1, dtype="float64")]
    model = keras.Sequential([keras.Input((4, 2), dtype="float64"), *stack])
    data = tf.data.Dataset.from_tensors((x, np.zeros(3)))
    first = tf.data.Dataset.from_tensors((np.repeat(x[:1], 5, 0), np.zeros(5)))
    train(make(strategy, model), lambda context: first.concatenate(data), 2)  # in places for 5 rows
    counted = x[(x != 0).any(-1)]
    np.testing.assert_allclose(layer.moving_mean.numpy(), counted.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.moving_variance.numpy(), counted.var(0), rtol=1e-12)


def test_a_large_mean_does_not_cancel_the_variance_away(strategy):
    """E[x^2] - E[x]^2 in float32 would give 0 or less."""
    x = (1e4 + np.random.default_rng(0).normal(size=(64, 1))).astype("float32")
    layer = keras.layers.BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input((1,)), layer, keras.layers.Dense(1)])
    train(make(strategy, model), batches(x[None], np.zeros((1, 64), "float32")), 1)
    np.testing.assert_allclose(layer.moving_variance.numpy(), x.astype(float).var(0), rtol=1e-3)


def test_rows_that_cannot_be_told_apart_are_refused(strategy):
    class Apart(keras.layers.Layer):
        def call(self, x):
            return tf.reshape(x, [-1, 1])

        def compute_output_shape(self, shape):
            return (None, 1)

    stack = [Apart(), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *stack])
    trainer = make(strategy, model, loss=lambda y, p: tf.reshape(tf.square(p), [-1, 3]))
    with pytest.raises(UserError, match="batch normalisation .*expected inputs with the 8 rows of the batch first"):
        train(trainer, batches(*regression()), 1)


# ---- several outputs ----


def two_outputs():
    inputs = keras.Input((3,), dtype="float64")
    dense = [keras.layers.Dense(n, dtype="float64") for n in (1, 2)]
    return keras.Model(inputs, {"one": dense[0](inputs), "two": dense[1](inputs)})


def test_each_output_is_a_mean_over_its_own_weights(strategy):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), {"one": rng.normal(size=6), "two": rng.normal(size=(6, 2))}
    weight = {"one": rng.choice([0.0, 1.0, 2.0], 6), "two": rng.choice([0.5, 1.0], (6, 2))}
    losses = {"one": lambda y, p: 0.3 * tf.square(p[:, 0] - y), "two": lambda y, p: tf.abs(p - y)}
    metrics = {"two/squared": lambda y, p: tf.square(p - y)}
    model = two_outputs()
    trainer = make(strategy, model, keras.optimizers.SGD(0.0), losses, metrics=metrics, accumulate_steps=4)
    predicted = {name: value.numpy() for name, value in model(x).items()}
    one = np.average(0.3 * (predicted["one"][:, 0] - y["one"]) ** 2, weights=weight["one"])
    two = np.average(np.abs(predicted["two"] - y["two"]), weights=weight["two"])
    (row,) = train(trainer, lambda context: tf.data.Dataset.from_tensors((x, y, weight)), 1)
    assert math.isclose(row["loss"], one + two, rel_tol=1e-12)
    result = trainer.evaluate(lambda context: tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(4))
    assert math.isclose(result.loss, one + two, rel_tol=1e-12)
    squares = np.average((predicted["two"] - y["two"]) ** 2, weights=weight["two"])
    expected = {"one/loss": one, "two/loss": two, "two/squared": squares}
    assert result.metrics == {name: pytest.approx(value, rel=1e-12) for name, value in expected.items()}


def test_one_weight_for_all_outputs(strategy):
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(6, 3)), rng.normal(size=6), rng.choice([0.0, 1.0, 2.0], 6)
    losses = {"one": lambda y, p: tf.square(p[:, 0] - y), "two": lambda y, p: tf.abs(p - y[:, None])}
    model = two_outputs()
    predicted = {name: value.numpy() for name, value in model(x).items()}
    expected = np.average((predicted["one"][:, 0] - y) ** 2, weights=weight)
    expected += np.average(np.abs(predicted["two"] - y[:, None]).mean(1), weights=weight)
    trainer = make(strategy, model, keras.optimizers.SGD(0.0), losses)
    (row,) = train(trainer, lambda context: tf.data.Dataset.from_tensors((x, {"one": y, "two": y}, weight)), 1)
    assert math.isclose(row["loss"], expected, rel_tol=1e-12)


def test_names_of_outputs_that_differ_are_one_line(strategy):
    trainer = make(strategy, two_outputs(), loss={"one": squared, "three": squared})
    data = tf.data.Dataset.from_tensors((np.zeros([4, 3]), {"one": np.zeros(4), "two": np.zeros(4)}))
    with pytest.raises(UserError, match=r"the model's outputs to be a dict with \['one', 'three'\], found \['one', 'two'\]"):
        train(trainer, lambda context: data, 1)


# ---- metrics, label smoothing, z-loss ----


def test_label_smoothing_and_z_loss_are_the_formula():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    log_z = np.log(np.exp(logits).sum(-1))
    target = 0.9 * np.eye(5)[labels] + 0.1 / 5
    expected = (target * (log_z[..., None] - logits)).sum(-1) + 0.01 * log_z**2
    np.testing.assert_allclose(training_loss(0.1, 0.01)(labels, tf.constant(logits)).numpy(), expected, rtol=1e-12)
    assert training_loss() is next_token_loss


def test_accuracy_counts_each_token_once_whatever_the_batch(strategy):
    rng = np.random.default_rng(0)
    logits, labels, weight = rng.normal(size=(20, 4, 3)), rng.integers(0, 3, (20, 4)), rng.choice([0.0, 1.0], (20, 4))
    model = keras.Sequential([keras.Input((4, 3), dtype="float64"), keras.layers.Dense(3, dtype="float64")])
    model.set_weights([np.eye(3), np.zeros(3)])
    trainer = make(strategy, model, loss=next_token_loss, metrics={"accuracy": token_accuracy})
    expected = np.average(logits.argmax(-1) == labels, weights=weight)
    for size in (1, 7, 20):
        data = tf.data.Dataset.from_tensor_slices((logits, labels, weight)).batch(size)
        result = trainer.evaluate(lambda _, data=data: data)
        assert math.isclose(result.metrics["accuracy"], expected, rel_tol=1e-12)
        assert math.isclose(result.perplexity, math.exp(result.loss), rel_tol=1e-12)


# ---- moving averages of the weights ----


def test_evaluation_uses_the_averages_and_training_goes_on_with_the_weights(strategy):
    keras.utils.set_random_seed(0)
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8)
    trainer = make(strategy, model := linear(), optimizer)
    data = batches(*regression(steps=12))
    kernel = model.trainable_variables[0]
    history, before = [], trainer.evaluate(data).loss
    for step in range(1, 5):
        train(trainer, data, step)
        history.append(kernel.numpy())
    average = history[0]
    for value in history[1:]:
        average = 0.8 * average + 0.2 * value
    with trainer.averaged_weights():
        np.testing.assert_allclose(kernel.numpy(), average, rtol=1e-12)
        expected = make(strategy, model).evaluate(data).loss
    np.testing.assert_array_equal(kernel.numpy(), history[-1])
    assert trainer.evaluate(data).loss == expected != make(strategy, model).evaluate(data).loss
    assert before == make_fresh_loss(strategy, data), "before the first update there is no average"
    np.testing.assert_array_equal(kernel.numpy(), history[-1])


def test_averages_are_swapped_in_once_and_are_not_trained_or_saved(strategy, tmp_path):
    trainer = make(strategy, linear(), keras.optimizers.SGD(0.1, use_ema=True))
    trainer.restore(tmp_path)
    data = batches(*regression())
    train(trainer, data, 3)
    expected = trainer.evaluate(data).loss
    with trainer.averaged_weights():
        assert trainer.evaluate(data).loss == expected
        with trainer.averaged_weights():
            assert trainer.evaluate(data).loss == expected
        for attempt in (trainer.save, lambda: train(trainer, data, 4)):
            with pytest.raises(UserError, match="expected the trained weights, found their averages"):
                attempt()
    trainer.save()


def make_fresh_loss(strategy, data):
    keras.utils.set_random_seed(0)
    return make(strategy, linear()).evaluate(data).loss


def test_a_checkpoint_gives_its_averages_for_evaluation(strategy):
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8)
    trainer = make(strategy, model := linear(), optimizer)
    arrays = {key: v.numpy() for key, v in trainer.state.values().items()}
    np.testing.assert_array_equal(averaged(arrays)["model/layers/0/kernel"], model.trainable_variables[0].numpy())
    train(trainer, batches(*regression()), 3)
    arrays = {key: v.numpy() for key, v in trainer.state.values().items()}
    with trainer.averaged_weights():
        weights = {MODEL + key: v.numpy() for key, v in keys.model_keys(model).items()}
    found = averaged(arrays)
    assert set(found) == set(weights)
    for key in weights:
        np.testing.assert_array_equal(found[key], weights[key])


# ---- loss scaling ----


def test_a_static_loss_scale_changes_nothing_in_float64(strategy):
    runs = []
    for factor in (None, 1024.0):
        keras.utils.set_random_seed(0)
        trainer = make(strategy, linear(), keras.optimizers.SGD(0.1, loss_scale_factor=factor), clip_norm=0.5)
        runs.append([row["loss_hex"] for row in train(trainer, batches(*regression()), 5)])
    assert runs[0] == runs[1], "a power of two rounds nothing"


def test_a_float16_model_gets_a_dynamic_scale(strategy):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype="mixed_float16")])
    trainer = make(strategy, model, loss=lambda y, p: tf.square(tf.cast(p[:, 0], tf.float32) - tf.cast(y, tf.float32)))
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer)
    rows = train(trainer, batches(*regression()), 3)
    assert {row["loss_scale"] for row in rows} <= {2.0**15, 2.0**14}
    assert "optimizer/inner_optimizer/iterations" in trainer.state.values()
    assert "optimizer/dynamic_scale" in trainer.state.values()


def test_tiny_gradients_survive_in_float16(strategy):
    """Gradients of 1e-9 are 0 in float16 without a scale."""

    def run(optimizer):
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype="mixed_float16")
        model = keras.Sequential([keras.Input((1,)), dense])
        trainer = make(strategy, model, optimizer, lambda y, p: 1e-9 * tf.cast(p[:, 0], tf.float32))
        (row,) = train(trainer, batches(np.ones((1, 4, 1), "float32"), np.zeros((1, 4), "float32")), 1)
        return row["grad_norm"]

    assert run(keras.optimizers.SGD(0.1, loss_scale_factor=1.0)) == 0
    assert math.isclose(run(keras.optimizers.SGD(0.1)), 1e-9, rel_tol=1e-2)


# ---- steps that are not finite ----


def test_the_first_variable_that_is_not_finite_is_named(strategy):
    """Of two layers, the second one's gradient is infinite and the loss is not."""

    @tf.custom_gradient
    def breaks(x):
        return x, lambda dy: dy * np.inf

    class Breaks(keras.layers.Layer):
        def call(self, x):
            return breaks(x)

    first, second = (keras.layers.Dense(1, dtype="float64", name=name) for name in ("intact", "broken"))
    inputs = keras.Input((3,), dtype="float64")
    model = keras.Model(inputs, first(inputs) + Breaks()(second(inputs)))
    trainer = make(strategy, model)
    with pytest.raises(NotFiniteError, match="first the gradient of broken/kernel on replica 0; no variable was changed"):
        train(trainer, batches(*regression()), 9, tfdist.actions.StopIfNotFinite(3))
    events = [row for row in trainer.writers[0] if row.get("name") == "skip_step"]
    assert {(row["not_finite"], row["replica"]) for row in events} == {("the gradient of broken/kernel", 0)}


# ---- what is refused ----


def test_negative_weights_count_in_both_sums(strategy):
    x, y = np.zeros((8, 3)), np.arange(8.0)
    weight = np.array([1.0] * 6 + [-1.0] * 2)
    model = linear()
    model.set_weights([np.zeros((3, 1)), np.zeros(1)])
    result = make(strategy, model).evaluate(lambda _: tf.data.Dataset.from_tensors((x, y, weight)))
    assert math.isclose(result.loss, (y**2 * weight).sum() / weight.sum())


def test_added_losses_may_have_any_shape_and_type(strategy):
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(tf.cast(tf.reduce_mean(x**2, -1), tf.bfloat16))
            self.add_loss(tf.reduce_mean(x))
            return x

    model = keras.Sequential(
        [keras.Input((3,), dtype="float64"), Adds(dtype="float64"), keras.layers.Dense(1, dtype="float64")]
    )
    (row,) = train(make(strategy, model), batches(*regression()), 1)
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize(
    ("options", "element", "expected"),
    [
        ({"loss": [squared]}, 3, "loss: expected a function or a dict of them, found list"),
        ({}, "dict", "weight: expected one tensor for one loss, found a dict"),
        ({"metrics": {"perplexity": squared}}, 3, "metrics: expected other names than the columns"),
    ],
)
def test_wrong_losses_weights_and_metrics_are_one_line(strategy, options, element, expected):
    x, y, weight = (a[0] for a in regression())
    weight = {"one": weight} if element == "dict" else weight
    with pytest.raises(UserError, match=expected):
        make(strategy, **options).evaluate(lambda _: tf.data.Dataset.from_tensors((x, y, weight)))


def test_a_model_that_is_not_built_is_refused(strategy):
    class Later(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    with pytest.raises(UserError, match="found one that is not built yet"):
        make(strategy, Later())


@pytest.mark.parametrize("setting", [{"use_ema": True}, {"global_clipnorm": 1.0}])
def test_settings_inside_of_several_optimizers_are_refused(strategy, setting):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("Keras has it since 3.15")
    inner = keras.optimizers.SGD(0.1, **setting)
    with pytest.raises(UserError, match="clipping or EMA inside of a MultiOptimizer on OneDevice"):
        make(strategy, linear(), keras.optimizers.MultiOptimizer(lambda variable: inner))


def test_what_is_frozen_is_not_kept_for_a_skipped_step(strategy):
    frozen = keras.layers.Dense(4)
    model = keras.Sequential([keras.Input((3,)), frozen, keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    frozen.trainable = False
    names = [variable.name for variable in make(strategy, model).state.written_by_forward]
    assert names == ["moving_mean", "moving_variance"]
