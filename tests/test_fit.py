"""Keras `fit` under a tfdist scope has the numbers of stock Keras on one device: history, predictions, every variable."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pairs
import pytest
import tensorflow as tf
from conftest import computed_together
from fit_cells import CELLS, ONE_PROCESS, OWN_RANDOMNESS
from processes import run, run_forked
from results import results
from test_support import SHOWN

import tfdist
from tfdist.errors import UserError

PROGRAM = "fit_cells.py"
ALL = tuple(CELLS)
STOCK = tuple(cell for cell in CELLS if cell not in OWN_RANDOMNESS)
# a cross-section for the ordinary test run; all cells on all columns are slow
QUICK = (
    "numpy_with_sample_weights_validation_and_uneven_batches",
    "convolution_with_batch_norm_class_weight_and_validation_split",
    "dicts_several_outputs_and_their_weights",
    "masked_tokens_of_ragged_lengths",
    "recommender_with_a_sparse_embedding",
    "a_train_step_of_its_own",
    "accumulation_averages_decay_and_schedule",
    "loss_scale_with_an_overflow_on_one_replica",
)
TWO_WORKERS = (QUICK[0], QUICK[3], QUICK[6])
# no accumulation, no loss scale, and of tables that are looked up the sum of a row's gradients (stock Keras squares each)
ON_SERVERS = (
    QUICK[0], "single_batches", QUICK[1], QUICK[2], "infinite_dataset_with_steps", "one_model_inside_of_the_fit_of_another",
    "a_subclass_that_computes_its_own_loss_and_metrics", "compiled_by_xla", "rows_of_tables_with_sgd",
    "variational_autoencoder", "sequence_to_sequence",
)  # fmt: skip
ALL_CHECKS_INSIDE = ("stock_dropout_differs_between_replicas",)
TOLERANCES = {"float64": 1e-9, "float32": 2e-5}
ROUNDED = (
    "keras_hub_gpt2_and_llama",  # its normalisation and rotary positions are float32, whatever the policy
    "keras_applications_convnet",  # untrained, its last activations are 1e-11: 1e-16 in the input are 1e-9 in the end
)
BELOW_FLOAT32 = (
    "keras_applications_convnet",  # its numbers of 1e-11
    "fine_tuning_with_frozen_layers_and_batch_normalization",  # its second part moves weights by 1e-7
)


def cells_of(strategy: str, dtype: str = "float64") -> tuple[str, ...]:
    """The cells of a strategy; four replicas, which take long to trace, have the cross-section."""
    if strategy == "mirrored:4":
        return QUICK
    if strategy.startswith("parameter_server"):
        return tuple(cell for cell in ON_SERVERS if cell in CELLS)
    left_out = set(ONE_PROCESS) if strategy.startswith("multi_worker") else set()
    left_out |= set(BELOW_FLOAT32) if dtype == "float32" else set()
    return tuple(cell for cell in ALL if cell not in left_out)


FEATURES = {}  # the cells that show each, of those that cells show
for feature, names in SHOWN.items():
    if shown := tuple(name.partition(":")[2] for name in names if name.startswith("fit_cells:")):
        FEATURES[feature] = shown
COLUMNS = {(s, "float64"): cells_of(s) for s in ("mirrored:2", "multi_worker:2x1", "parameter_server:1x2")} | {
    ("one_device", "float64"): tuple(pairs.cover(ALL, FEATURES)),
    ("mirrored:2", "float32"): tuple(pairs.cover(cells_of("mirrored:2", "float32"), FEATURES)),
}
MATRIX = COLUMNS | {(s, "float64"): cells_of(s) for s in ("one_device", "mirrored:4")} | {
    ("mirrored:2", "float32"): cells_of("mirrored:2", "float32")
}  # fmt: skip
ACROSS = {("mirrored:2", "float64"): QUICK, ("multi_worker:2x1", "float64"): TWO_WORKERS}


def pytest_generate_tests(metafunc):
    if metafunc.function in (test_a_cross_section, test_every_cell):
        whole = MATRIX if metafunc.config.getoption("--matrix") else COLUMNS
        computed_together(metafunc, ACROSS if metafunc.function is test_a_cross_section else whole)


def assert_equal_to_stock_keras(cell: str, strategy: str, dtype: str, together: tuple[str, ...]) -> None:
    """Everything that a cell keeps; of a variable the copy of each replica of each worker. `together`: cells that are
    computed with it, if nobody has yet."""
    of_tfdist = {name for name in together if name in OWN_RANDOMNESS}
    oracle = [name for name in together if (name in of_tfdist) == (cell in of_tfdist)]
    expected = results(PROGRAM, "one_device" if cell in of_tfdist else "stock", dtype, oracle)
    found = results(PROGRAM, strategy, dtype, together)
    keys = [key for key in expected if key.startswith(f"{cell}|")]
    assert cell in ALL_CHECKS_INSIDE or len(keys) > 3
    assert keys == [key for key in found if key.startswith(f"{cell}|")]
    tolerance = TOLERANCES["float32" if cell in ROUNDED else dtype]
    for key in keys:
        one, copies = expected[key], found[key]
        one = one[:1] if "|var/" in key else one
        scale = max(np.abs(one[np.isfinite(one)]).max(initial=0), 1e-3)
        apart = np.where((copies == one) | (np.isnan(copies) & np.isnan(one)), 0, np.abs(copies - one))
        assert apart.max(initial=0) <= tolerance * scale, (key, one, copies)


def test_a_cross_section(strategy, dtype, cell, together):
    assert_equal_to_stock_keras(cell, strategy, dtype, together)


@pytest.mark.slow
@pytest.mark.timeout(900)  # whose turn it is computes the cells of a process, and perhaps waits for who computes the oracle
def test_every_cell(strategy, dtype, cell, together):
    assert_equal_to_stock_keras(cell, strategy, dtype, together)


def test_every_cell_is_on_two_replicas_and_two_workers_and_every_feature_in_float32():
    assert set(CELLS) == set(COLUMNS["mirrored:2", "float64"])
    assert set(CELLS) - set(ONE_PROCESS) == set(COLUMNS["multi_worker:2x1", "float64"])
    for column in (("mirrored:2", "float32"), ("one_device", "float64")):
        for feature, cells in FEATURES.items():
            assert set(cells) & set(COLUMNS[column]), (column, feature)


@pytest.mark.slow
def test_the_cells_do_train():
    arrays = results(PROGRAM, "stock", "float64", STOCK)
    for cell in STOCK:
        series = {}  # each number that a cell keeps at several times
        for key in arrays:
            name, _, place = key.rpartition("/")
            if key.startswith(f"{cell}|") and place.isdigit() and arrays[key].size == 1:
                series.setdefault(name, []).append(arrays[key].item())
        moving = [found for found in series.values() if len(found) > 1 and np.isfinite(found).all() and len(set(found)) > 1]
        assert moving or cell in ALL_CHECKS_INSIDE, (cell, series)


@pytest.mark.slow
def test_what_a_cluster_promises(tmp_path):
    """Files, decisions, restored backups, refusals, workers that read different batches."""
    program = [str(Path(__file__).parent / "fit_cluster.py"), str(tmp_path)]
    launch = ["launch", "--workers=2", "--all-output", f"--log_dir={tmp_path / 'logs'}"]
    done = run(["-m", "tfdist.cli", *launch, "--", "python", *program])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("all is well") == 2
    assert "[worker 0] Epoch 1/2" in done.stdout and "[worker 1] Epoch" not in done.stdout
    assert done.stderr.count("BackupAndRestore: a process that is killed") == 2, "said once a fit, by the chief"


def test_other_versions_are_refused(monkeypatch):
    with tfdist.OneDevice().scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    for module, version in ((keras, "3.16.0"), (keras, "3.9.2"), (tf, "2.22.0")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", version)
            with pytest.raises(UserError, match=f"fit: expected .* found {version}; install one of these"):
                model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)


def test_legacy_keras_is_refused():
    done = run(["-c", "import tfdist; tfdist.OneDevice()"], {"TF_USE_LEGACY_KERAS": "1"})
    assert done.returncode == 2 and "expected Keras 3, found TF_USE_LEGACY_KERAS=1" in done.stderr.splitlines()[-1]


def test_nothing_stays_replaced():
    """After a call, and after one that failed, Keras is as it was; models made outside of a scope never notice."""

    def names():
        base = keras.optimizers.Optimizer.__mro__
        owners = [keras.losses.Loss, keras.metrics.Mean, keras.Variable, keras.layers.BatchNormalization]
        owners += [*base, *keras.Model.__mro__, keras.optimizers.LossScaleOptimizer]
        module = sys.modules[keras.losses.Loss.__module__]
        return {
            (owner, name): value for owner in [*owners, module] for name, value in vars(owner).items() if callable(value)
        }

    def same(before):
        after = names()
        return [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]

    keras.layers.BatchNormalization()
    before = names()
    with tfdist.OneDevice().scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    assert not same(before)
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    with pytest.raises(Exception, match="incompatible|expected"):
        model.fit(np.ones((2, 3)), np.ones((2, 1)), verbose=0)
    assert not same(before)
    x, y = np.ones((2, 2)), np.ones((2, 1))
    inside = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: model.evaluate(x, y, verbose=0))
    with tfdist.OneDevice().scope():
        others = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
        for other in others:
            other.compile("sgd", "mse")
    with ThreadPoolExecutor(2) as pool:  # two at once, of different lengths, one of them with a third inside
        calls = [
            pool.submit(other.fit, x, y, epochs=epochs, verbose=0, callbacks=callbacks)
            for other, epochs, callbacks in zip(others, (2, 9), ([inside], None), strict=True)
        ]
        assert [len(call.result().epoch) for call in calls] == [2, 9]
    assert not same(before)
    assert "fit" in vars(model) and "make_train_function" not in vars(model)
    stock = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert "fit" not in vars(stock)


def test_what_users_do_around_fit_means_what_it_means_on_one_device():
    done = run_forked([str(Path(__file__).parent / "fit_by_hand.py")])
    assert done.returncode == 0 and done.stdout.endswith("all is well\n"), done.stderr[-4000:]


@pytest.mark.slow
def test_the_example_trains_alike_on_two_workers(tmp_path):
    """The tutorial's program; `BackupAndRestore`, checkpoints of weights, saving by all workers."""
    example = str(Path(__file__).parent.parent / "examples" / "multi_worker_with_keras.py")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch = ["-m", "tfdist.cli", "launch", "--workers=2", "--all-output", f"--log_dir={tmp_path / 'logs'}", "--", "python"]
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run, ([example, str(tmp_path / "one")], [*launch, example, str(tmp_path / "two")]))
    assert one.returncode == two.returncode == 0, one.stderr[-3000:] + two.stderr[-3000:]

    def losses(output):
        lines = [line.rpartition("epoch: ")[2] for line in output.splitlines() if "loss of each epoch" in line]
        return [[float.fromhex(loss) for loss in line.split()] for line in lines]

    (expected,), found = losses(one.stdout), losses(two.stdout)
    assert len(found) == 2 and found[0] == found[1]
    np.testing.assert_allclose(found[0], expected, rtol=2e-5)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "epoch-1.weights.h5", "epoch-2.weights.h5", "epoch-3.weights.h5", "model.keras",
    ]  # fmt: skip


def test_what_was_made_outside_of_the_scope():
    x, y = np.ones((4, 2)), np.ones((4, 1))

    def made():
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    strategy, outside = tfdist.OneDevice(), made()
    outside.compile("adam", "mse")
    with strategy.scope():
        model = made()
        with pytest.raises(UserError, match="fit: expected a model made under the strategy's scope, found one"):
            outside.fit(x, y, verbose=0)
    outside.fit(x, y, verbose=0)
    model.compile("adam", "mse", metrics=["mae"])  # outside: fine
    model.fit(x, y, verbose=0)
    with strategy.scope():
        model.fit(x, y, verbose=0)
        built = made()
    optimizer = keras.optimizers.Adam()
    optimizer.build(built.trainable_variables)
    built.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="made under the strategy.s scope"):
        built.fit(x, y, verbose=0)
