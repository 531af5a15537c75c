"""Programs of Keras `fit` that know nothing of tfdist but the scope; run on one strategy, results in a file.

    python tests/fit_cells.py stock float64 FOLDER CELL ...
    python tests/fit_cells.py mirrored:2 float64 FOLDER CELL ...

write FOLDER/CELL.0.npz, and other workers CELL.1.npz and so on. `stock` is Keras without any strategy: the oracle.
"""

import contextlib
import importlib.util
import os
import sys
import time
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

CELLS = {}
OWN_RANDOMNESS = set()  # masks are those of one device for tfdist's layers only: the oracle is tfdist on one device


ONE_PROCESS = set()  # refused on several workers


def cell(fn=None, *, own_randomness: bool = False, one_process: bool = False, needs: str = "keras"):
    if fn is None:
        return lambda fn: cell(fn, own_randomness=own_randomness, one_process=one_process, needs=needs)
    if importlib.util.find_spec(needs) is None:  # an extra
        return fn
    if one_process:
        ONE_PROCESS.add(fn.__name__)
    CELLS[fn.__name__] = fn
    if own_randomness:
        OWN_RANDOMNESS.add(fn.__name__)
    return fn


class Bench:
    """One cell on one strategy (None: stock Keras)."""

    def __init__(self, strategy, dtype: str):
        self.strategy, self.dtype, self.results = strategy, dtype, {}
        self.rng = np.random.default_rng(0)

    def scope(self):
        keras.utils.set_random_seed(1)
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def normal(self, *shape):
        return self.rng.normal(size=shape).astype(self.dtype)

    def uniform(self, *shape):
        return self.rng.uniform(size=shape).astype(self.dtype)

    def keep(self, name: str, value) -> None:
        for path, leaf in keras.tree.flatten_with_path(value):
            self.results["/".join([name, *map(str, path)])] = np.asarray(leaf, np.float64)

    def keep_variables(self, model, name: str = "var") -> None:
        """Every copy of each."""
        optimizer = getattr(model, "optimizer", None)
        variables = [*model.weights, *(optimizer.variables if optimizer else [])]
        variables = [v for v in variables if not ("key" in v.path and "bias" in v.path)]  # no gradient: rounding, magnified
        for i, variable in enumerate(variables):
            copies = self.strategy.copies(variable) if self.strategy else [variable.value]
            parts = [copy.numpy() for copy in copies]
            on_servers = self.strategy and self.strategy.num_servers and parts[0].ndim
            value = np.concatenate(parts)[None] if on_servers else np.stack(parts)
            self.results[f"{name}/{i}"] = value.astype(np.float64)

    def fit(self, model, *data, **options):
        options = {"verbose": 0, "epochs": 2, **options}
        history = model.fit(*data, **options).history
        self.keep(f"history/{model.name}", history)
        self.keep_variables(model, f"var/{model.name}")
        return history


def dense(bench, units=1, activation="tanh", **options):
    return keras.Sequential([
        keras.Input((5,)), keras.layers.Dense(7, activation=activation, **options), keras.layers.Dense(units)
    ])  # fmt: skip


# ---- models, data, arguments of fit ----


@cell
def numpy_with_sample_weights_validation_and_uneven_batches(bench):
    """13 rows in batches of 3: the first splits unevenly, the last has one row."""
    with bench.scope():
        model = dense(bench, kernel_regularizer="l2", activity_regularizer="l2")
        model.compile("adam", "mse", metrics=["mae"], weighted_metrics=["mse"])
    x, y = bench.normal(13, 5), bench.normal(13, 1)
    bench.fit(model, x, y, batch_size=3, sample_weight=bench.uniform(13), validation_data=(x[:4], y[:4], bench.uniform(4)))
    bench.keep("evaluate", model.evaluate(x, y, batch_size=5, verbose=0, return_dict=True))
    bench.keep("predict", model.predict(x, batch_size=4, verbose=0))


@cell
def convolution_with_batch_norm_class_weight_and_validation_split(bench):
    with bench.scope():
        inputs = keras.Input((6, 6, 1))
        hidden = keras.layers.Conv2D(3, 3, use_bias=False)(inputs)
        hidden = keras.layers.Activation("relu")(keras.layers.BatchNormalization()(hidden))
        model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(hidden)))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), loss, metrics=["accuracy"])
    x, y = bench.normal(22, 6, 6, 1), bench.rng.integers(0, 3, 22)
    bench.fit(model, x, y, batch_size=8, class_weight={0: 1.0, 1: 3.0, 2: 0.5}, validation_split=0.2)


@cell
def dicts_several_outputs_and_their_weights(bench):
    with bench.scope():
        one, other = keras.Input((4,), name="one"), keras.Input((3,), name="other")
        both = keras.layers.Concatenate()([one, other])
        outputs = {"number": keras.layers.Dense(1, name="number")(both), "kind": keras.layers.Dense(3, name="kind")(both)}
        model = keras.Model({"one": one, "other": other}, outputs)
        kind = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
        model.compile(
            keras.optimizers.RMSprop(0.01), {"number": "mae", "kind": kind}, loss_weights={"number": 0.3, "kind": 2.0},
            metrics={"number": ["mse"], "kind": ["accuracy"]}, weighted_metrics={"kind": ["accuracy"]},
        )  # fmt: skip
    rows = 11
    x = {"one": bench.normal(rows, 4), "other": bench.normal(rows, 3)}
    y = {"number": bench.normal(rows, 1), "kind": bench.rng.integers(0, 3, (rows, 1))}
    weights = {"number": bench.uniform(rows), "kind": bench.uniform(rows) * (bench.uniform(rows) > 0.5)}
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(4)
    bench.fit(model, dataset, validation_data=dataset)
    bench.keep("predict", model.predict(dataset, verbose=0))
    bench.keep("list", model.evaluate(dataset, verbose=0))


@cell
def masked_tokens_of_ragged_lengths(bench):
    """Rows of different lengths, padded batch by batch; the loss is a mean over the places that are not masked."""
    with bench.scope():
        tokens = keras.Input((None,), dtype="int32")
        hidden = keras.layers.GRU(5, return_sequences=True)(keras.layers.Embedding(11, 4, mask_zero=True)(tokens))
        model = keras.Model(tokens, keras.layers.Dense(11)(hidden))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01, clipnorm=0.1), loss, metrics=["accuracy"])
    rows = [bench.rng.integers(1, 11, n).astype("int32") for n in (7, 2, 5, 1, 6, 3, 9, 4, 2, 8)]
    signature = tf.TensorSpec([None], tf.int32)
    dataset = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=signature)
    dataset = dataset.map(lambda row: (row[:-1], row[1:])).padded_batch(3)
    bench.fit(model, dataset, validation_data=dataset)


