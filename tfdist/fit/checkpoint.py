"""Checkpoints of `fit`: atomic, self-verifying folders (checkpoint/store.py), with what `fit` itself keeps besides."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfdist import files
from tfdist.checkpoint import keys, policy, store
from tfdist.checkpoint.workdir import Workdir
from tfdist.errors import CheckpointError, Stopped, UserError
from tfdist.fit import saved
from tfdist.fit.functions import optimizers_of
from tfdist.patches.fit import counters, on_epoch_iterator, start_at_epoch
from tfdist.strategies.base import Strategy
from tfdist.train import state
from tfdist.train.signals import StopRequest

_VALUES = ("model/", "seeds/", "optimizer/")
_MARK = (
    "tfdist.fit.Checkpoint has saved into the folder {} beside this file. While this file is there, a fit that finds no "
    "checkpoint in that folder ends with an error. To start anew, delete both.\n"
)


class Checkpoint(keras.callbacks.Callback):
    """A callback that saves the whole state of a `fit` into `folder`, and goes on from there when the program runs again.

    The state: weights, optimizer, averages, seeds of random layers, metrics so far, history, and what EarlyStopping,
    ReduceLROnPlateau and ModelCheckpoint have counted. A resumed `fit` trains on the batch that comes next and ends with the
    weights and the history of one that was never interrupted; of the data it needs the same batches in the same order again.
    A `fit` that had ended does nothing more. On SIGTERM and Ctrl-C it saves and exits with 143.

    Args:
        folder: `folder/step-00000500` and so on; a step is a batch.
        every_steps: save each time so many batches are done; 0: after every epoch. A multiple of `steps_per_execution`.
        keep_last: how many checkpoints stay.
        keep_every_steps: those at multiples of it stay too.

    The first save puts a file `FOLDER.saved` beside the folder: while it is there, a `fit` that finds no checkpoint is a
    `CheckpointError` and does not start at step 0. To start anew, delete both.

    The process holds the folder: a second one that would write there gets `WorkdirInUse` (code 6).

    A disk that does not take a checkpoint is a warning while training goes on and a `CheckpointError` at the end. Damaged
    ones are skipped. For models that are made under a tfdist scope.
    """

    def __init__(self, folder: str | Path, every_steps: int = 0, keep_last: int = 3, keep_every_steps: int = 0):
        super().__init__()
        if every_steps < 0:
            raise UserError(f"every_steps: expected at least 0, found {every_steps}")
        self.folder, self.every_steps = Path(folder), every_steps
        self.keep = policy.Keep(keep_last, keep_every_steps)
        self.strategy: Strategy | None = None

    # ---- called by the adapter ----

    def begin(
        self, strategy: Strategy, others: list[keras.callbacks.Callback], stop_requested: Callable[[], bool],
        stop: StopRequest, initial_epoch: int, epochs: int,
    ) -> None:  # fmt: skip
        """A `fit` begins; its model may not be built yet. `stop_requested`: whether any worker was, by the last step;
        `stop`: whether this process was, by now."""
        self.strategy, self.others, self.stop_requested, self.stop = strategy, others, stop_requested, stop
        self.initial_epoch, self.epochs = initial_epoch, epochs
        self.step, self.epoch, self.batch = 0, initial_epoch, 0  # batches done, epoch that is on, batches done in it
        self.saved_step, self.due, self.begun, self.found = -1, False, False, None
        self.counters, self.history, self.metrics, self.best_weights = [], None, [], []

    def restore(self, model: keras.Model, epoch_iterator: Any) -> None:
        """The model is built: takes the latest checkpoint, if there is one. Every worker calls it."""
        self.begun, facts = True, {}
        if self.strategy.is_chief:
            store.check_writable(self.folder)
            Workdir(self.folder).lock()
            self.found = store.latest(self.folder)
            if self.found is None and self._marker.exists():
                raise CheckpointError(
                    f"checkpoint: expected checkpoints in {self.folder} (says {self._marker}), found none; put the folder "
                    "back, or delete that file to start anew"
                )
            if self.found is not None:
                facts = saved.facts_of(self.found)
                values = {key: array for key, array in self.found.arrays().items() if key.startswith(_VALUES)}
                state.load(values_of(model), values, str(self.found.path))
        facts = json.loads(self.strategy.broadcast(json.dumps(facts).encode()))
        if not facts:
            return
        state.share(self.strategy, list(values_of(model).values()))
        self.metrics, self.best_weights = self._share_arrays("metrics/"), self._share_arrays("best_weights/")
        self.saved_step = self.step = facts["step"]
        self.epoch, self.batch = facts["epoch"], facts["batch"]
        self.history, self.counters = facts["history"], facts["callbacks"]
        if (facts["initial_epoch"], facts["steps_per_execution"]) != (self.initial_epoch, model.steps_per_execution):
            raise CheckpointError(
                f"checkpoint: {self.folder} is of a fit with initial_epoch={facts['initial_epoch']} and "
                f"steps_per_execution={facts['steps_per_execution']}, found {self.initial_epoch} and "
                f"{model.steps_per_execution}; give the same, or another folder"
            )
        known = epoch_iterator.steps_per_epoch or epoch_iterator.num_batches
        if known is not None and self.batch > int(known):
            raise CheckpointError(
                f"checkpoint: {self.folder} is of a fit that had done {self.batch} batches of an epoch, found epochs of "
                f"{known}; give the same data, or another folder"
            )
        start_at_epoch(model, sys.maxsize if facts["stopped"] else self.epoch)
        epochs = self.epoch - self.initial_epoch
        on_epoch_iterator(epoch_iterator, self._from_here(epoch_iterator, epochs, self.batch))
        if facts["stopped"] or self.epoch >= self.epochs:
            self._say(f"complete already, after step {self.step}; another folder starts anew, more epochs go on")
        else:
            self._say(f"goes on after step {self.step}: epoch {self.epoch + 1}, {self.batch} batches of it are done")

    def _say(self, what: str) -> None:
        if self.strategy.is_chief:
            print(f"tfdist: {self.folder}: {what}", file=sys.stderr, flush=True)

    def _share_arrays(self, prefix: str) -> list[np.ndarray]:
        """The chief's arrays of the checkpoint whose keys begin so, in order, on every worker."""
        arrays = {}
        if self.found is not None:
            arrays = {key: array for key, array in self.found.arrays().items() if key.startswith(prefix)}
        if self.strategy.num_workers == 1:
            return list(arrays.values())
        heads = [(array.dtype.name, array.shape) for array in arrays.values()]
        heads = json.loads(self.strategy.broadcast(json.dumps(heads).encode()))
        whole = self.strategy.broadcast(b"".join(array.tobytes() for array in arrays.values()))
        shared, start = [], 0
        for dtype, shape in heads:
            count = int(np.prod(shape, dtype=np.int64))
            shared.append(np.frombuffer(whole, dtype, count, start).reshape(shape))
            start += shared[-1].nbytes
        return shared

    @staticmethod
    def _from_here(epoch_iterator: Any, epochs: int, batches: int) -> Callable:
        """The steps of an epoch but for those that are done. Where an epoch's data depend on what was read before, all of
        it is read again."""
        reads = epoch_iterator.steps_per_epoch is not None or epoch_iterator.num_batches is None
        first = True

        def drop(iterator) -> None:
            for _ in range(epoch_iterator.steps_per_execution):
                next(iterator)

        def steps(stock: Callable) -> Iterator:
            nonlocal first
            if not first:
                yield from stock()
                return
            first = False
            for _ in range(epochs):
                with epoch_iterator.catch_stop_iteration():
                    try:
                        for *_, iterator in stock():
                            if reads:
                                drop(iterator)
                    except tf.errors.OutOfRangeError:
                        raise StopIteration from None
            done = 0
            for step in stock():
                if done < batches:
                    drop(step[-1])
                    done += epoch_iterator.steps_per_execution
                else:
                    yield step

        return steps

    # ---- Keras' hooks; this callback is the last one of the user's ----

    def on_train_begin(self, logs=None):
        if self.strategy is None:
            raise UserError("tfdist.fit.Checkpoint: expected a model made under a tfdist scope, found another")
        best_weights, left = iter(self.best_weights), [one for one in self.others if counters(one)]
        for kind, counted in self.counters:
            counting = next((one for one in left if type(one).__name__ == kind), None)
            if counting is None:
                logging.warning("fit: %s has a %s, which is not among the callbacks any more", self.folder, kind)
            else:
                left.remove(counting)
            if isinstance(counted.get("best_weights"), dict):
                counted["best_weights"] = [next(best_weights) for _ in range(counted["best_weights"]["weights"])]
            if counting is not None:
                saved.set_counters(counting, counted, str(self.folder))

    def on_epoch_begin(self, epoch, logs=None):
        if self.history is not None:  # Keras has emptied its own by now
            self.model.history.epoch, self.model.history.history = list(range(self.initial_epoch, epoch)), self.history
        self.epoch, self.history = epoch, None
        metrics, self.metrics = self.metrics, []
        if metrics:  # in the middle of an epoch
            variables = self.model.metrics_variables
            if [tuple(v.shape) for v in variables] != [value.shape for value in metrics]:
                raise CheckpointError(f"checkpoint: {self.folder} has other metrics than the model; give it the same")
            for variable, value in zip(variables, metrics, strict=True):
                copies = self.strategy.tf_strategy.experimental_local_results(variable.value)
                for replica, copy in enumerate(copies, self.strategy.first_replica):  # where a step leaves it
                    copy.assign(value if not replica or variable.aggregation != "sum" else np.zeros_like(value))

    def on_train_batch_end(self, batch, logs=None):
        steps = self.model.steps_per_execution
        self.step, self.batch = self.step + steps, self.batch + steps
        self.due |= bool(self.every_steps) and self.step // self.every_steps > (self.step - steps) // self.every_steps

    def on_train_batch_begin(self, batch, logs=None):
        self._save_if_due()  # before the next one, not after one that may be the last of its epoch

    def on_epoch_end(self, epoch, logs=None):
        self.epoch, self.batch = epoch + 1, 0
        self.due |= not self.every_steps
        self._save_if_due(logs)

    def on_train_end(self, logs=None):
        if self.history is not None:  # it had ended before
            self.model.history.epoch = list(range(self.initial_epoch, self.epoch))
            self.model.history.history = self.history
        self._save(last=True)
        if b"1" in self.strategy.exchange(b"1" if self.stop.requested else b"0"):  # after the last step
            raise Stopped

    # ---- saving ----

    def _save_if_due(self, logs: dict | None = None) -> None:
        """`logs`: of an epoch that has just ended, which is not in the history yet."""
        due, self.due = self.due, False
        if self.stop_requested():
            self._save(last=True, logs=logs)
            self._say(f"saved step {self.step}; the same program goes on from it")
            self.strategy.barrier()
            raise Stopped
        if due:
            self._save(logs=logs)

    def _save(self, last: bool = False, logs: dict | None = None) -> None:
        if self.step == self.saved_step:
            return
        # reading a metric sums over all replicas: every worker does
        metrics = [np.asarray(v.numpy()) for v in self.model.metrics_variables] if self.batch else []
        if not self.strategy.is_chief:
            return
        arrays = {key: np.asarray(variable.numpy()) for key, variable in values_of(self.model).items()}
        arrays |= {f"metrics/{i:03}": value for i, value in enumerate(metrics)}
        counted, places = [], 0
        for callback in self.others:
            found = counters(callback)
            weights = found.get("best_weights")
            if weights is not None:
                arrays |= {f"best_weights/{i:05}": np.asarray(value) for i, value in enumerate(weights, places)}
                places += len(weights)
                found["best_weights"] = {"weights": len(weights)}
            if found:
                counted.append((type(callback).__name__, {name: _plain(value) for name, value in found.items()}))
        history = {name: [_plain(value) for value in values] for name, values in self.model.history.history.items()}
        for name, value in (logs or {}).items():
            history[name] = [*history.get(name, []), _plain(value)]
        fit = {"step": self.step, "epoch": self.epoch, "batch": self.batch, "stopped": self.model.stop_training}
        fit |= {"initial_epoch": self.initial_epoch, "steps_per_execution": self.model.steps_per_execution}
        fit |= {"history": history, "callbacks": counted}
        try:
            policy.save(self.folder, self.step, arrays, {"fit": fit}, self.keep)
        except CheckpointError as error:
            if last:
                raise
            logging.warning("%s; training goes on, the last good checkpoint is kept", error)
            return
        self.saved_step = self.step
        self._mark()

    @property
    def _marker(self) -> Path:
        """Beside the folder: it says, when that is gone, that something was saved."""
        return Path(f"{os.path.abspath(self.folder)}.saved")

    def _mark(self) -> None:
        if self._marker.exists():
            return
        try:
            files.write(self._marker, _MARK.format(self.folder.absolute().name).encode())
        except OSError as error:
            logging.warning("fit: cannot write %s: %s; a lost folder would not be noticed", self._marker, error.strerror)


def values_of(model: keras.Model) -> dict[str, keras.Variable]:
    """What a checkpoint of `fit` holds of a model, by stable key: its weights, seeds, and all its optimizers."""
    values = {f"model/{key}": v for key, v in keys.model_keys(model).items()}
    values |= {f"seeds/{i:03}": v for i, v in enumerate(state.layer_seeds(model))}
    for i, optimizer in enumerate(one for one in optimizers_of(model) if one.built):
        values |= {f"optimizer/{i}/{key}": v for key, v in keys.optimizer_keys(optimizer, model).items()}
    return values


def _plain(value):
    """As JSON has it."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) else value
