"""The trainer on one device: the NumPy formula, resuming, signals, refusals. Other strategies: test_equality.py."""

import math
import os
import resource
import shutil
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.checkpoint import store
from tfdist.config import ModelConfig
from tfdist.errors import CheckpointError, NotFiniteError, Stopped, UserError
from tfdist.metrics.writers import TensorBoard, read_rows
from tfdist.models.transformer import TransformerLM, next_token_loss
from tfdist.strategies import multi_worker
from tfdist.train.actions import write_evaluation
from tfdist.train.loop import Turn, next_stop
from tfdist.train.step import all_reduce

LENGTH = 8


class Rows(list):
    """A writer that keeps its rows."""

    write = list.append

    def close(self):
        """Nothing to close."""


@pytest.fixture(scope="module")
def strategy():
    strategy = tfdist.OneDevice()
    with strategy.scope():  # every model and optimizer of this module is made in it
        yield strategy


def linear():
    return keras.Sequential([keras.Input((3,), dtype="float64"), keras.layers.Dense(1, dtype="float64")])


def squared(y, predicted):
    return tf.square(predicted[:, 0] - y)


def regression(rows=8, steps=50):
    rng = np.random.default_rng(0)
    weight = rng.choice([0.0, 1.0, 2.5], size=(steps, rows))
    return rng.normal(size=(steps, rows, 3)), rng.normal(size=(steps, rows)), weight


def batches(*arrays):
    return lambda context: tf.data.Dataset.from_tensor_slices(arrays).skip(context.start_step)


def make(strategy, model=None, optimizer=None, loss=squared, **options):
    options = {"jit_compile": "off", "writers": [Rows()]} | options
    return tfdist.Trainer(strategy, model or linear(), optimizer or keras.optimizers.SGD(0.1), loss, **options)


def train(trainer, dataset_fn, num_steps, *actions):
    trainer.train(dataset_fn, num_steps, [tfdist.actions.Log(), *actions])
    return [row for row in trainer.writers[0] if row["kind"] == "train"]


# ---- the numbers ----