@cell
def text_classifier_of_ragged_tensors(bench):
    with bench.scope():
        model = keras.Sequential([
            keras.Input((None,), dtype="int32"), keras.layers.Embedding(20, 4, mask_zero=True), keras.layers.GRU(3),
            keras.layers.Dense(1, activation="sigmoid"),
        ])  # fmt: skip
        metrics = [keras.metrics.AUC(num_thresholds=20), "accuracy", keras.metrics.Precision(name="precision")]
        model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=metrics)
    rows = [list(bench.rng.integers(1, 20, n)) for n in (3, 5, 1, 7, 2, 4, 6)]
    x = tf.ragged.constant(rows, dtype=tf.int32)
    y = bench.rng.integers(0, 2, (7, 1)).astype(bench.dtype)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4).map(lambda x, y: (x.to_tensor(), y))
    bench.fit(model, dataset)
    bench.keep("predict", model.predict(dataset, verbose=0))


@cell
def recommender_with_a_sparse_embedding(bench):
    """Gradients of the table touch few rows: they stay sparse; ids come more than once."""
    with bench.scope():
        user, item = keras.Input((), dtype="int32", name="user"), keras.Input((), dtype="int32", name="item")
        vectors = [keras.layers.Embedding(size, 3)(ids) for ids, size in ((user, 50), (item, 1000))]
        model = keras.Model({"user": user, "item": item}, keras.layers.Dot(1)(vectors))
        model.compile(keras.optimizers.Adagrad(0.1), "mse")
    x = {"user": bench.rng.integers(0, 50, 23).astype("int32"), "item": bench.rng.integers(0, 9, 23).astype("int32")}
    bench.fit(model, x, bench.normal(23, 1), batch_size=6)


@cell
def rows_of_tables_with_sgd(bench):
    """Ids that come more than once, in an Embedding and in a layer that gathers from a weight of its own; with clipping."""

    class Own(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(9, 2), initializer="uniform", name="table")
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

        def call(self, ids):
            return keras.ops.take(self.table, ids, axis=0) * self.scale

    for compiled in (False, True):
        with bench.scope():
            ids = keras.Input((3,), dtype="int32")
            both = keras.layers.Concatenate()([keras.layers.Embedding(40, 4)(ids), Own()(ids)])
            model = keras.Model(
                ids, keras.layers.Dense(1)(keras.layers.Flatten()(both)), name=f"compiled_{compiled}".lower()
            )
            model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=compiled)
        bench.fit(model, bench.rng.integers(0, 9, (23, 3)).astype("int32"), bench.normal(23, 1), batch_size=6)


@cell
def infinite_dataset_with_steps(bench):
    with bench.scope():
        model = dense(bench)
        model.compile("sgd", "mse", metrics=["mae"], steps_per_execution=2)
    x, y = bench.normal(10, 5), bench.normal(10, 1)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(10, seed=3).repeat().batch(4)
    in_order = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(3)
    bench.fit(model, dataset, steps_per_epoch=6, validation_data=in_order, validation_steps=4)
    bench.keep("evaluate", model.evaluate(in_order, steps=2, verbose=0))
    bench.keep("predict", model.predict(tf.data.Dataset.from_tensor_slices(x).batch(4), steps=2, verbose=0))


@cell(one_process=True)
def sequences_and_generators(bench):
    x, y = bench.normal(14, 5), bench.normal(14, 1)

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return x[3 * i : 3 * i + 3], y[3 * i : 3 * i + 3]

    def batches():
        while True:
            yield x[:5], y[:5]
            yield x[5:9], y[5:9]

    with bench.scope():
        model = dense(bench)
        model.compile("adam", "mse", metrics=["mae"])
    bench.keep("sequence", model.fit(Sequence(), epochs=2, shuffle=False, verbose=0, validation_data=Sequence()).history)
    bench.fit(model, batches(), steps_per_epoch=4)
    bench.keep("evaluate", model.evaluate(batches(), steps=3, verbose=0))


@cell
def single_batches(bench):
    with bench.scope():
        model = dense(bench)
        model.compile(keras.optimizers.Adam(0.01, clipvalue=0.05), "mse", metrics=["mae"])
    x, y = bench.normal(5, 5), bench.normal(5, 1)
    for rows in (5, 4, 1):
        bench.keep(f"train_{rows}", model.train_on_batch(x[:rows], y[:rows], return_dict=True))
    bench.keep("weighted", model.train_on_batch(x, y, sample_weight=bench.uniform(5)))
    bench.keep("test", model.test_on_batch(x, y))
    bench.keep("predict", model.predict_on_batch(x))
    bench.keep_variables(model)


@cell
def one_model_inside_of_the_fit_of_another(bench):
    """A sum of losses: what is weighed twice is seen. And outputs that no collective can carry as they are."""
    with bench.scope():
        one, other = dense(bench), dense(bench)
        for model in (one, other):
            model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
        signs = keras.Sequential([keras.Input((5,)), keras.layers.Lambda(lambda x: x > 0)])
    x, y = bench.normal(7, 5), bench.normal(7, 1)
    found = []
    inside = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: found.append(other.evaluate(x, y, batch_size=3, verbose=0))
    )
    bench.fit(one, x, y, batch_size=3, callbacks=[inside])
    bench.keep("found", found)
    bench.keep("signs", signs.predict(x, batch_size=4, verbose=0))


@cell
def run_eagerly(bench):
    with bench.scope():
        model = dense(bench)
        model.compile(keras.optimizers.Adam(0.01, global_clipnorm=0.1), "mse", metrics=["mae"], run_eagerly=True)
    x, y = bench.normal(7, 5), bench.normal(7, 1)
    bench.fit(model, x, y, batch_size=3, validation_data=(x, y))
    bench.keep("predict", model.predict(x, batch_size=2, verbose=0))


