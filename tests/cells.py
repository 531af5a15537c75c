"""Training runs that every strategy must agree on. Runs in a process of its own:

    python tests/cells.py mirrored:2 float64 FOLDER CELL ...

writes the losses of every step and every variable on every replica into FOLDER/CELL.0.npz. `multi_worker:2x1` (workers x
devices) is one worker of a cluster, whose second one writes CELL.1.npz; `parameter_server:2x3x2` is one task of a cluster of
2 workers and 3 servers, that cuts each batch in 2.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tfdist
from tfdist.config import ModelConfig
from tfdist.models.dropout import Dropout
from tfdist.models.transformer import TransformerLM, next_token_loss, token_accuracy, training_loss
from tfdist.train.loss import Loss

NUM_STEPS = 20
LENGTH, VOCABULARY = 8, 13
CELLS: dict[str, Callable[["Bench"], None]] = {}
# cells that compute in 16 bits run in one precision only, and cannot agree to more than they compute with
SIXTEEN_BITS: dict[str, float] = {}
ON_TWO_REPLICAS_ONLY: set[str] = set()
REMOTE: list[str] = []  # not empty: pipelines run on other processes
NOT_ON_SERVERS = {  # whose optimizer, or Python in the input, parameter servers refuse; tests of their own say so
    "convolution_with_batch_norm_accumulation_and_adafactor",
    "muon_on_hidden_layers",
    "mixed_float16_with_an_overflow_on_one_replica",
    "pipelines_that_end_at_different_steps",
}
NOT_IN_PARTS = NOT_ON_SERVERS | {  # with `gradients_per_update`: statistics of layers, and several outputs
    "batch_norm_with_empty_replicas_and_added_losses",
    "a_model_that_keeps_tensors_across_batch_norms",
    "added_losses_and_what_layers_count",
    "several_inputs_and_outputs_with_their_own_weights",
    "frozen_layers_missing_gradients_and_averaged_evaluation",
    "a_step_that_is_not_finite_is_skipped_by_all",
}
ALONE = {"every_other_optimizer"}  # many runs: it has a process, and a slow test, of its own

# true gradient zero: a key bias shifts all scores of a query alike, so its gradient is rounding noise, which Adam scales up
# to the size of the learning rate
ZERO_GRADIENT = ("attention/key/bias",)


def cell(fn=None, *, tolerance: float = 0.0, two_replicas: bool = False):
    """Registers a cell; `tolerance` of one in 16 bits."""
    if fn is None:
        return lambda fn: cell(fn, tolerance=tolerance, two_replicas=two_replicas)
    CELLS[fn.__name__] = fn
    if tolerance:
        SIXTEEN_BITS[fn.__name__] = tolerance
    if two_replicas:
        ON_TWO_REPLICAS_ONLY.add(fn.__name__)
    return fn


class Bench:
    """One cell on one strategy."""

    def __init__(self, strategy, dtype: str):
        self.strategy, self.dtype = strategy, dtype
        self.results: dict[str, np.ndarray] = {}

    def train(
        self, make_model, make_optimizer, loss: Loss, batches: list[tuple], num_steps: int = NUM_STEPS,
        jit_compile: str = "off", steps_per_loop: int = 7, prefix: str = "", dataset_fn=None, **options,
    ):  # fmt: skip
        """Trains over `batches` again and again and keeps losses and variables."""
        keras.utils.set_random_seed(1)
        batches = self.cast(batches)
        rows, traces = [], []
        whole_loss = loss

        def counted(y, predicted):
            traces.append(1)
            return whole_loss(y, predicted)

        loss = counted if callable(loss) else loss

        class Rows:
            write = staticmethod(rows.append)

        with self.strategy.scope():
            model, optimizer = make_model(), make_optimizer()
        trainer = tfdist.Trainer(
            self.strategy,
            model,
            optimizer,
            loss,
            jit_compile=jit_compile,
            writers=[Rows()],
            steps_per_loop=steps_per_loop,
            **options,
        )
        micro_batches = options.get("accumulate_steps", 1)
        with functions_of_tensorflow() as functions:
            made = dataset_fn or (lambda context: dataset(batches, context, micro_batches))
            reached = trainer.train(made, num_steps, [tfdist.actions.Log()])
        self.results[f"{prefix}traces"] = np.array([len(traces)])
        self.results[f"{prefix}collectives"] = np.array([num_collectives(functions)])
        train_rows = [row for row in rows if row["kind"] == "train"]
        assert len(train_rows) == (reached if self.strategy.is_chief else 0)
        assert reached == num_steps or dataset_fn
        kept = {"losses": "loss", "tokens": "tokens", "norms": "grad_norm", "scales": "loss_scale"}
        for name, column in kept.items():
            self.results[f"{prefix}{name}"] = np.array([row.get(column, 0.0) for row in train_rows])
        skipped = [row for row in rows if row.get("name") == "skip_step"]
        self.results[f"{prefix}skipped"] = np.array([row["step"] for row in skipped])
        self.results[f"{prefix}who"] = np.array([f"{row['not_finite']}|{row['replica']}" for row in skipped])
        for key, variable in trainer.state.values().items():
            self.results[f"{prefix}var/{key}"] = self.copies(variable)
        evaluated = trainer.evaluate(lambda context: dataset(batches, context).take(len(batches)))
        numbers = [evaluated.loss, evaluated.weight, evaluated.tokens, *evaluated.metrics.values()]
        self.results[f"{prefix}eval"] = np.array(numbers)
        return trainer

    def copies(self, variable) -> np.ndarray:
        """Its value on each replica of this process; the parts of one on servers as one."""
        parts = [part.numpy() for part in self.strategy.copies(variable)]
        whole = self.strategy.num_servers and parts[0].ndim
        return np.concatenate(parts)[None] if whole else np.stack(parts)

    def cast(self, batches: list[tuple]) -> list[tuple]:
        """NumPy draws in float64."""
        return tf.nest.map_structure(lambda a: a.astype(self.dtype) if a.dtype == np.float64 else a, batches)

    def lm(self, **config):
        values = dict(vocab_size=VOCABULARY, num_layers=1, num_heads=2, model_dim=8, dtype=self.dtype) | config
        return TransformerLM(ModelConfig(**values), LENGTH)


@contextlib.contextmanager
def functions_of_tensorflow():
    """Collects what is traced inside."""
    found = []
    trace = tf.__internal__.FuncGraph.__init__

    def noted(self, *args, **kwargs):
        found.append(self)
        trace(self, *args, **kwargs)

    tf.__internal__.FuncGraph.__init__ = noted
    try:
        yield found
    finally:
        tf.__internal__.FuncGraph.__init__ = trace


def num_collectives(graphs) -> int:
    """How many reductions over the network a step has: graphs without those that only hold another one."""
    return sum(sum(op.type.startswith("CollectiveReduce") for op in graph.get_operations()) for graph in graphs)


def dataset(batches: list[tuple], context, micro_batches: int = 1) -> tf.data.Dataset:
    """Batches of any size, over and over, from `start_step` on: this pipeline's rows of each."""
    sizes = [len(tf.nest.flatten(batch)[0]) for batch in batches]
    rows = context.rows(max(sizes), micro_batches)
    mine = [
        tf.nest.map_structure(lambda a, size=size: a[rows[rows < size]], batch)
        for size, batch in zip(sizes, batches, strict=True)
    ]
    if REMOTE:  # what runs there is TensorFlow alone
        data = functools.reduce(tf.data.Dataset.concatenate, map(tf.data.Dataset.from_tensors, mine))
        return data.repeat().skip(context.start_step)
    spec = tf.nest.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), batches[0])
    data = tf.data.Dataset.from_generator(lambda: iter(mine), output_signature=spec)
    return data.repeat().skip(context.start_step)