@pytest.mark.parametrize("accumulate_steps", [1, 4])
def test_adamw_with_clipping_decay_and_weights_is_the_numpy_formula(strategy, accumulate_steps):
    x, y, weight = regression()
    model = linear()
    values = [model.trainable_variables[0].numpy()[:, 0], model.trainable_variables[1].numpy()]
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, beta_1=0.9, beta_2=0.95, epsilon=1e-8)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    trainer = make(strategy, model, optimizer, clip_norm=0.5, accumulate_steps=accumulate_steps)
    rows = train(trainer, batches(x, y, weight), 10)

    first, second = [np.zeros(3), np.zeros(1)], [np.zeros(3), np.zeros(1)]
    for t in range(10):
        error = x[t] @ values[0] + values[1] - y[t]
        total = weight[t].sum()
        gradients = [2 * (error * weight[t]) @ x[t] / total, np.array([2 * error @ weight[t] / total])]
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        np.testing.assert_allclose(rows[t]["loss"], (error**2 * weight[t]).sum() / total, rtol=1e-6)
        np.testing.assert_allclose(rows[t]["grad_norm"], norm, rtol=1e-6)
        assert rows[t]["tokens"] == (weight[t] > 0).sum()
        values[0] = values[0] * (1 - 0.01 * 0.1)  # decoupled decay, not on the bias
        for i, g in enumerate(gradients):
            g = g * 0.5 / max(norm, 0.5)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            rate = 0.01 * math.sqrt(1 - 0.95 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            values[i] = values[i] - rate * first[i] / (np.sqrt(second[i]) + 1e-8)
    np.testing.assert_allclose(model.trainable_variables[0].numpy()[:, 0], values[0], rtol=1e-6)
    np.testing.assert_allclose(model.trainable_variables[1].numpy(), values[1], rtol=1e-6)
    assert int(optimizer.iterations.numpy()) == 10


@pytest.mark.parametrize("steps_per_loop", [1, 7, 100])
def test_steps_per_loop_changes_nothing(strategy, steps_per_loop):
    keras.utils.set_random_seed(0)
    trainer = make(strategy, steps_per_loop=steps_per_loop)
    losses = [row["loss_hex"] for row in train(trainer, batches(*regression()), 20)]
    keras.utils.set_random_seed(0)
    assert losses == [row["loss_hex"] for row in train(make(strategy), batches(*regression()), 20)]


def test_one_trace_per_shape(strategy):
    traces = []

    def loss(y, predicted):
        traces.append(1)
        return squared(y, predicted)

    x, y, weight = regression(steps=9)
    trainer = make(strategy, loss=loss, steps_per_loop=3)

    def uneven(context):
        data = tf.data.Dataset.from_tensor_slices((x.reshape(-1, 3), y.reshape(-1), weight.reshape(-1)))
        return data.batch(7).skip(context.start_step)  # the last batch has 2 rows

    train(trainer, uneven, 100)
    assert trainer.step == 11, "the end of the input ends the run"
    assert len(traces) == 1


def test_evaluation_is_exact_whatever_the_batch_size(strategy):
    x, y, weight = (a.reshape(-1, *a.shape[2:]) for a in regression())
    trainer = make(strategy)
    kernel, bias = (v.numpy() for v in trainer.model.trainable_variables)
    expected = ((x @ kernel[:, 0] + bias - y) ** 2 * weight).sum() / weight.sum()
    for size in (1, 7, 400, 1000):
        data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(size)
        result = trainer.evaluate(lambda _, data=data: data)
        assert math.isclose(result.loss, expected, rel_tol=1e-12)
        assert result.tokens == (weight > 0).sum() and math.isclose(result.weight, weight.sum())


def test_variables_without_a_gradient_are_left_alone(strategy):
    inputs = keras.Input((3,), dtype="float64")
    used, unused = keras.layers.Dense(1, dtype="float64"), keras.layers.Dense(1, dtype="float64")
    model = keras.Model(inputs, [used(inputs), unused(inputs)])
    before = unused.get_weights()
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    trainer = make(strategy, model, optimizer, loss=lambda y, p: squared(y, p[0]), accumulate_steps=2)
    train(trainer, batches(*regression()), 3)
    np.testing.assert_array_equal(unused.get_weights()[0], before[0])


def test_stock_dropout_differs_between_steps_and_is_the_same_again(strategy):
    """Seeds of stock layers are a function of the step: a run that is resumed draws what it would have drawn."""
    whole = run_with_dense(strategy, 0, 6)
    assert len(set(whole)) == 6
    assert run_with_dense(strategy, 3, 6) == whole[3:]


def run_with_dense(strategy, start, stop):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    trainer = make(strategy, model, keras.optimizers.SGD(0.0), loss=lambda y, p: tf.square(p[:, 0] - y))
    trainer.state.step.assign(start)
    data = tf.data.Dataset.from_tensors((tf.ones([4, 64]), tf.ones([4]))).repeat(10)
    return [row["loss"] for row in train(trainer, lambda context: data.skip(context.start_step), stop)]


def test_a_resumed_run_lays_out_batches_like_the_first_one(strategy):
    """The second batch is the short one: a run that starts there must not take it for a whole one."""

    def uneven(context):
        x, y, weight = (a.reshape(-1, *a.shape[2:])[:10] for a in regression())
        return tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(4).repeat(3).skip(context.start_step)

    keras.utils.set_random_seed(0)
    whole = train(make(strategy, accumulate_steps=2), uneven, 100)
    assert len(whole) == 9
    keras.utils.set_random_seed(0)
    trainer = make(strategy, accumulate_steps=2)
    first = train(trainer, uneven, 2)
    again = train(trainer, uneven, 100)
    assert [row["loss_hex"] for row in again] == [row["loss_hex"] for row in whole]
    assert len(first) == 2 or first is again
    assert train(trainer, uneven, 100) == again, "nothing is left: the end of the input, not an error"


def test_what_the_forward_pass_writes_is_put_back_when_a_step_is_skipped(strategy):
    class Counter(keras.layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

        def call(self, x, training=None):
            if training:
                self.count.assign(self.count + 1.0)
            return x

    x, y, weight = regression(steps=5)
    x[1] = np.nan
    weight[3] = 0
    counter = Counter()
    model = keras.Sequential([keras.Input((3,), dtype="float64"), counter, keras.layers.Dense(1, dtype="float64")])
    trainer = make(strategy, model)
    train(trainer, batches(x, y, weight), 100)
    assert trainer.step == 5
    assert counter.count.numpy() == 3, "not in the step of NaN, nor without weight, nor behind the end of the input"


def test_an_infinite_loss_without_weight_does_not_count(strategy):
    """In evaluation. In training its gradient is not finite (0 x inf), and the step is skipped and said."""
    x, y, weight = regression()
    expected = make(strategy, model := linear()).evaluate(batches(x, y, weight)).loss
    y = np.where(weight == 0, np.inf, y)
    assert make(strategy, model).evaluate(batches(x, y, weight)).loss == expected


def test_sixteen_bit_losses_are_counted_exactly(strategy):
    data = tf.data.Dataset.from_tensors((tf.ones([1001, 3]), tf.ones([1001])))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype="mixed_bfloat16")])
    result = make(strategy, model, loss=lambda y, p: tf.square(p[:, 0] - tf.cast(y, p.dtype))).evaluate(lambda _: data)
    assert (result.tokens, result.weight) == (1001, 1001)