@cell
def a_subclass_that_computes_its_own_loss_and_metrics(bench):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = keras.layers.Dense(6, activation="relu"), keras.layers.Dense(1)
            self.bias = keras.metrics.Mean(name="bias")

        def call(self, x):
            hidden = self.hidden(x)
            self.add_loss(0.01 * keras.ops.mean(keras.ops.square(hidden)))
            return self.out(hidden)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + 0.1 * keras.ops.mean(keras.ops.abs(y_pred))

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.bias.update_state(y_pred - y)
            return super().compute_metrics(x, y, y_pred, sample_weight)

    with bench.scope():
        model = Model()
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), keras.losses.Huber(reduction="sum"), metrics=["mae"])
    x, y = bench.normal(11, 5), bench.normal(11, 1)
    bench.fit(model, x, y, batch_size=4, validation_data=(x, y))
    bench.keep("predict", model.predict(x, verbose=0))


@cell
def a_train_step_of_its_own(bench):
    """With a Loss object, a plain mean, a tracker, and a log that is no metric: all means over rows."""

    class Model(keras.Model):
        def __init__(self, net):
            super().__init__()
            self.net, self.tracker = net, keras.metrics.Mean(name="tracked")

        def call(self, x):
            return self.net(x)

        @property
        def metrics(self):
            return [self.tracker]

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                predicted = self(x, training=True)
                loss = keras.losses.MeanSquaredError()(y, predicted) + keras.ops.mean(keras.ops.abs(predicted))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            self.tracker.update_state(loss)
            return {"tracked": self.tracker.result(), "raw": loss, "more": {"twice": 2 * loss}}

    with bench.scope():
        model = Model(dense(bench))
        model.compile(optimizer=keras.optimizers.Adam(0.01, global_clipnorm=0.1, gradient_accumulation_steps=2))
    x, y = bench.normal(13, 5), bench.normal(13, 1)
    bench.fit(model, x, y, batch_size=5)


@cell
def two_optimizers_in_a_train_step(bench):
    """Of the kind that GANs have: two models, two optimizers, none of them the compiled one."""

    class Model(keras.Model):
        def compile(self, generator_optimizer, critic_optimizer):
            super().compile()
            self.generator_optimizer, self.critic_optimizer = generator_optimizer, critic_optimizer

        def build(self, _=None):
            self.generator, self.critic = dense(bench, 2), keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
            self.built = True

        def call(self, x):
            return self.critic(self.generator(x))

        def train_step(self, x):
            losses = {}
            for name, net, optimizer, sign in (
                ("critic", self.critic, self.critic_optimizer, 1.0),
                ("generator", self.generator, self.generator_optimizer, -1.0),
            ):
                with tf.GradientTape() as tape:
                    losses[name] = tf.reduce_mean(tf.square(sign - self(x)))
                gradients = tape.gradient(losses[name], net.trainable_variables)
                optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))
            return losses

    with bench.scope():
        model = Model()
        model.build()
        model.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01, clipnorm=0.1))
    x = bench.normal(12, 5)
    bench.keep("losses", model.fit(tf.data.Dataset.from_tensor_slices(x).batch(5), epochs=3, verbose=0).history)
    bench.keep_variables(model.generator)
    bench.keep("critic", [v.numpy() for v in [*model.critic_optimizer.variables, *model.generator_optimizer.variables]])


# ---- code that others wrote ----


@cell
def keras_applications_convnet(bench):
    with bench.scope():
        model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3)
        for layer in model.layers[:-20]:  # as in fine-tuning; with batch normalisation
            layer.trainable = False
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    bench.fit(model, bench.uniform(9, 32, 32, 3), bench.rng.integers(0, 3, 9), batch_size=4, epochs=1)


@cell(needs="keras_hub")
def keras_hub_gpt2_and_llama(bench):
    """Built from their arguments; sample weights leave the padding out."""
    import keras_hub

    sizes = {"vocabulary_size": 40, "num_layers": 1, "hidden_dim": 8, "intermediate_dim": 16, "dropout": 0.0}
    tokens = bench.rng.integers(1, 40, (10, 7)).astype("int32")
    padding = (np.arange(6) < bench.rng.integers(2, 7, (10, 1))).astype("int32")
    x = {"token_ids": tokens[:, :-1], "padding_mask": padding}
    for name, make in (
        ("gpt2", lambda: keras_hub.models.GPT2Backbone(**sizes, num_heads=2, max_sequence_length=8, dtype=bench.dtype)),
        ("llama", lambda: keras_hub.models.LlamaBackbone(
            **sizes, num_query_heads=2, num_key_value_heads=1, dtype=bench.dtype)),
    ):  # fmt: skip
        with bench.scope():
            kind = {"gpt2": keras_hub.models.GPT2CausalLM, "llama": keras_hub.models.LlamaCausalLM}[name]
            model = kind(backbone=make(), preprocessor=None)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.AdamW(0.01), loss, weighted_metrics=["accuracy"])
        bench.fit(model, x, tokens[:, 1:], sample_weight=padding.astype(bench.dtype), batch_size=4)
        bench.keep(f"{name}/predict", model.predict(x, batch_size=4, verbose=0))


# ---- arguments of the optimizer ----


@cell
def accumulation_averages_decay_and_schedule(bench):
    with bench.scope():
        model = dense(bench)
        schedule = keras.optimizers.schedules.CosineDecay(0.02, 10, warmup_target=0.05, warmup_steps=3)
        model.compile(
            keras.optimizers.AdamW(
                schedule, weight_decay=0.1, global_clipnorm=0.2, gradient_accumulation_steps=2, use_ema=True,
                ema_momentum=0.9, ema_overwrite_frequency=3,
            ),
            "mse", steps_per_execution=3,
        )  # fmt: skip
    bench.fit(model, bench.normal(25, 5), bench.normal(25, 1), batch_size=4)


@cell
def averages_swapped_for_evaluation(bench):
    with bench.scope():
        model = dense(bench)
        model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8), "mse", metrics=["mae"])
    x, y = bench.normal(9, 5), bench.normal(9, 1)
    bench.fit(
        model, x, y, batch_size=4, validation_data=(x, y), callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
    )


@cell
def loss_scale_with_an_overflow_on_one_replica(bench):
    """Row 7 of 8 overflows in the third batch: all skip it, and the scale is halved once."""
    with bench.scope():
        model = dense(bench)
        inner = keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=1.0)
        model.compile(keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0, dynamic_growth_steps=3), "mse")
    x, y = bench.normal(40, 5), bench.normal(40, 1)
    y[16 + 7] = np.inf
    scales = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: scales.append(float(model.optimizer.dynamic_scale.numpy()))
    )
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[watch])
    bench.keep("scales", scales)
    bench.keep_variables(model)
    assert scales[:5] == [1024, 1024, 512, 512, 512], scales