def tokens(rows: list[int], weights: bool = False, seed: int = 0) -> list[tuple]:
    """One batch per entry of `rows`; weights are 0 beyond a random length of each row."""
    rng = np.random.default_rng(seed)
    batches = []
    for n in rows:
        ids = rng.integers(0, VOCABULARY, (n, LENGTH + 1)).astype(np.int32)
        weight = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (n, 1))).astype(np.float32)
        weight *= rng.choice([0.5, 1.0, 2.0], weight.shape).astype(np.float32)
        batches.append((ids[:, :-1], ids[:, 1:], weight) if weights else (ids[:, :-1], ids[:, 1:]))
    return batches


def adamw(**options):
    return keras.optimizers.AdamW(5e-3, weight_decay=0.1, **options)


@cell
def llama_parts_dropout_recompute_and_clipping_with_xla(bench: Bench) -> None:
    parts = dict(
        positions="rotary", norm="rms", activation="swiglu", num_kv_heads=1, use_bias=False, tie_embeddings=False,
        dropout=0.1, recompute=True,
    )  # fmt: skip
    bench.train(
        lambda: bench.lm(**parts), adamw, next_token_loss, tokens([8]), clip_norm=0.5, jit_compile="on", accumulate_steps=2
    )


@cell
def a_small_model_compiled_by_xla_with_dropout_and_accumulation(bench: Bench) -> None:
    """XLA compiles each replica by itself, which takes long of a whole language model."""

    def make_model():
        dense = [keras.layers.Dense(n, dtype=bench.dtype) for n in (6, 1)]
        return keras.Sequential([keras.Input((5,), dtype=bench.dtype), dense[0], Dropout(0.3, "hidden"), dense[1]])

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(16, 5)), rng.normal(size=16), rng.choice([0.0, 1.0, 2.0], 16)) for _ in range(3)]
    loss = lambda y, p: tf.square(p[:, 0] - y)  # noqa: E731
    bench.train(make_model, adamw, loss, batches, clip_norm=0.5, jit_compile="on", accumulate_steps=2)


