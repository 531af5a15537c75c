"""tfdist.fit.Checkpoint: a `fit` that was interrupted anywhere ends like one that never was."""

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import LIMIT_S, finish, run_forked, start

import tfdist
from tfdist import files
from tfdist.checkpoint import store
from tfdist.errors import CheckpointError, UserError, WorkdirInUse
from tfdist.fit import saved

slow = pytest.mark.slow
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(23, 5)).astype("float32"), RNG.normal(size=(23, 1)).astype("float32")


class Interrupted(Exception):
    pass


class InterruptAt(keras.callbacks.Callback):
    def __init__(self, batch: int):
        super().__init__()
        self.left = batch

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise Interrupted


def data(kind):
    if kind == "numpy":
        return (X, Y), {"batch_size": 5}
    dataset = tf.data.Dataset.from_tensor_slices((X, Y))
    if kind == "shuffled":
        return (dataset.shuffle(23, seed=1).batch(5),), {}
    if kind == "swapped":
        return (dataset.batch(5),), {}
    if kind == "later_epochs":
        return (dataset.shuffle(23, seed=1).batch(5),), {"initial_epoch": 1}
    if kind == "unknown_length":
        return (dataset.shuffle(23, seed=1).batch(5).filter(lambda *_: True),), {}
    return (dataset.shuffle(23, seed=1).repeat().batch(5),), {"steps_per_epoch": 4}