@cell
def a_fixed_loss_scale_frozen_layers_and_missing_gradients(bench):
    with bench.scope():
        inputs = keras.Input((5,))
        frozen, norm, unused = keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)
        hidden = norm(frozen(inputs))
        model = keras.Model(inputs, [keras.layers.Dense(1)(hidden), unused(hidden)])
        frozen.trainable = norm.trainable = False
        model.compile(keras.optimizers.Lion(0.01, loss_scale_factor=128.0), ["mse", None])
    bench.fit(model, bench.normal(9, 5), bench.normal(9, 1), batch_size=4)


@cell
def compiled_by_xla(bench):
    with bench.scope():
        model = dense(bench, kernel_regularizer="l2")
        model.compile(keras.optimizers.Adam(0.01, global_clipnorm=0.1), "mse", metrics=["mae"], jit_compile=True)
    x, y = bench.normal(11, 5), bench.normal(11, 1)
    function, compiled = tf.function, []

    def noted(*args, **kwargs):
        compiled.append(kwargs.get("jit_compile"))
        return function(*args, **kwargs)

    with mock.patch.object(tf, "function", noted):
        bench.fit(model, x, y, batch_size=4, validation_data=(x, y))
    assert any(compiled), "nothing was compiled"
    bench.keep("predict", model.predict(x, batch_size=4, verbose=0))


@cell
def compiled_by_xla_but_it_communicates(bench):
    """A masked loss has a divisor that is a sum over the replicas; so does batch normalisation."""
    with bench.scope():
        tokens = keras.Input((6,), dtype="int32")
        hidden = keras.layers.Embedding(11, 4, mask_zero=True)(tokens)
        model = keras.Model(tokens, keras.layers.Dense(1)(keras.layers.BatchNormalization()(hidden)))
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    x = bench.rng.integers(0, 11, (10, 6)).astype("int32")
    bench.fit(model, x, bench.normal(10, 6, 1), batch_size=4)


# ---- callbacks ----


@cell
def callbacks_that_decide(bench):
    """They look at the numbers of the epoch, which are the same everywhere."""
    with bench.scope():
        model = dense(bench)
        model.compile(keras.optimizers.SGD(0.3), "mse")
    x, y = bench.normal(12, 5), bench.normal(12, 1)
    stopping = keras.callbacks.EarlyStopping("val_loss", min_delta=0.05, patience=3, restore_best_weights=True)
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.5)
    rates = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate.numpy()))
    )
    data = (bench.normal(7, 5), bench.normal(7, 1))
    bench.fit(model, x, y, batch_size=5, epochs=12, validation_data=data, callbacks=[stopping, plateau, watch])
    bench.keep("rates", rates)
    bench.keep("stopped", stopping.stopped_epoch)
    assert len(rates) < 12 and rates[-1] < 0.3


@cell
def learning_rate_scheduler_and_a_stop_at_nan(bench):
    with bench.scope():
        model = dense(bench)
        model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = bench.normal(12, 5), bench.normal(12, 1)
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
        keras.callbacks.TerminateOnNaN(),
    ]
    bench.fit(model, x, y, batch_size=4, callbacks=callbacks)
    y[7] = np.nan
    history = model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False, callbacks=callbacks).history
    bench.keep("epochs", len(history["loss"]))


# ---- randomness ----


@cell(own_randomness=True)
def dropout_of_a_tfdist_model(bench):
    from tfdist.models.dropout import Dropout

    with bench.scope():
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8), Dropout(0.5, "one"), keras.layers.Dense(1)])
        model.compile(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), "mse")
    bench.fit(model, bench.normal(11, 5), bench.normal(11, 1), batch_size=4)