@cell
def accumulation_dropout_weights_and_a_step_without_any(bench: Bench) -> None:
    """Also uneven micro-batches, label smoothing and z-loss, metrics, and one step per loop."""
    batches = tokens([16, 16, 11], weights=True)
    batches[1] = (*batches[1][:2], np.zeros_like(batches[1][2]))
    loss = training_loss(label_smoothing=0.1, z_loss=1e-2)
    metrics = {"accuracy": token_accuracy, "squared_loss": lambda y, p: tf.square(next_token_loss(y, p))}
    bench.train(
        lambda: bench.lm(dropout=0.2), adamw, loss, batches, accumulate_steps=4, clip_norm=1.0, steps_per_loop=1,
        eval_loss=next_token_loss, metrics=metrics,
    )  # fmt: skip


@cell
def empty_replicas_dropout_clip_by_norm_and_ema(bench: Bench) -> None:
    def optimizer():
        return adamw(clipnorm=0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5)

    bench.train(lambda: bench.lm(dropout=0.2), optimizer, next_token_loss, tokens([8, 1], weights=True))


@cell
def workers_of_unequal_speed_with_dropout_recompute_and_accumulation(bench: Bench) -> None:
    """The first worker computes three times the rows of each other."""
    weights = bench.strategy.worker_weights
    if bench.strategy.num_workers > 1:
        bench.strategy.worker_weights = (3.0, *[1.0] * (bench.strategy.num_workers - 1))
    batches = tokens([16, 11], weights=True)
    model = lambda: bench.lm(dropout=0.2, recompute=True)  # noqa: E731
    bench.train(model, adamw, next_token_loss, batches, accumulate_steps=2, clip_norm=1.0)
    bench.strategy.worker_weights = weights


@cell
def pipelines_that_end_at_different_steps(bench: Bench) -> None:
    """The first worker has 5 batches, every other one 7: all finish together, after 7 steps, with the weights of what
    was there. Elements of different sizes, which the pipeline does not tell beforehand."""
    batches = tokens([8, 5, 8, 8, 6, 7, 8], weights=True)

    def dataset_fn(context):
        of_one = context.pipelines == 1  # it has what all together have
        # of each batch the first four rows are the first worker's
        shares = [[(a[: 4 if i < 5 else 0], a[4:]) for a in batch] for i, batch in enumerate(batches)]

        def rows():
            for i, share in enumerate(shares):
                if of_one:
                    yield tuple(np.concatenate(both) for both in share)
                elif context.pipeline == 0 and i < 5:
                    yield tuple(first for first, _ in share)
                elif context.pipeline:
                    last = [second for _, second in share]
                    part = np.array_split(np.arange(len(last[0])), context.pipelines - 1)[context.pipeline - 1]
                    yield tuple(a[part] for a in last)

        signature = tuple(tf.TensorSpec([None, *a.shape[1:]], a.dtype) for a in batches[0])
        return tf.data.Dataset.from_generator(rows, output_signature=signature).skip(context.start_step)

    bench.train(bench.lm, adamw, next_token_loss, batches, dataset_fn=dataset_fn, clip_norm=1.0)


