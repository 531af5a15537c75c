"""Stock Keras and TensorFlow under `tf.distribute`, one defect after another. Runs in a process of its own:

    python tests/stock.py mirrored | multi_worker | parameter_server | one_device

prints a JSON object: defect -> what happened, beginning with "defect" while it is still there.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

FOUND: dict[str, list] = {"mirrored": [], "multi_worker": [], "parameter_server": [], "one_device": []}


def shows(kind):
    def register(fn):
        FOUND[kind].append(fn)
        return fn

    return register


def said(fn, *parts: str) -> str:
    """What a call raises, and whether it is the known defect."""
    try:
        fn()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return ("defect: " if any(part in text for part in parts) else "other: ") + text[:300]
    return "mended: no error"


def compared(found, stock, right) -> str:
    found, stock, right = (np.asarray(value, float) for value in (found, stock, right))
    kind = (
        "defect" if np.allclose(found, stock, atol=2e-3) and not np.allclose(found, right, atol=2e-3) else "mended or other"
    )
    return f"{kind}: {found.tolist()}, right is {right.tolist()}"


def data(x, y, batch):
    return tf.data.Dataset.from_tensor_slices((np.float32(x), np.float32(y))).batch(batch)


def dense(strategy, loss="mse", **options):
    """One weight, 0 at first: predicts w * x."""
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
        optimizer = options.pop("optimizer", lambda: keras.optimizers.SGD(1.0))()
        model.compile(optimizer, loss=loss, **options)
    return model


# ---- two mirrored replicas ----


def gradient_loss(y, predicted):
    """The gradient of each row is its y."""
    return keras.ops.squeeze(predicted, -1) * y


def step_of(strategy, **clip):
    """The step from gradients +20 on one replica and -18 on the other, of which the mean is 1."""
    model = dense(strategy, gradient_loss, optimizer=lambda: keras.optimizers.SGD(1.0, **clip))
    model.fit(data([[1.0], [1.0]], [20.0, -18.0], 2), verbose=0)
    return model.get_weights()[0].ravel()


@shows("mirrored")
def clipnorm(strategy):
    return compared(step_of(strategy, clipnorm=1.0), 0.0, -1.0)


@shows("mirrored")
def global_clipnorm(strategy):
    return compared(step_of(strategy, global_clipnorm=1.0), 0.0, -1.0)


@shows("mirrored")
def clipvalue(strategy):
    return compared(step_of(strategy, clipvalue=1.0), 0.0, -1.0)


def fit_with(strategy, compile_options=None, **optimizer):
    model = dense(strategy, optimizer=lambda: keras.optimizers.SGD(0.1, **optimizer), **(compile_options or {}))
    model.fit(data(np.ones((8, 1)), np.ones(8), 4), epochs=2, verbose=0)


@shows("mirrored")
def gradient_accumulation_steps(strategy):
    return said(lambda: fit_with(strategy, gradient_accumulation_steps=2), "merge_call")


@shows("mirrored")
def ema_overwrite_frequency(strategy):
    return said(lambda: fit_with(strategy, use_ema=True, ema_overwrite_frequency=2), "merge_call")


@shows("mirrored")
def steps_per_execution(strategy):
    return said(lambda: fit_with(strategy, {"steps_per_execution": 2}), "InvalidArgument", "placeholder")


@shows("mirrored")
def jit_compile(strategy):
    return said(lambda: fit_with(strategy, {"jit_compile": True}), "xla/known_issues#tfvariable_on_a_different_device")


@shows("mirrored")
def uneven_last_batch(strategy):
    """3 rows on two replicas: 2 and 1. The mean of the three gradients is right."""
    model = dense(strategy, gradient_loss)
    model.fit(data(np.ones((4 + 3, 1)), [0, 0, 0, 0, 1, 1, 4], 4), verbose=0)
    # stock: sums divided by each share's own size, then halved
    return compared(model.get_weights()[0].ravel(), -((1 + 1) / 2 + 4) / 2, -(1 + 1 + 4) / 3)


@shows("mirrored")
def uneven_first_batch(strategy):
    return said(lambda: dense(strategy).fit(data(np.ones((3, 1)), np.ones(3), 3), verbose=0), "same size and shape")


@shows("mirrored")
def loss_scale_optimizer(strategy):
    model = dense(
        strategy, gradient_loss,
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0),
    )  # fmt: skip
    model.fit(data([[1.0], [1.0]], [1.0, np.inf], 2), verbose=0)
    weight, scale = model.get_weights()[0].item(), float(model.optimizer.dynamic_scale.numpy())
    return (
        f"{'defect' if not np.isfinite(weight) or scale == 4.0 else 'mended'}: weight {weight}, scale {scale}, right is 0, 2"
    )


@shows("mirrored")
def dropout_masks(strategy):
    with strategy.scope():
        layer = keras.layers.Dropout(0.5, seed=1)

    @tf.function
    def masks():
        return strategy.run(lambda: layer(tf.ones([64]), training=True))

    one, other = (mask.numpy() for mask in strategy.experimental_local_results(masks()))
    return "defect: identical" if (one == other).all() else "mended: different"


@shows("mirrored")
def batch_norm_statistics(strategy):
    with strategy.scope():
        layer = keras.layers.BatchNormalization(momentum=0.0)
        model = keras.Sequential([keras.Input((1,)), layer, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(data([[0.0], [0.0], [4.0], [4.0]], np.zeros(4), 4), verbose=0)
    means = [copy.numpy().item() for copy in strategy.experimental_local_results(layer.moving_mean.value)]
    return f"{'defect' if means[0] != means[1] else 'mended'}: {means}, right is [2, 2]"


@shows("mirrored")
def masked_loss(strategy):
    """One place is left of the first row, three of the second: the mean of all four is (4 + 0 + 0 + 0) / 4."""
    with strategy.scope():
        inputs = keras.Input((3, 1))
        hidden = keras.layers.Masking(0.0)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(hidden))
        model.compile("sgd", "mse")
    x = [[[1.0], [0.0], [0.0]], [[1.0], [1.0], [1.0]]]
    y = [[[2.0], [0.0], [0.0]], [[0.0], [0.0], [0.0]]]
    return compared(model.evaluate(data(x, y, 2), verbose=0), 2.0, 1.0)


@shows("mirrored")
def mean_of_a_loss(strategy):
    """`Mean.update_state(loss)` of batches 0, 0 | 0, 0 and 0, 0 | 3, whose means are 0 and 1."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.tracker = keras.metrics.Mean(name="tracked")

        def call(self, x):
            return x

        def test_step(self, x):
            self.tracker.update_state(tf.reduce_mean(x))
            return {"tracked": self.tracker.result()}

    with strategy.scope():
        model = Model()
        model.build((None, 1))
        model.compile()
    rows = tf.data.Dataset.from_tensor_slices(np.float32([[0.0]] * 6 + [[3.0]])).batch(4)
    return compared(model.evaluate(rows, verbose=0, return_dict=True)["tracked"], 0.75, 0.5)