@cell(own_randomness=True)
def stock_dropout_differs_between_replicas(bench):
    """The mean of a mask of two rows, one for each replica, shows whether they are the same."""

    class Mask(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout = keras.layers.Dropout(0.5)
            self.seen, self.noise = (
                self.add_weight(shape=(2, 64), initializer="zeros", trainable=False, aggregation="sum") for _ in range(2)
            )

        def call(self, x, training=None):
            mask = self.dropout(keras.ops.ones_like(x), training=training)
            if training:
                place = keras.ops.one_hot(keras.ops.cast(x[:, 0], "int32"), 2, axis=0)
                self.seen.assign(self.seen + place @ mask)
                self.noise.assign(self.noise + place @ tf.random.normal(tf.shape(x), dtype=x.dtype))
            return x

    with bench.scope():
        model = keras.Sequential([keras.Input((64,)), Mask(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    x = np.repeat([[0.0], [1.0]], 64, 1).astype(bench.dtype)
    model.fit(x, np.zeros((2, 1), bench.dtype), shuffle=False, verbose=0)
    seen, noise = [w for w in model.weights if w.shape == (2, 64)]
    first, second = np.asarray(noise.numpy())
    assert not np.allclose(first, second), (first, second)
    first, second = np.asarray(seen.numpy())
    assert (first != second).any() and 0.2 < (first > 0).mean() < 0.8, (first, second)


# ---- tables: which slices of a gradient the replicas have in common ----

ADAPTIVE = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
}


class Positions(keras.layers.Layer):
    """Tokens and positions, as every classic Keras Transformer embeds them."""

    def __init__(self, length: int, **options):
        super().__init__()
        self.tokens, self.positions = keras.layers.Embedding(9, 4, **options), keras.layers.Embedding(length, 4)

    def call(self, x):
        return self.tokens(x) + self.positions(keras.ops.arange(0, keras.ops.shape(x)[-1], 1))


class UsedBothWays(keras.layers.Layer):
    """One table for the tokens and for the positions, by position and by token; one more of them without any batch."""

    def build(self, _):
        self.table = self.add_weight(shape=(9, 4), initializer="uniform", name="table")

    def call(self, x):
        length = keras.ops.shape(x)[1]
        positions = keras.ops.tile(keras.ops.arange(length)[None], [keras.ops.shape(x)[0], 1])
        found = keras.ops.take(self.table, x, axis=0) + keras.ops.take(self.table, keras.ops.arange(length), axis=0)
        return found * tf.gather(self.table, positions) + tf.nn.embedding_lookup(self.table.value, [2, 2, 1])[0]


def _tables(bench, layer, rows, *, optimizers=ADAPTIVE, length=5, **options):
    for name in optimizers:
        with bench.scope():
            tokens = keras.Input((length,), dtype="int32")
            hidden = keras.layers.GlobalAveragePooling1D()(layer()(tokens))
            model = keras.Model(tokens, keras.layers.Dense(1)(hidden), name=f"{name}")
            model.compile(ADAPTIVE[name](), "mse", **options)
        bench.fit(model, *rows, batch_size=4)


@cell
def positions_that_each_replica_looks_up(bench):
    """In the last batch one replica has no row."""
    x, y = bench.rng.integers(0, 9, (9, 5)).astype("int32"), bench.normal(9, 1)
    _tables(bench, lambda: Positions(5), (x, y))


@cell
def tokens_that_repeat_and_rows_that_are_equal_by_chance(bench):
    x, y = bench.rng.integers(0, 3, (9, 5)).astype("int32"), bench.normal(9, 1)
    x[1::2] = x[0]
    _tables(bench, lambda: keras.layers.Embedding(9, 4), (x, y))


@cell
def one_table_used_both_ways(bench):
    x, y = bench.rng.integers(0, 9, (11, 5)).astype("int32"), bench.normal(11, 1)
    _tables(bench, UsedBothWays, (x, y))
    with bench.scope():
        tokens = keras.Input((None,), dtype="int32")  # of a length that each batch has for its own
        hidden = keras.layers.GlobalAveragePooling1D()(UsedBothWays()(tokens))
        model = keras.Model(tokens, keras.layers.Dense(1)(hidden), name="ragged")
        model.compile("adam", "mse")
    lengths = [5, 3, 2, 7, 4, 1, 6]
    rows = tf.data.Dataset.from_generator(
        lambda: ((x[i % 11, :n] if n < 6 else np.resize(x, n), y[i]) for i, n in enumerate(lengths)),
        output_signature=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([1], bench.dtype)),
    )
    bench.fit(model, rows.padded_batch(3))
    with bench.scope():  # of batches of one size, where ids that repeat for each row are constants
        tokens = keras.Input((5,), dtype="int32")
        hidden = keras.layers.GlobalAveragePooling1D()(UsedBothWays()(tokens))
        model = keras.Model(tokens, keras.layers.Dense(1)(hidden), name="known")
        model.compile("adam", "mse")
    bench.fit(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(4, drop_remainder=True))


@cell
def tables_compiled_by_xla_or_run_eagerly(bench):
    x, y = bench.rng.integers(0, 9, (11, 5)).astype("int32"), bench.normal(11, 1)
    _tables(bench, lambda: Positions(5), (x, y), optimizers=["adam"], jit_compile=True)
    _tables(bench, lambda: Positions(5), (x, y), optimizers=["rmsprop"], run_eagerly=True)
    _tables(bench, UsedBothWays, (x, y), optimizers=["adagrad"], jit_compile=True)


@cell
def tables_looked_up_in_a_function_and_by_sparse_ids(bench):
    """A call that a user has made a tf.function; ids that are made unique before the look-up."""

    class Function(UsedBothWays):
        @tf.function
        def call(self, x):
            return keras.ops.take(self.table, x, axis=0) + keras.ops.take(self.table, keras.ops.arange(x.shape[1]), axis=0)

    class Sparse(keras.layers.Layer):
        def build(self, _):
            self.table = self.add_weight(shape=(9, 4), initializer="uniform", name="table")

        def call(self, x):
            ids = tf.sparse.from_dense(x)
            return tf.nn.embedding_lookup_sparse(self.table.value, ids, None, combiner="sum")[:, None]

    x, y = bench.rng.integers(1, 9, (11, 5)).astype("int32"), bench.normal(11, 1)
    _tables(bench, Function, (x, y), optimizers=["adam"])
    _tables(bench, Sparse, (x, y), optimizers=["adagrad"])


# ---- programs in the form that users write: keras.io's examples and TensorFlow's tutorials, at toy size ----


@cell
def text_classification_with_transformer(bench):
    """The classic block: attention, add and norm, twice."""

    class TransformerBlock(keras.layers.Layer):
        def __init__(self, embed_dim, num_heads, ff_dim, rate=0.0):
            super().__init__()
            self.att = keras.layers.MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim)
            self.ffn = keras.Sequential([keras.layers.Dense(ff_dim, activation="relu"), keras.layers.Dense(embed_dim)])
            self.layernorm1 = keras.layers.LayerNormalization(epsilon=1e-6)
            self.layernorm2 = keras.layers.LayerNormalization(epsilon=1e-6)
            self.dropout1, self.dropout2 = keras.layers.Dropout(rate), keras.layers.Dropout(rate)

        def call(self, inputs):
            attended = self.dropout1(self.att(inputs, inputs))
            out1 = self.layernorm1(inputs + attended)
            return self.layernorm2(out1 + self.dropout2(self.ffn(out1)))

    with bench.scope():
        inputs = keras.layers.Input(shape=(6,))
        x = TransformerBlock(4, 2, 8)(Positions(6)(keras.ops.cast(inputs, "int32")))
        x = keras.layers.Dropout(0.0)(keras.layers.GlobalAveragePooling1D()(x))
        model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = bench.rng.integers(0, 9, (23, 6)), bench.rng.integers(0, 2, 23)
    bench.fit(model, x, y, batch_size=8, validation_data=(x[:5], y[:5]))


class VAE(keras.Model):
    """Without `call`; each log is a result, under a name that is not the metric's."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.kl_loss_tracker]

    def train_step(self, data):
        ops = keras.ops
        with tf.GradientTape() as tape:
            z_mean, z_log_var = self.encoder(data)
            z = z_mean + ops.exp(0.5 * z_log_var) * ops.sin(3 * z_mean)  # in place of random numbers
            reconstruction = self.decoder(z)
            reconstruction_loss = ops.mean(ops.sum(keras.losses.binary_crossentropy(data, reconstruction), axis=1))
            kl_loss = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
            kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
            total_loss = reconstruction_loss + kl_loss
        grads = tape.gradient(total_loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
        self.total_loss_tracker.update_state(total_loss)
        self.reconstruction_loss_tracker.update_state(reconstruction_loss)
        self.kl_loss_tracker.update_state(kl_loss)
        return {
            "loss": self.total_loss_tracker.result(),
            "reconstruction_loss": self.reconstruction_loss_tracker.result(),
            "kl": self.kl_loss_tracker.result(),
        }


@cell
def variational_autoencoder(bench):
    with bench.scope():
        inputs = keras.Input(shape=(4, 4))
        hidden = keras.layers.Dense(6, activation="relu")(keras.layers.Flatten()(inputs))
        encoder = keras.Model(inputs, [keras.layers.Dense(2)(hidden), keras.layers.Dense(2)(hidden)])
        # not built before a step runs
        decoder = keras.Sequential([keras.layers.Dense(16, activation="sigmoid"), keras.layers.Reshape((4, 4))])
        vae = VAE(encoder, decoder)
        vae.compile(optimizer=keras.optimizers.Adam())
    bench.fit(vae, bench.uniform(13, 4, 4), batch_size=4)


@cell
def logs_computed_from_results(bench):
    """A perplexity, a result under two names, metrics that `metrics` leaves out, one of them built when first used."""

    class Model(keras.Model):
        def __init__(self, net):
            super().__init__()
            self.net, self.tracker, self.other = net, keras.metrics.Mean(name="a"), keras.metrics.Mean(name="b")
            self.score = keras.metrics.R2Score(name="r2")

        @property
        def metrics(self):
            return [self.tracker]

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(keras.ops.square(self.net(x) - y))
            self.optimizer.apply(tape.gradient(loss, self.net.trainable_variables), self.net.trainable_variables)
            self.tracker.update_state(loss)
            self.other.update_state(keras.ops.abs(y))
            self.score.update_state(y, self.net(x))
            result = self.tracker.result()
            logs = {"loss": result, "same": result, "perplexity": keras.ops.exp(result), "other": self.other.result()}
            return logs | {"score": self.score.result(), "twice": 2 * self.tracker.result()}

        def test_step(self, data):
            self.tracker.update_state(keras.ops.mean(self.net(data[0])))
            return {"raised": keras.ops.exp(self.tracker.result()), "plain": self.tracker.result()}

    for eager in (False, True):
        with bench.scope():
            model = Model(dense(bench))
            model.compile(optimizer=keras.optimizers.SGD(0.1), run_eagerly=eager)
        x, y = bench.normal(13, 5), bench.normal(13, 1)
        bench.keep(f"history_{eager}", model.fit(x, y, batch_size=5, verbose=0, epochs=2, validation_data=(x, y)).history)


class GAN(keras.Model):
    def __init__(self, discriminator, generator, latent_dim):
        super().__init__()
        self.discriminator, self.generator, self.latent_dim = discriminator, generator, latent_dim

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn
        self.d_loss_metric, self.g_loss_metric = keras.metrics.Mean(name="d_loss"), keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss_metric, self.g_loss_metric]

    def train_step(self, real_images):
        ops = keras.ops
        batch_size = ops.shape(real_images)[0]
        random_latent_vectors = ops.sin(1000 * real_images[:, 0, : self.latent_dim])  # in place of random numbers
        generated_images = self.generator(random_latent_vectors)
        combined_images = ops.concatenate([generated_images, real_images], axis=0)
        labels = ops.concatenate([ops.ones((batch_size, 1)), ops.zeros((batch_size, 1))], axis=0)
        with tf.GradientTape() as tape:
            predictions = self.discriminator(combined_images)
            d_loss = self.loss_fn(labels, predictions)
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(zip(grads, self.discriminator.trainable_weights, strict=True))
        misleading_labels = ops.zeros((batch_size, 1))
        with tf.GradientTape() as tape:
            predictions = self.discriminator(self.generator(random_latent_vectors))
            g_loss = self.loss_fn(misleading_labels, predictions)
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_weights, strict=True))
        self.d_loss_metric.update_state(d_loss)
        self.g_loss_metric.update_state(g_loss)
        return {"d_loss": self.d_loss_metric.result(), "g_loss": self.g_loss_metric.result()}


@cell
def generative_adversarial_network(bench):
    with bench.scope():
        discriminator = keras.Sequential([
            keras.Input((4, 4)), keras.layers.Flatten(), keras.layers.Dense(5), keras.layers.LeakyReLU(negative_slope=0.2),
            keras.layers.Dense(1),
        ])  # fmt: skip
        generator = keras.Sequential([keras.Input((3,)), keras.layers.Dense(16), keras.layers.Reshape((4, 4))])
        gan = GAN(discriminator, generator, latent_dim=3)
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        gan.compile(keras.optimizers.Adam(0.003), keras.optimizers.RMSprop(0.003), loss)
    images = tf.data.Dataset.from_tensor_slices(bench.uniform(13, 4, 4)).batch(4)
    bench.keep("history", gan.fit(images, epochs=2, verbose=0).history)
    bench.keep_variables(generator, "var/generator")
    bench.keep_variables(discriminator, "var/discriminator")


@cell
def masked_language_model(bench):
    """End-to-end BERT as on keras.io: a sparse loss with weights for the masked places, in a train_step of its own."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(reduction=None)
    with bench.scope():
        loss_tracker = keras.metrics.Mean(name="loss")

    class MaskedLanguageModel(keras.Model):
        def train_step(self, inputs):
            features, labels, sample_weight = inputs
            with tf.GradientTape() as tape:
                predictions = self(features, training=True)
                loss = loss_fn(labels, predictions, sample_weight=sample_weight)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            loss_tracker.update_state(loss, sample_weight=sample_weight)
            return {"loss": loss_tracker.result()}

        @property
        def metrics(self):
            return [loss_tracker]

    with bench.scope():
        inputs = keras.layers.Input((6,), dtype="int64")
        table = keras.layers.Embedding(9, 4, name="word_embedding")
        positions = keras.layers.Embedding(6, 4, weights=[np.sin(np.arange(24.0)).reshape(6, 4)], name="position")
        hidden = table(inputs) + positions(keras.ops.arange(6))
        attended = keras.layers.MultiHeadAttention(2, 2)(hidden, hidden)
        hidden = keras.layers.LayerNormalization(epsilon=1e-6)(hidden + attended)
        outputs = keras.layers.Dense(9, activation="softmax")(hidden)
        model = MaskedLanguageModel(inputs, outputs, name="masked_bert_model")
        model.compile(optimizer=keras.optimizers.Adam(learning_rate=0.001))
    x = bench.rng.integers(1, 9, (13, 6))
    masked = (bench.uniform(13, 6) < 0.3).astype("int64")
    data = tf.data.Dataset.from_tensor_slices((np.where(masked, 8, x), x, masked)).batch(4)
    bench.fit(model, data)


@cell
def sequence_to_sequence(bench):
    """An LSTM that reads, one that writes, from one-hot characters."""
    with bench.scope():
        encoder_inputs, decoder_inputs = keras.Input(shape=(None, 5)), keras.Input(shape=(None, 6))
        _, state_h, state_c = keras.layers.LSTM(4, return_state=True)(encoder_inputs)
        decoder = keras.layers.LSTM(4, return_sequences=True, return_state=True)
        decoder_outputs, _, _ = decoder(decoder_inputs, initial_state=[state_h, state_c])
        outputs = keras.layers.Dense(6, activation="softmax")(decoder_outputs)
        model = keras.Model([encoder_inputs, decoder_inputs], outputs)
        model.compile(optimizer="rmsprop", loss="categorical_crossentropy", metrics=["accuracy"])
    x, y = np.eye(5)[bench.rng.integers(0, 5, (13, 4))], np.eye(6)[bench.rng.integers(0, 6, (13, 5))]
    x, y = x.astype(bench.dtype), y.astype(bench.dtype)
    bench.fit(model, [x, y[:, :-1]], y[:, 1:], batch_size=4, validation_split=0.2)


@cell
def fine_tuning_with_frozen_layers_and_batch_normalization(bench):
    """Transfer learning: first the new head, then all with a small rate; the batch normalisation stays as it was."""
    with bench.scope():
        base = keras.Sequential([
            keras.Input((6, 6, 1)), keras.layers.Conv2D(3, 3), keras.layers.BatchNormalization(), keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
        ])  # fmt: skip
        base.trainable = False
        inputs = keras.Input(shape=(6, 6, 1))
        x = keras.layers.Rescaling(scale=1 / 127.5, offset=-1)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(base(x, training=False)))
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(), loss, metrics=[keras.metrics.BinaryAccuracy()])
    x, y = 255 * bench.uniform(13, 6, 6, 1), bench.rng.integers(0, 2, (13, 1))
    bench.fit(model, x, y, batch_size=4, epochs=1)
    base.trainable = True
    with bench.scope():
        model.compile(optimizer="adam", loss=loss, metrics=[keras.metrics.BinaryAccuracy()])
    model.optimizer.learning_rate = 1e-5
    bench.keep("second", model.fit(x, y, batch_size=4, epochs=2, verbose=0).history)
    bench.keep_variables(model, "var/second")