@cell
def dense_model_with_l2_momentum_and_clip_by_value(bench: Bench) -> None:
    def make_model():
        l2 = keras.regularizers.L2(1e-2)
        return keras.Sequential([
            keras.Input((5,), dtype=bench.dtype),
            keras.layers.Dense(7, activation="tanh", kernel_regularizer=l2, dtype=bench.dtype),
            keras.layers.Dense(3, dtype=bench.dtype),
        ])  # fmt: skip

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 5)), rng.normal(size=(n, 3))) for n in (8, 6)]
    loss = keras.losses.MeanSquaredError(reduction="none", dtype=bench.dtype)
    bench.train(make_model, lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipvalue=0.05), loss, batches)


def images(rows: list[int], classes: int = 3) -> list[tuple]:
    rng = np.random.default_rng(0)
    return [(rng.normal(2.0, 3.0, size=(n, 6, 6, 2)), rng.integers(0, classes, n)) for n in rows]


def classification(y, predicted):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, predicted)


@cell
def convolution_with_batch_norm_accumulation_and_adafactor(bench: Bench) -> None:
    def make_model():
        return keras.Sequential([
            keras.Input((6, 6, 2), dtype=bench.dtype),
            keras.layers.Conv2D(3, 3, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.8),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ])  # fmt: skip

    def accuracy(y, predicted):
        return tf.cast(tf.equal(y, tf.argmax(predicted, -1)), predicted.dtype)

    bench.train(
        make_model, lambda: keras.optimizers.Adafactor(1e-2), classification, images([16, 11]), accumulate_steps=2,
        metrics={"accuracy": accuracy},
    )  # fmt: skip


@cell
def batch_norm_with_empty_replicas_and_added_losses(bench: Bench) -> None:
    """A batch of one row, one without weight, and losses that layers add themselves while replicas take turns."""

    def make_model():
        inputs = keras.Input((5,), dtype=bench.dtype)
        x = keras.layers.Dense(4, kernel_regularizer="l2", use_bias=False)(inputs)
        x = keras.layers.Activation("tanh")(keras.layers.BatchNormalization(synchronized=True)(x))
        x = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Dense(4, use_bias=False)(x))
        return keras.Model(inputs, keras.layers.Dense(3)(x))

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 5)), rng.normal(size=(n, 3)), rng.choice([0.0, 1.0, 2.0], n)) for n in (8, 1, 8, 8)]
    batches[1][2][:] = 1
    batches[2][2][:] = 0
    loss = keras.losses.MeanSquaredError(reduction="none", dtype=bench.dtype)
    bench.train(make_model, adamw, loss, batches, clip_norm=0.5)


@cell
def a_model_that_keeps_tensors_across_batch_norms(bench: Bench) -> None:
    """As a U-Net does: what one replica noted must not reach another one, whose thread runs in between."""

    class Keeps(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = [keras.layers.Dense(4, use_bias=False) for _ in range(2)]
            self.norms = [keras.layers.BatchNormalization() for _ in range(2)]
            self.out = keras.layers.Dense(3)

        def call(self, x, training=None):
            self.skips = []
            for dense, norm in zip(self.dense, self.norms, strict=True):
                self.last = dense(x)
                self.skips.append(self.last)
                x = tf.tanh(norm(self.last, training=training)) + self.last
            return self.out(x + self.skips[0])

    def make_model():
        model = Keeps()
        model(np.zeros((1, 5)))
        return model

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 5)), rng.normal(size=(n, 3))) for n in (8, 7)]
    loss = keras.losses.MeanSquaredError(reduction="none", dtype=bench.dtype)
    bench.train(make_model, lambda: keras.optimizers.SGD(0.05), loss, batches)