# ---- others ----


@shows("multi_worker")
def fit_on_two_workers(strategy):
    return said(lambda: dense(strategy).fit(data(np.ones((8, 1)), np.ones(8), 4), verbose=0), "PerReplica")


@shows("parameter_server")
def fit_on_parameter_servers(strategy):
    return said(lambda: dense(strategy).fit(data(np.ones((8, 1)), np.ones(8), 4), verbose=0), "ClusterCoordinator")


@shows("parameter_server")
def saving_sharded_variables(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    with tempfile.TemporaryDirectory() as folder:
        return said(lambda: model.save(f"{folder}/model.keras"), "__array__")


@shows("parameter_server")
def sharded_variables(strategy):
    """The gradient of a Keras layer whose variable is a ShardedVariable."""

    def gradient():
        with strategy.scope():
            layer = keras.layers.Dense(4, use_bias=False)
            layer.build((None, 8))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(tf.ones([2, 8])))
        if tape.gradient(loss, layer.kernel.value) is None:
            raise AttributeError("handle: no gradient")

    return said(gradient, "handle")


@shows("one_device")
def assign_add_is_not_atomic(strategy):
    variable = keras.Variable(0.0)
    graph = tf.function(lambda: variable.assign_add(1.0)).get_concrete_function().graph
    kinds = {op.type for op in graph.get_operations()}
    return f"{'mended' if 'AssignAddVariableOp' in kinds else 'defect'}: {sorted(kinds)}"