@cell
def one_of_several_outputs_with_class_weight(bench):
    with bench.scope():
        title, body = keras.Input((None,), name="title"), keras.Input((None,), name="body")
        vectors = [keras.layers.LSTM(3)(keras.layers.Embedding(9, 4)(one)) for one in (title, body)]
        x = keras.layers.concatenate(vectors)
        priority = keras.layers.Dense(1, name="priority")(x)
        model = keras.Model([title, body], {"priority": priority, "department": keras.layers.Dense(3, name="department")(x)})
        losses = {
            "priority": keras.losses.BinaryCrossentropy(from_logits=True),
            "department": keras.losses.CategoricalCrossentropy(from_logits=True),
        }
        model.compile(keras.optimizers.RMSprop(1e-3), losses, loss_weights={"priority": 1.0, "department": 0.2})
        kind = keras.Model([title, body], keras.layers.Dense(3, activation="softmax")(x))
        kind.compile("adam", "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
    x = {"title": bench.rng.integers(0, 9, (13, 4)), "body": bench.rng.integers(0, 9, (13, 5))}
    department = bench.rng.integers(0, 3, 13)
    bench.fit(model, x, {"priority": bench.rng.integers(0, 2, (13, 1)), "department": np.eye(3)[department]}, batch_size=4)
    bench.fit(kind, x, department, batch_size=4, class_weight={0: 1.0, 1: 4.0, 2: 0.5})


@cell
def callbacks_that_read_and_set_the_optimizer(bench):
    """By `float`, `int`, NumPy and Keras, in the middle of an epoch."""
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            optimizer = self.model.optimizer
            rate = float(optimizer.learning_rate)
            seen.append([rate, int(optimizer.iterations), *np.array(self.model.weights[1].value)])
            optimizer.learning_rate = rate * 0.9
            keras.ops.convert_to_numpy(optimizer.learning_rate)

        def on_epoch_end(self, epoch, logs=None):
            seen.append([float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)), *np.asarray(net.weights[1])])
            self.model.layers[0].bias.assign(np.ones(7))

    with bench.scope():
        net = dense(bench)
        net.compile(keras.optimizers.Adam(0.1), "mse")
    bench.fit(net, bench.normal(13, 5), bench.normal(13, 1), batch_size=4, callbacks=[Watch()])
    for i, row in enumerate(seen):
        bench.keep(f"seen/{i}", row)