@cell
def added_losses_and_what_layers_count(bench: Bench) -> None:
    """`add_loss` of the data, a mean over the rows; a layer's own counter and running mean."""

    class Watching(keras.layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="count")
            self.seen = self.add_weight(
                shape=(), dtype="int32", initializer="zeros", trainable=False, name="seen", aggregation="sum"
            )
            self.mean = self.add_weight(shape=(), initializer="zeros", trainable=False, name="mean", aggregation="mean")

        def call(self, x, training=None):
            if training:
                self.count.assign(self.count + 1)
                self.seen.assign(self.seen + tf.shape(x)[0])
                self.mean.assign(self.mean * 0.9 + tf.reduce_mean(x) * 0.1)
                self.add_loss(0.1 * tf.reduce_mean(tf.square(x)))
            return x

    def make_model():
        return keras.Sequential(
            [keras.Input((5,), dtype=bench.dtype), keras.layers.Dense(4), Watching(), keras.layers.Dense(3)]
        )

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(12, 5)), rng.normal(size=(12, 3)))]
    loss = keras.losses.MeanSquaredError(reduction="none", dtype=bench.dtype)
    bench.train(make_model, lambda: keras.optimizers.SGD(0.1), loss, batches)


@cell
def recurrent_with_sparse_embedding_and_lion(bench: Bench) -> None:
    """The gradient of the embedding table is sparse (IndexedSlices); masked steps of the GRU."""

    def make_model():
        return keras.Sequential([
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(VOCABULARY, 4, mask_zero=True),
            keras.layers.GRU(5),
            keras.layers.Dense(3),
        ])  # fmt: skip

    rng = np.random.default_rng(0)
    batches = [(ids[:, 1:], ids[:, 0] % 3) for n in (8, 6) for ids in [rng.integers(0, VOCABULARY, (n, LENGTH + 1))]]
    bench.train(make_model, lambda: keras.optimizers.Lion(1e-2), classification, batches, clip_norm=1.0)


@cell
def rows_of_embeddings_with_sgd_and_adagrad(bench: Bench) -> None:
    """Ids come more than once, in a row, over rows and over micro-batches; most rows of the tables never do. Also a table of
    a user's layer, which is read as a whole, and a weight that is one number."""

    class Own(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(9, 2), initializer="uniform", name="table")
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

        def call(self, ids):
            return tf.gather(tf.convert_to_tensor(self.table), ids) * self.scale

    def make_model():
        inputs = {name: keras.Input((3,), dtype="int32", name=name) for name in ("a", "b")}
        table = keras.layers.Embedding(40, 4)
        parts = [table(inputs["a"]), table(inputs["b"]), keras.layers.Embedding(9, 2)(inputs["b"]), Own()(inputs["b"])]
        x = keras.layers.Concatenate()(parts)
        return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))

    rng = np.random.default_rng(0)
    batches = [
        ({"a": rng.integers(0, 20, (n, 3)), "b": rng.integers(3, 9, (n, 3))}, rng.normal(size=n)) for n in (8, 7)
    ]  # fmt: skip
    for name in ("SGD", "Adagrad"):
        make_optimizer = getattr(keras.optimizers, name)
        bench.train(
            make_model, lambda make=make_optimizer: make(0.1), lambda y, p: tf.square(p[:, 0] - y), batches, clip_norm=0.5,
            accumulate_steps=2, prefix=f"{name}|",
        )  # fmt: skip


@cell
def several_inputs_and_outputs_with_their_own_weights(bench: Bench) -> None:
    def make_model():
        inputs = {"a": keras.Input((3,), dtype=bench.dtype, name="a"), "b": keras.Input((4, 2), dtype=bench.dtype, name="b")}
        flat = keras.layers.Concatenate()([inputs["a"], keras.layers.Flatten()(inputs["b"])])
        hidden = keras.layers.Dense(6, activation="tanh")(flat)
        series = keras.layers.Reshape((4, 3))(keras.layers.Dense(12)(hidden))
        return keras.Model(inputs, {"value": keras.layers.Dense(1)(hidden), "series": series})

    rng = np.random.default_rng(0)

    def batch(n):
        x = {"a": rng.normal(size=(n, 3)), "b": rng.normal(size=(n, 4, 2))}
        y = {"value": rng.normal(size=n), "series": rng.integers(0, 3, (n, 4))}
        return x, y, {"value": rng.choice([0.0, 1.0], n), "series": rng.choice([0.0, 0.5, 1.0], (n, 4))}

    losses = {"value": lambda y, p: 0.3 * tf.square(p[:, 0] - y), "series": classification}
    bench.train(
        make_model, lambda: keras.optimizers.RMSprop(1e-2), losses, [batch(8), batch(7)], accumulate_steps=2, clip_norm=1.0,
        metrics={"value/absolute": lambda y, p: tf.abs(p[:, 0] - y)},
    )  # fmt: skip