@shows("one_device")
def model_parallel_shards_nothing(strategy):
    distribution = keras.distribution
    devices = distribution.list_devices()
    mesh = distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    layout = distribution.LayoutMap(mesh)
    layout[".*kernel"] = (None, "model")
    try:
        parallel = distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    except (ImportError, AttributeError, ValueError, NotImplementedError, RuntimeError) as error:  # older versions
        return f"defect: {type(error).__name__}: {error}"[:300]
    with parallel.scope():
        layer = keras.layers.Dense(4)
        layer.build((None, 4))
    whole = type(layer.kernel.value).__name__ == "ResourceVariable" and tuple(layer.kernel.value.shape) == (4, 4)
    return f"{'defect: silently a whole variable' if whole else 'mended'}: {type(layer.kernel.value).__name__}"


@shows("one_device")
def iterations_stand_still(strategy):
    """With accumulation the public count of an optimizer does not tell one batch from the next."""
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    variable = keras.Variable(1.0)
    optimizer.build([variable])
    counts = []
    for _ in range(3):
        optimizer.apply([tf.constant(1.0)])
        counts.append(int(optimizer.iterations))
    return f"{'defect' if counts == [0, 0, 0] else 'mended'}: {counts} after 1, 2, 3 batches"


@shows("one_device")
def backup_and_restore_begins_the_epoch_again(strategy):
    """Interrupted after batch 3 of 4, it trains on the first three again."""
    seen = []

    def fit(folder, stop):
        model = dense(tf.distribute.get_strategy())
        model.build((None, 1))

        def batch_end(batch, logs):
            seen.append(batch)
            if stop and len(seen) == 3:
                raise KeyboardInterrupt

        watch = keras.callbacks.LambdaCallback(on_train_batch_end=batch_end)
        backup = keras.callbacks.BackupAndRestore(folder, save_freq=1)
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(data(np.ones((8, 1)), np.ones(8), 2), verbose=0, callbacks=[backup, watch])

    with tempfile.TemporaryDirectory() as folder:
        fit(folder, stop=True)
        fit(folder, stop=False)
    return f"{'defect' if seen == [0, 1, 2, 0, 1, 2, 3] else 'mended'}: {seen}, right is [0, 1, 2, 3]"


@shows("one_device")
def dropout_state_in_no_checkpoint(strategy):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(1)])
    state = model.layers[0].seed_generator.state
    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(model=model).save(f"{folder}/checkpoint")
        model(tf.ones([1, 4]), training=True)
        moved = state.numpy().tolist()
        tf.train.Checkpoint(model=model).restore(path).assert_consumed()
    return f"{'defect' if state.numpy().tolist() == moved else 'mended'}: {moved} after restore"


def make_strategy(kind):
    if kind == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    if kind == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if kind == "parameter_server":
        return parameter_server()
    return tf.distribute.get_strategy()


def parameter_server():
    """A worker and two servers in this process."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    addresses = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in held]
    for sock in held:
        sock.close()
    cluster = tf.train.ClusterSpec({"worker": addresses[:1], "ps": addresses[1:]})
    for job, index in (("worker", 0), ("ps", 0), ("ps", 1)):
        tf.distribute.Server(cluster, job_name=job, task_index=index, protocol="grpc")
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    return tf.distribute.ParameterServerStrategy(
        resolver, variable_partitioner=tf.distribute.experimental.partitioners.FixedShardsPartitioner(2)
    )


def main(kind: str, out: str) -> None:
    keras.utils.set_random_seed(0)
    strategy = make_strategy(kind)
    found = {fn.__name__: fn(strategy) for fn in FOUND[kind]}
    with open(f"{out}.{os.getpid()}", "w") as file:
        json.dump(found, file)
    sys.stdout.flush()
    os._exit(0)  # servers in this process do not end


if __name__ == "__main__":
    main(*sys.argv[1:])