@cell
def gradients_changed_by_hand(bench):
    """Clipped, added up by hand, with a penalty that is a gradient itself, of each row by itself; and logged."""

    class Model(keras.Model):
        def __init__(self, kind):
            super().__init__(name=kind)
            self.kind, self.table, self.out = kind, keras.layers.Embedding(9, 4), keras.layers.Dense(1)

        def call(self, x):
            return self.out(keras.ops.tanh(keras.ops.mean(self.table(x), 1)))

        def loss_of(self, x, y):
            return keras.ops.mean(keras.ops.square(self(x) - y))

        def clipped(self, x, y):
            with tf.GradientTape() as tape:
                loss = self.loss_of(x, y)
            gradients, norm = tf.clip_by_global_norm(tape.gradient(loss, self.trainable_variables), 0.1)
            return loss, norm, gradients

        def added(self, x, y):
            with tf.GradientTape(persistent=True) as tape:
                loss = self.loss_of(x, y)
                other = keras.ops.mean(keras.ops.abs(self(x)))
            kernel = self.out.kernel
            gradients = [
                tape.gradient(loss, kernel) + 0.5 * tape.gradient(other, {"kernel": kernel})["kernel"] + 0.1 * kernel
            ]
            return loss, other, [None, *gradients, None]

        def penalised(self, x, y):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    loss = self.loss_of(x, y)
                (slope,) = inner.gradient(loss, [self.out.kernel])
                penalty = keras.ops.sum(keras.ops.square(slope)) ** 2
                loss = loss + penalty
            return loss, penalty, outer.gradient(loss, self.trainable_variables)

        def of_each_row(self, x, y):
            with tf.GradientTape() as tape:
                losses = keras.ops.square(self(x) - y)[:, 0]
            rows = tape.jacobian(losses, self.out.kernel, experimental_use_pfor=False)
            norms = keras.ops.sqrt(keras.ops.sum(keras.ops.square(rows), axis=(1, 2), keepdims=True))
            mean = keras.ops.mean(rows / keras.ops.maximum(1.0, 4 * norms), axis=0)
            return keras.ops.mean(losses), keras.ops.mean(norms), [None, mean, None]

        def train_step(self, data):
            loss, number, gradients = getattr(self, self.kind)(*data)
            self.optimizer.apply(list(gradients), self.trainable_variables)
            return {"loss": loss, "number": number}

    x, y = bench.rng.integers(0, 9, (13, 3)).astype("int32"), bench.normal(13, 1)
    for kind, eager in (
        ("clipped", False),
        ("clipped", True),
        ("added", False),
        ("penalised", False),
        ("of_each_row", False),
    ):
        with bench.scope():
            model = Model(kind)
            model.compile(keras.optimizers.Adam(0.01), run_eagerly=eager)
        bench.fit(model, x, y, batch_size=4)