@cell
def muon_on_hidden_layers(bench: Bench) -> None:
    def make_model():
        return keras.Sequential(
            [
                keras.Input((5,), dtype=bench.dtype),
                *(keras.layers.Dense(6, activation="tanh") for _ in range(2)),
                keras.layers.Dense(3),
            ]
        )

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 5)), rng.normal(size=(n, 3))) for n in (8, 6)]
    loss = keras.losses.MeanSquaredError(reduction="none", dtype=bench.dtype)
    bench.train(make_model, lambda: keras.optimizers.Muon(1e-2, exclude_layers=["dense_2"]), loss, batches)


@cell
def frozen_layers_missing_gradients_and_averaged_evaluation(bench: Bench) -> None:
    def make_model():
        inputs = keras.Input((5,), dtype=bench.dtype)
        frozen, norm, unused = keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)
        hidden = norm(frozen(inputs))
        model = keras.Model(inputs, {"used": keras.layers.Dense(1)(hidden), "unused": unused(hidden)})
        frozen.trainable = norm.trainable = False
        return model

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 5)), rng.normal(size=n)) for n in (8, 7)]
    bench.train(
        make_model, lambda: adamw(use_ema=True, ema_momentum=0.9), lambda y, p: tf.square(p["used"][:, 0] - y), batches
    )


@cell
def a_step_that_is_not_finite_is_skipped_by_all(bench: Bench) -> None:
    """Row 7 of 8, on the last replica whatever their number; with dropout and statistics that must be put back."""

    def make_model():
        return keras.Sequential([
            keras.Input((5,), dtype=bench.dtype),
            keras.layers.Dense(4, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ])  # fmt: skip

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(8, 5)), rng.normal(size=8)) for _ in range(5)]
    batches[3][1][7] = np.inf
    trainer = bench.train(make_model, adamw, lambda y, p: tf.square(p[:, 0] - y), batches, clip_norm=1.0)

    def copies():  # of every variable on every replica but the number of the step, which counts skipped ones too
        return [bench.copies(v) for key, v in trainer.state.values().items() if key != "step"]

    before = copies()
    iterator = bench.strategy.distribute(lambda context: dataset(bench.cast(batches[3:4]), context))
    outputs, _ = trainer.train_steps(iterator, 1)
    bench.results["changed"] = np.array([sum((a != b).any() for a, b in zip(before, copies(), strict=True))])
    assert outputs["skipped"][0] == 1 and bench.results["changed"] == 0


@cell(tolerance=3e-2)  # 8 units of the last of 8 bits: each share's gradient, a sum with cancellation, is rounded by itself
def mixed_bfloat16(bench: Bench) -> None:
    model = lambda: bench.lm(dtype="mixed_bfloat16")  # noqa: E731
    bench.train(model, lambda: keras.optimizers.SGD(0.05), next_token_loss, tokens([8, 5]), clip_norm=1.0)


@cell(tolerance=4e-3)  # four units of the last of 11 bits, through 20 steps with momentum
def mixed_float16_with_an_overflow_on_one_replica(bench: Bench) -> None:
    """The scale must take the same course everywhere: halved once by the overflow, doubled after 6 good steps."""

    def make_model():
        policy = keras.DTypePolicy("mixed_float16")
        return keras.Sequential([
            keras.Input((5,), dtype="float32"),
            keras.layers.Dense(7, activation="tanh", dtype=policy),
            keras.layers.Dense(1, dtype=policy),
        ])  # fmt: skip

    def make_optimizer():
        inner = keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=1.0)
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0, dynamic_growth_steps=6)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)).astype("float32"), rng.normal(size=7).astype("float32")
    batches = [(x, y.copy()) for _ in range(NUM_STEPS)]
    batches[4][1][0] = 1e5  # the gradient of its loss is beyond float16, and on the first replica alone

    def loss(y, predicted):
        return tf.square(tf.cast(predicted[:, 0], tf.float32) - y)

    bench.train(make_model, make_optimizer, loss, batches)