# ---- stopping and resuming ----


class SignalAt:
    """Sends this process a signal at a step, as an operator would."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def next_due(self, step):
        return self.step if step < self.step else None

    def maybe(self, trainer, turn: Turn):
        if turn.step == self.step and not turn.last:
            os.kill(os.getpid(), self.number)


def language_model(strategy, steps_per_loop=4):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        config = ModelConfig(vocab_size=13, num_layers=1, num_heads=2, model_dim=8, dropout=0.2)
        model = TransformerLM(config, LENGTH)
        schedule = keras.optimizers.schedules.CosineDecay(0.0, 20, warmup_target=1e-2, warmup_steps=5)
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.1)
    return make(
        strategy, model, optimizer, next_token_loss, accumulate_steps=2, clip_norm=1.0, steps_per_loop=steps_per_loop
    )


def shuffled_tokens(context):
    """Ignores `start_step` on purpose: the trainer has to skip."""
    ids = np.random.default_rng(0).integers(0, 13, (120, LENGTH + 1)).astype(np.int32)
    data = tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:])).shuffle(120, seed=5)
    return data.repeat().batch(6, drop_remainder=True)


@pytest.fixture(scope="module")
def undisturbed(strategy):
    return [row["loss_hex"] for row in train(language_model(strategy), shuffled_tokens, 20)]


@pytest.mark.parametrize(("stop_at", "number"), [(7, signal.SIGTERM), (13, signal.SIGINT)])
def test_a_stopped_run_goes_on_bit_by_bit(strategy, undisturbed, tmp_path, stop_at, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = language_model(strategy)
    assert trainer.restore(tmp_path) == 0
    with pytest.raises(Stopped) as stopped:
        train(trainer, shuffled_tokens, 20, SignalAt(stop_at, number), tfdist.actions.Checkpoint(every_steps=5))
    # the steps in flight when the request is seen are done and saved
    at = trainer.step
    assert stopped.value.code == 143 and stop_at <= at < 20
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    resumed = language_model(strategy, steps_per_loop=3)
    assert resumed.restore(tmp_path) == at
    train(resumed, shuffled_tokens, 20, tfdist.actions.Checkpoint(every_steps=5))
    rows = read_rows(tmp_path / "metrics.jsonl", "train")
    assert [row["loss_hex"] for row in rows] == undisturbed
    assert sorted(store.steps(tmp_path / "checkpoints")) == sorted({5, 10, at, 15, 20})[-3:]
    again = language_model(strategy)
    assert again.restore(tmp_path) == 20
    assert train(again, shuffled_tokens, 20) == []


def test_a_save_that_fails_is_a_warning_on_the_way_and_code_4_when_told_to_stop(strategy, tmp_path):
    trainer = language_model(strategy)
    trainer.restore(tmp_path)
    train(trainer, shuffled_tokens, 5, tfdist.actions.Checkpoint(every_steps=5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    used = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (used + 8192, before[1]))  # rows of metrics fit, checkpoints do not
    try:
        with pytest.raises(Stopped) as stopped:
            train(trainer, shuffled_tokens, 20, SignalAt(9, signal.SIGTERM), tfdist.actions.Checkpoint(every_steps=7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.value.code == 4 and 9 <= trainer.step < 14
    failed = [row for row in trainer.writers[0] if row.get("name") == "checkpoint_failed"]
    assert [row["step"] for row in failed] == [7]
    assert store.latest(tmp_path / "checkpoints").step == 5


def test_another_seed_or_model_is_refused(strategy, tmp_path):
    trainer = make(strategy, seed=1)
    trainer.restore(tmp_path)
    trainer.save()
    with pytest.raises(UserError, match="seed: expected 1 .* found 2"):
        make(strategy, seed=2).restore(tmp_path)
    other = keras.Sequential([keras.Input((3,), dtype="float64"), keras.layers.Dense(2, dtype="float64")])
    with pytest.raises(CheckpointError, match=r"model/layers/0/kernel has shape \[3, 1\], the model needs \[3, 2\]"):
        make(strategy, other, seed=1).restore(tmp_path)
    with pytest.raises(CheckpointError, match="missing optimizer/momentums/layers/0/kernel"):
        make(strategy, optimizer=keras.optimizers.SGD(0.1, momentum=0.9), seed=1).restore(tmp_path)


def emptied(folder):
    for path in folder.iterdir():
        shutil.rmtree(path)


@pytest.mark.parametrize("lose", [shutil.rmtree, emptied])
def test_a_run_whose_checkpoints_are_gone_is_refused(strategy, tmp_path, lose):
    trainer = make(strategy)
    trainer.restore(tmp_path)
    train(trainer, batches(*regression()), 3, tfdist.actions.Checkpoint(every_steps=2))
    lose(tmp_path / "checkpoints")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"expected that of step 3 \(says .*metrics.jsonl\), found none"):
        make(strategy, seed=5).restore(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and not (tmp_path / "old-1").exists()


def test_a_run_that_never_saved_starts_again_and_its_rows_are_set_aside(strategy, tmp_path):
    losses = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        trainer = make(strategy, writers=[Rows(), TensorBoard(tmp_path / "tensorboard")])
        assert trainer.restore(tmp_path) == trainer.restore(tmp_path) == 0  # a notebook's cell that runs twice
        losses.append([row["loss"] for row in train(trainer, batches(*regression()), 3)])
        trainer.close()
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl", "train")] == losses[1]
    assert [row["loss"] for row in read_rows(tmp_path / "old-1" / "metrics.jsonl", "train")] == losses[0]
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(list((tmp_path / "old-1" / "tensorboard").iterdir())) == 1
    assert not (tmp_path / "old-2").exists()


def test_checkpoint_without_a_workdir_is_refused(strategy):
    with pytest.raises(UserError, match="expected a workdir to save to"):
        train(make(strategy), batches(*regression()), 2, tfdist.actions.Checkpoint(every_steps=1))


# ---- numbers that are not finite ----


def test_a_step_that_is_not_finite_changes_nothing(strategy):
    x, y, weight = regression()
    x[2, 3, 0] = np.inf
    trainer = make(strategy, optimizer=keras.optimizers.AdamW(0.1))
    train(trainer, batches(x, y, weight), 2)
    before = {key: v.numpy() for key, v in trainer.state.values().items() if key != "step"}
    train(trainer, batches(x, y, weight), 3)
    for key, value in before.items():
        np.testing.assert_array_equal(trainer.state.values()[key].numpy(), value)
    assert trainer.step == 3
    assert [row["step"] for row in trainer.writers[0] if row.get("name") == "skip_step"] == [3]


def test_too_many_such_steps_in_a_row_end_the_run_with_a_checkpoint(strategy, tmp_path):
    x, y, weight = regression()
    x[4:] = np.nan
    trainer = make(strategy)
    trainer.restore(tmp_path)
    with pytest.raises(NotFiniteError, match="not finite for 3 steps in a row, up to step 7") as error:
        train(trainer, batches(x, y, weight), 30, tfdist.actions.StopIfNotFinite(3))
    assert error.value.exit_code == 5 and store.latest(tmp_path / "checkpoints") is not None


# ---- refusals ----


def test_a_reduced_loss_is_refused(strategy):
    with pytest.raises(ValueError, match="found a scalar; for a Keras loss pass reduction='none'"):
        train(make(strategy, loss=keras.losses.MeanSquaredError()), batches(*regression()), 1)


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        ({"global_clipnorm": 1.0}, {"clip_norm": 1.0}, "clipping: expected one setting"),
        ({"gradient_accumulation_steps": 4}, {}, "pass Trainer"),
        ({}, {"accumulate_steps": 0}, "accumulate_steps"),
        ({}, {"clip_norm": -1.0}, "clip_norm: expected 0"),
        ({}, {"jit_compile": "yes"}, "jit_compile: expected auto, on or off, found 'yes'"),
    ],
)
def test_contradictions_are_refused(strategy, optimizer, options, expected):
    with pytest.raises(ValueError, match=expected):
        make(strategy, optimizer=keras.optimizers.SGD(0.1, **optimizer), **options)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (tf.data.Dataset.from_tensors((1.0, 1.0)), "found scalar elements"),
        (tf.data.Dataset.from_tensors(tf.ones([2, 3])), r"expected dataset elements \(x, y\)"),
        (tf.data.Dataset.from_tensors((tf.ones([2, 3]),) * 4), "found tuple of 4"),
        (tf.data.Dataset.from_tensor_slices((tf.ones([0, 3]), tf.ones([0]))).batch(4), "at least one batch"),
    ],
)
def test_datasets_of_another_form_are_refused(strategy, dataset, expected):
    with pytest.raises(ValueError, match=expected):
        make(strategy).train(lambda _: dataset, 1)


def test_a_model_or_optimizer_from_outside_the_scope_is_refused(strategy):
    model, optimizer = linear(), keras.optimizers.SGD(0.1)
    other = tfdist.OneDevice()
    with tf.init_scope(), pytest.raises(ValueError, match="made under its scope"):
        make(other, model, optimizer)


@pytest.mark.parametrize("name", ["TPU"])
def test_strategies_to_come_say_so(name):
    with pytest.raises(
        ValueError, match=f"{name}: not there yet; use OneDevice, Mirrored, MultiWorkerMirrored or ParameterServer"
    ):
        getattr(tfdist, name)()


def test_too_late_for_logical_devices(strategy):
    tf.constant(1)  # TensorFlow has started
    with pytest.raises(ValueError, match="make tfdist.Mirrored before any other TensorFlow work"):
        tfdist.Mirrored(3)


# ---- the loop ----


class Due:
    def __init__(self, step):
        self.step = step

    def next_due(self, step):
        return self.step


@pytest.mark.parametrize(
    ("step", "due", "expected"),
    [
        (0, [], (10, 100)),
        (0, [3, 7], (3, 3)),
        (95, [None], (100, 100)),
        (0, [None, 12], (10, 12)),
        (3, [7], (7, 7)),
    ],  # fmt: skip
)
def test_the_loop_lands_on_the_next_due_step(step, due, expected):
    assert next_stop(step, 100, 10, [Due(d) for d in due]) == expected


# ---- between replicas ----


def test_gradients_in_bfloat16_and_counts_exact(strategy):
    gradient, stats = tf.constant([1.0009765625, 3.0]), tf.constant([123457.0, 1.0])

    @tf.function(autograph=False)
    def reduce(dtype):
        return strategy.tf_strategy.run(lambda: all_reduce([gradient, stats], dtype, narrow=1))

    rounded, counts = reduce("bfloat16")
    assert rounded.dtype == tf.float32 and rounded.numpy().tolist() == [1.0, 3.0]
    assert counts.numpy().tolist() == [123457.0, 1.0]
    assert reduce("")[0].numpy().tolist() == gradient.numpy().tolist()


def test_gradients_of_several_types_are_reduced_each_in_its_own(strategy):
    tensors = [tf.constant([1.0], tf.bfloat16), tf.constant([2.0], tf.float64), tf.constant([3.0], tf.float32)]

    @tf.function(autograph=False)
    def reduce():
        return strategy.tf_strategy.run(lambda: all_reduce(tensors))

    assert [(t.dtype, float(t[0])) for t in reduce()] == [(t.dtype, float(t[0])) for t in tensors]


def test_an_unknown_type_to_reduce_in_is_refused(strategy):
    with pytest.raises(UserError, match="reduce_dtype: expected float32 or bfloat16, found 'int8'"):
        make(strategy, reduce_dtype="int8")


def test_a_stop_ends_an_evaluation_and_its_row_is_not_written(strategy):
    """On another thread, in the middle: the result says that it is not complete."""
    trainer = make(strategy)
    data = tf.data.Dataset.from_tensors((np.ones((4, 3)), np.ones((4,)))).repeat(10**9)  # as good as endless
    threading.Timer(1.0, strategy.request_stop).start()
    result = write_evaluation(trainer, lambda context: data, 0.0)
    strategy.request_stop(False)
    assert not result.complete and not [row for row in trainer.writers[0] if row["kind"] == "eval"]


def test_communication_options():
    options = multi_worker._options("ring", 4096, 2.5)
    assert (options.bytes_per_pack, options.timeout_seconds, options.implementation.value) == (4096, 2.5, "RING")
    assert multi_worker._options("auto", 0, 0.0).timeout_seconds is None