def _rmse(y, p):
    return keras.ops.sqrt(keras.ops.mean(keras.ops.square(y - p)))


def _in_batch_negatives(y, p):
    """Each row's own is to be the nearest: rows are compared."""
    scores = keras.ops.matmul(p, keras.ops.transpose(y))
    return keras.losses.sparse_categorical_crossentropy(keras.ops.arange(keras.ops.shape(y)[0]), scores, from_logits=True)


def _ratio(y, p):
    counts = keras.ops.cast(y > 0, p.dtype)
    return keras.ops.sum(keras.ops.abs(y - p) * counts) / (keras.ops.sum(counts) + 1)


class Largest(keras.metrics.Metric):
    """A state that does not add up, beside a number of batches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.most, self.batches = (self.add_weight(name=name, initializer="zeros") for name in ("most", "batches"))

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.most.assign(keras.ops.maximum(self.most, keras.ops.max(keras.ops.abs(y_true - y_pred))))
        self.batches.assign_add(1.0)

    def result(self):
        return self.most + 100 * self.batches


@cell
def losses_and_metrics_that_are_no_sum_over_rows(bench):
    """Of all rows: a root of a mean, Keras' Dice, rows that are compared, a quotient of sums, a maximum."""
    x, y = bench.normal(13, 5), (bench.uniform(13, 3) > 0.5).astype(bench.dtype)
    losses = {
        "rmse": _rmse, "dice": keras.losses.Dice(), "tversky": "tversky", "compared": _in_batch_negatives, "ratio": _ratio,
        "largest": lambda y, p: keras.ops.max(keras.ops.square(y - p)), "rows": lambda y, p: keras.ops.sum((y - p) ** 4, -1),
        "sum": lambda y, p: keras.ops.sum(keras.ops.square(y - p)), "mean": lambda y, p: keras.ops.mean((y - p) ** 2),
    }  # fmt: skip
    for name, loss in losses.items():
        with bench.scope():
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, activation="sigmoid")], name=name)
            model.compile(keras.optimizers.SGD(0.1), loss, metrics=[_rmse, Largest(name="largest"), _ratio])
        bench.fit(model, x, y, batch_size=4, validation_split=0.2)


@cell
def losses_of_a_train_step_in_many_forms(bench):
    """Sums over rows, in whatever words; lists and vectors of losses; TensorFlow's averages; gradients to the input."""

    def squares(model, x, y):
        return keras.ops.square(model(x) - y)[:, 0]

    def adversarial(model, x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = keras.ops.mean(squares(model, x, y))
        return keras.ops.mean(squares(model, x + 0.1 * keras.ops.sign(tape.gradient(loss, x)), y))

    losses = {
        "sum": lambda *args: tf.reduce_sum(squares(*args)),
        "squeezed": lambda *args: tf.squeeze(tf.reduce_sum(squares(*args), axis=0, keepdims=True)),
        "l2": lambda model, x, y: tf.nn.l2_loss(model(x) - y),
        "einsum": lambda model, x, y: tf.einsum("ij,ij->", model(x) - y, model(x) - y),
        "average": lambda *args: tf.nn.compute_average_loss(squares(*args)),
        "average_of_four": lambda *args: tf.nn.compute_average_loss(squares(*args), global_batch_size=4),
        "rows_and_a_mean": lambda *args: [squares(*args), tf.reduce_mean(squares(*args))],
        "one_for_each_task": lambda model, x, y: tf.reduce_mean(keras.ops.square(tf.concat([model(x) - y] * 2, 1)), axis=0),
        "adversarial": adversarial,
    }  # fmt: skip

    class Model(keras.Model):
        def __init__(self, loss_of, name):
            super().__init__(name=name)
            self.hidden, self.out, self.loss_of = keras.layers.Dense(4, "tanh"), keras.layers.Dense(1), loss_of

        def call(self, x):
            return self.out(self.hidden(x))

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = self.loss_of(self, *data)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"rows": keras.ops.shape(data[0])[0], "total": keras.ops.sum(data[1])}

    x, y = bench.normal(11, 5), bench.normal(11, 1)
    for name, loss in losses.items():
        for eager in (False, True) if name in ("sum", "average_of_four") else (False,):
            with bench.scope():
                model = Model(loss, f"{name}_{eager}")
                model.compile(keras.optimizers.SGD(0.05), run_eagerly=eager)
            bench.fit(model, x, y, batch_size=4)


def make_strategy(name: str):
    import tfdist

    kind, _, shape = name.partition(":")
    if kind == "one_device":
        return tfdist.OneDevice()
    if kind == "parameter_server":
        return tfdist.ParameterServer(min_shard_bytes=64, max_staleness=0)
    if kind == "mirrored":
        return tfdist.Mirrored(int(shape))
    return tfdist.MultiWorkerMirrored(num_devices=int(shape.partition("x")[2]))


def main(name: str, dtype: str, folder: str, *cell_names: str) -> None:
    tf.get_logger().setLevel("ERROR")
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})  # half of the time of such short runs
    strategy = None if name == "stock" else make_strategy(name)
    keras.config.set_floatx(dtype)
    for cell_name in cell_names or CELLS:
        keras.backend.clear_session()
        bench = Bench(strategy, dtype)
        started_s = time.perf_counter()
        CELLS[cell_name](bench)
        print(f"{cell_name}: {time.perf_counter() - started_s:.1f} s")
        out = f"{folder}/{cell_name}.{strategy.worker if strategy else 0}"
        with open(f"{out}.new", "wb") as file:
            np.savez(file, **bench.results)
        os.rename(f"{out}.new", f"{out}.npz")


if __name__ == "__main__":
    main(*sys.argv[1:])