@cell(two_replicas=True)
def every_other_optimizer(bench: Bench) -> None:
    """All that the cells above do not use."""
    everything = {
        name: optimizer
        for name, optimizer in vars(keras.optimizers).items()
        if isinstance(optimizer, type) and issubclass(optimizer, keras.optimizers.Optimizer)
    }
    elsewhere = {"Optimizer", "LossScaleOptimizer", "AdamW", "SGD", "RMSprop", "Adafactor", "Lion", "Muon", "MultiOptimizer"}
    assert elsewhere - {"MultiOptimizer"} < set(everything)
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(6, 3)), rng.normal(size=6), rng.choice([1.0, 2.0], 6))]

    def make_model():
        return keras.Sequential(
            [keras.Input((3,), dtype=bench.dtype), keras.layers.Dense(2, name="first"), keras.layers.Dense(1, name="second")]
        )

    factories = {name: (lambda cls=cls: cls(1e-2)) for name, cls in everything.items() if name not in elsewhere}
    if "MultiOptimizer" in everything:  # since Keras 3.15

        def several():
            sgd, others = keras.optimizers.SGD(0.1), keras.optimizers.AdamW(1e-2)
            return keras.optimizers.MultiOptimizer(lambda variable: sgd if "first" in variable.path else others)

        factories["MultiOptimizer"] = several
    for name, factory in factories.items():
        bench.train(make_model, factory, lambda y, p: tf.square(p[:, 0] - y), batches, num_steps=5, prefix=f"{name}|")


@cell(two_replicas=True)
def stock_dropout_differs_between_replicas(bench: Bench) -> None:
    """Keeps the mask of row 0 and of row 1, which are on two replicas: the places of the kernel that one step changed."""
    x = np.ones((2, 64))

    def make_model():
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        return keras.Sequential([keras.Input((64,), dtype=bench.dtype), keras.layers.Dropout(0.5), dense])

    for row in (0, 1):
        batches = [(x, np.zeros(2), np.eye(2)[row])]
        trainer = bench.train(
            make_model,
            lambda: keras.optimizers.SGD(1.0),
            lambda y, p: p[:, 0] - y,
            batches,
            num_steps=1,
            prefix=f"mask_{row}|",
        )
        bench.results[f"mask_{row}"] = (trainer.model.trainable_variables[0].numpy()[:, 0] != 0).astype(int)
        bench.results = {
            name: value for name, value in bench.results.items() if name.startswith("mask_") and "|" not in name
        }


def make_strategy(name: str):
    kind, _, count = name.partition(":")
    if kind == "parameter_server":  # workers x servers, and into how many parts a batch is cut
        REMOTE.append(name)
        parts = int([*count.split("x"), "1"][2])
        cut = {"partitioner": "max_size", "max_shard_bytes": 512} if parts > 1 else {"min_shard_bytes": 64}
        return tfdist.ParameterServer(max_staleness=0, gradients_per_update=parts, **cut)
    if kind == "multi_worker":
        return tfdist.MultiWorkerMirrored(num_devices=int(count.partition("x")[2]))
    return tfdist.OneDevice() if kind == "one_device" else tfdist.Mirrored(int(count))


def main(name: str, dtype: str, folder: str, *cell_names: str) -> None:
    tf.get_logger().setLevel("ERROR")  # every trainer traces its own loop
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})  # half of the time of such short runs
    strategy = make_strategy(name)
    keras.config.set_floatx(dtype)
    for cell_name in cell_names:
        keras.backend.clear_session()  # layers have the names that they have alone
        bench = Bench(strategy, dtype)
        started_s = time.perf_counter()
        CELLS[cell_name](bench)
        print(f"{cell_name}: {time.perf_counter() - started_s:.1f} s")
        out = f"{folder}/{cell_name}.{strategy.worker}"
        with open(f"{out}.new", "wb") as file:
            np.savez(file, **bench.results)
        os.rename(f"{out}.new", f"{out}.npz")


if __name__ == "__main__":
    main(*sys.argv[1:])