def trained(kind, folder=None, interrupt_at=0, every_steps=2, **compiled):
    """(weights and optimizer, history, learning rates) of six epochs with dropout, averages, accumulation and decisions."""
    keras.utils.set_random_seed(3)
    strategy = tfdist.OneDevice()
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(6), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
        )
        optimizer = keras.optimizers.Adam(0.05, use_ema=True, ema_overwrite_frequency=5, gradient_accumulation_steps=2)
        model.compile(optimizer, "mse", metrics=["mae"], **compiled)
    callbacks = [
        keras.callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, factor=0.5),
    ]
    callbacks += [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if kind == "swapped" else []
    callbacks += [tfdist.fit.Checkpoint(folder, every_steps)] if folder else []
    callbacks += [InterruptAt(interrupt_at)] if interrupt_at else []
    arrays, options = data(kind)
    history = model.fit(*arrays, epochs=6, verbose=0, callbacks=callbacks, **options)
    first = options.get("initial_epoch", 0)
    assert history.epoch == list(range(first, first + len(history.history["loss"])))
    return [w.numpy() for w in [*model.weights, *optimizer.variables]], history.history


def assert_same(one, other):
    assert json.dumps(one[1]) == json.dumps(other[1])
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_array_equal(a, b)


SLOW_KINDS = ("shuffled", "unknown_length", "infinite", "swapped", "later_epochs")


@pytest.mark.parametrize("kind", ["numpy", *(pytest.param(kind, marks=slow) for kind in SLOW_KINDS)])
def test_interrupted_anywhere_it_ends_like_one_that_was_not(kind, tmp_path):
    whole = trained(kind)
    for batch in (3, 8):  # each in what the one before has left
        with pytest.raises(Interrupted):
            trained(kind, tmp_path, interrupt_at=batch)
    assert_same(trained(kind, tmp_path), whole)
    steps = store.steps(tmp_path)
    assert len(steps) == 3
    assert_same(trained(kind, tmp_path), whole)  # it had ended: nothing more
    assert store.steps(tmp_path) == steps


@slow
def test_after_each_epoch_and_with_several_steps_per_execution(tmp_path):
    whole = trained("shuffled", steps_per_execution=2)
    with pytest.raises(Interrupted):
        trained("shuffled", tmp_path, interrupt_at=8, every_steps=0, steps_per_execution=2)
    assert_same(trained("shuffled", tmp_path, every_steps=0, steps_per_execution=2), whole)


def test_a_fit_of_ones_own_that_passes_its_arguments_on(tmp_path):
    """As models of KerasHub do."""

    class Model(keras.Sequential):
        def fit(self, x, **kwargs):
            return super().fit(x, Y, **kwargs)

    def fitted(folder, epochs):
        keras.utils.set_random_seed(0)
        with tfdist.OneDevice().scope():
            model = Model([keras.Input((5,)), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
        return model.fit(X, epochs=epochs, verbose=0, callbacks=[tfdist.fit.Checkpoint(folder)]).history

    fitted(tmp_path / "a", 1)
    assert fitted(tmp_path / "a", 3) == fitted(tmp_path / "b", 3)
    trained("numpy", tmp_path / "c", every_steps=1)
    with pytest.raises(CheckpointError, match="is of a fit with initial_epoch=0 and steps_per_execution=1, found 0 and 2"):
        trained("numpy", tmp_path / "c", every_steps=1, steps_per_execution=2)


def test_damaged_ones_are_skipped_and_other_models_refused(tmp_path, caplog):
    with pytest.raises(Interrupted):
        trained("numpy", tmp_path, interrupt_at=7)
    (tmp_path / "step-00000006" / "values-00000.bin").write_bytes(b"cut")
    assert_same(trained("numpy", tmp_path), trained("numpy"))
    assert "skipping a damaged checkpoint" in caplog.text
    with tfdist.OneDevice().scope():
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        model.fit(X, Y, verbose=0, callbacks=[tfdist.fit.Checkpoint(tmp_path)])


def edit_fit(path, change):
    """What `fit` keeps in a manifest, with its checksum made anew."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["fit"])
    (path / "manifest.json").write_text(json.dumps(files.sealed(manifest)))


def counted(fit, kind):
    return next(found for name, found in fit["callbacks"] if name == kind)


def test_a_checkpoint_sets_what_callbacks_count_and_nothing_else(tmp_path):
    """A path to write to, or a patience: whatever a manifest from elsewhere names."""
    with pytest.raises(Interrupted):
        trained("numpy", tmp_path, interrupt_at=7)
    whole = trained("numpy")
    strange = {"patience": 0, "min_delta": 100.0, "restore_best_weights": False, "monitor": None}
    edit_fit(tmp_path / "step-00000006", lambda fit: counted(fit, "EarlyStopping").update(strange))
    assert_same(trained("numpy", tmp_path), whole)


FIT_DAMAGE = {
    "a path": lambda fit: counted(fit, "EarlyStopping").update(filepath="elsewhere"),
    "a text for a number": lambda fit: counted(fit, "EarlyStopping").update(wait="1"),
    "nothing for a number": lambda fit: counted(fit, "EarlyStopping").update(wait=None),
    "a truth value for a number": lambda fit: counted(fit, "EarlyStopping").update(wait=True),
    "weights that are not there": lambda fit: counted(fit, "EarlyStopping").update(best_weights={"weights": 99}),
    "a number for weights": lambda fit: counted(fit, "EarlyStopping").update(best_weights=3),
    "another step": lambda fit: fit.update(step=5),
    "a text for a step": lambda fit: fit.update(step="6"),
    "an epoch before the first": lambda fit: fit.update(epoch=-1),
    "an epoch far away": lambda fit: fit.update(epoch=10**15),
    "more batches than an epoch has": lambda fit: fit.update(batch=10**15),
    "no history": lambda fit: fit.pop("history"),
    "a number for callbacks": lambda fit: fit.update(callbacks=3),
    "a list": lambda fit: fit.clear(),
}


AT_THE_BEGINNING = ("nothing for a number", "a truth value for a number", "more batches than an epoch has")


def test_what_contradicts_itself_in_a_checkpoint_of_fit_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        trained("numpy", tmp_path / "saved", interrupt_at=7)
    for i, (name, damage) in enumerate(FIT_DAMAGE.items()):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "saved", folder)
        edit_fit(folder / "step-00000006", damage)
        if name not in AT_THE_BEGINNING:
            found = store.latest(folder)
            begin = lambda found=found: saved.facts_of(found)  # noqa: E731
        else:
            begin = lambda folder=folder: trained("numpy", folder, interrupt_at=1)  # noqa: E731
        with pytest.raises(CheckpointError, match=str(folder)) as error:
            begin()
        assert str(error.value).isprintable() and len(str(error.value)) < 480, name


def test_what_cannot_be_written_is_said_first_a_warning_on_the_way_and_an_error_at_the_end(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match="cannot write to"):
        trained("numpy", tmp_path / "file" / "folder", interrupt_at=1)  # before the first batch, or this would interrupt

    class Replace(InterruptAt):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0 and (tmp_path / "folder").is_dir():
                shutil.rmtree(tmp_path / "folder")
                (tmp_path / "folder").write_text("no folder any more")

    monkeypatch.setattr(sys.modules[__name__], "InterruptAt", Replace)
    with pytest.raises(CheckpointError, match="cannot write"):
        trained("numpy", tmp_path / "folder", interrupt_at=1)
    assert "training goes on" in caplog.text


def test_a_folder_that_is_gone_is_refused_as_long_as_its_marker_is_there(tmp_path):
    folder = tmp_path / "saved"
    with pytest.raises(Interrupted):
        trained("numpy", folder, interrupt_at=1)
    trained("numpy", folder, interrupt_at=0)  # nothing was saved: from the start
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="found none; put the folder back, or delete that file to start anew"):
        trained("numpy", folder)
    (tmp_path / "saved.saved").unlink()
    with pytest.raises(Interrupted):
        trained("numpy", folder, interrupt_at=1)


def test_a_folder_that_another_program_writes_to_is_refused(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process would; locks are of the open file
        with pytest.raises(WorkdirInUse, match="in use by another run") as error:
            trained("numpy", tmp_path)
    assert error.value.exit_code == 6 and not store.steps(tmp_path)
    for _ in range(2):  # a notebook's cell that runs twice
        trained("numpy", tmp_path)
    code = f"from tfdist.checkpoint.workdir import Workdir; Workdir({str(tmp_path)!r}).lock()"
    other = run_forked(["-c", code])
    assert f"in use by another run (process {os.getpid()})" in other.stderr and other.returncode != 0


def test_what_it_says(tmp_path, capsys):
    with pytest.raises(Interrupted):
        trained("numpy", tmp_path, interrupt_at=8)
    trained("numpy", tmp_path)
    trained("numpy", tmp_path)
    said = capsys.readouterr().err
    assert "goes on after step 6: epoch 2, 1 batches of it are done" in said and "complete already, after step" in said


def test_outside_of_a_scope_it_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(UserError, match="expected a model made under a tfdist scope"):
        model.fit(X, Y, verbose=0, callbacks=[tfdist.fit.Checkpoint(tmp_path)])
    with pytest.raises(UserError, match="keep_last"):
        tfdist.fit.Checkpoint(tmp_path, keep_last=0)


# ---- real processes ----

JOB = str(Path(__file__).parent / "fit_job.py")


def result(path):
    with np.load(path) as arrays:
        return dict(arrays)


@slow
def test_sigterm_saves_and_exits_with_143(tmp_path):
    whole = run_forked([JOB, str(tmp_path / "whole.npz")])
    assert whole.returncode == 0, whole.stderr
    process = start([JOB, str(tmp_path / "stopped.npz"), str(tmp_path / "checkpoints"), "0.02"])
    deadline_s = time.monotonic() + LIMIT_S
    while not store.steps(tmp_path / "checkpoints") and time.monotonic() < deadline_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.returncode == 143, stopped.stderr
    again = run_forked([JOB, str(tmp_path / "stopped.npz"), str(tmp_path / "checkpoints"), "0"])
    assert again.returncode == 0, again.stderr
    one, other = result(tmp_path / "whole.npz"), result(tmp_path / "stopped.npz")
    assert all((one[key] == other[key]).all() for key in one) and list(one) == list(other)


@slow
@pytest.mark.timeout(900)
def test_killed_while_it_saves_nothing_is_lost(tmp_path, request):
    """A save after each batch; every kill at a random time. `--kills=40` is what docs/keras.md says."""
    folder, lost, before = tmp_path / "checkpoints", 0, 0
    chance = random.Random(0)
    for _ in range(request.config.getoption("--kills") or 4):
        process = start([JOB, str(tmp_path / "out.npz"), str(folder), "0"], {"FIT_JOB_EPOCHS": "100000"})
        first = max(store.steps(folder), default=0)
        while max(store.steps(folder), default=0) <= first and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        found = store.latest(folder)
        lost += found is None or found.step < before
        before = found.step if found else 0
    assert lost == 0


@slow
def test_a_cluster_is_stopped_and_goes_on(tmp_path):
    """SIGTERM reaches one worker; both stop after the same batch, and go on from it, with another number of workers too."""

    def launched(workers, out, *arguments):
        launch = ["-m", "tfdist.cli", "launch", f"--workers={workers}", f"--log_dir={tmp_path / 'logs'}", "--", "python"]
        return start([*launch, JOB, str(tmp_path / out), *arguments])

    folder = tmp_path / "checkpoints"
    whole = finish(launched(2, "whole.npz"))
    assert whole.returncode == 0, whole.stderr
    process = launched(2, "stopped.npz", str(folder), "0.02")
    deadline_s = time.monotonic() + LIMIT_S
    while not store.steps(folder) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    again = finish(launched(1, "stopped.npz", str(folder), "0"))
    assert again.returncode == 0, again.stdout + again.stderr
    one, other = result(tmp_path / "whole.npz"), result(tmp_path / "stopped.npz")
    assert list(one) == list(other)
    for key in one:
        np.testing.assert_allclose(one[key], other[key], rtol=2e-5, atol=2e-8)
