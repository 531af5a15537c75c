"""Any Keras model, any `tf.data`, any loss, on any strategy."""

import contextlib
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfdist import __version__
from tfdist.checkpoint import policy, store
from tfdist.checkpoint.workdir import Workdir
from tfdist.cluster.link import supervisor
from tfdist.errors import CheckpointError, Stopped, UserError, one_line
from tfdist.metrics.writers import JsonLines, Terminal, Writer
from tfdist.strategies import support
from tfdist.strategies.base import DatasetFn, Strategy
from tfdist.train import beginning, evaluate, loop, server_step, step
from tfdist.train.loss import Loss, LossFn
from tfdist.train.signals import StopRequest
from tfdist.train.state import TrainState, load, share


class Trainer:
    """Trains `model` with the numbers of one device.

    Args:
        strategy: the model and the optimizer must have been made under its `scope()`.
        loss: `loss(y_true, y_pred)` -> one value per element, [rows, ...], not reduced. For a model whose outputs are a
            dict, a dict of them: the sum of each output's own weighted mean is minimised.
        eval_loss: of `evaluate`, where that is another one (training with label smoothing); default: `loss`.
        metrics: more for `evaluate`, by name: functions like a loss, with one value per element, weighted as the loss is.
            "OUTPUT/NAME" for one output of several.
        clip_norm: global norm of the reduced gradient; 0 turns it off.
        accumulate_steps: micro-batches per optimizer step; each dataset element is split into that many blocks.
        steps_per_loop: at most this many steps in one compiled loop.
        seed: of dropout masks. Must stay the same over restarts.
        jit_compile: "auto", "on" or "off": XLA for forward, backward and update inside each replica.
        reduce_dtype: "float32" leaves gradients as they are, "bfloat16" sends half the bytes between replicas and is
            outside of the equality with one device.
        facts: entries for the manifest of every checkpoint that a restored one must equal (the command line puts the
            hashes of its config and data here); `seed` is always among them.
        writers: where rows go besides the workdir's metrics.jsonl; default: lines on the terminal.

    Raises `UserError` (a `ValueError`) for combinations that the support table refuses.
    """

    def __init__(
        self, strategy: Strategy, model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: Loss, *,
        eval_loss: Loss | None = None, metrics: Mapping[str, LossFn] | None = None,
        clip_norm: float = 0.0, accumulate_steps: int = 1, steps_per_loop: int = 20, seed: int = 0,
        jit_compile: str = "auto", reduce_dtype: str = "float32", facts: Mapping[str, Any] | None = None,
        writers: Sequence[Writer] | None = None,
    ):  # fmt: skip
        if accumulate_steps < 1 or steps_per_loop < 1:
            raise UserError(
                f"expected accumulate_steps and steps_per_loop of at least 1, found {accumulate_steps}, {steps_per_loop}"
            )
        self.strategy, self.model, self.loss = strategy, model, loss
        self.accumulate_steps, self.steps_per_loop, self.seed = accumulate_steps, steps_per_loop, seed
        self.facts = {"seed": seed, **(facts or {})}
        self.writers: list[Writer] = [Terminal()] if writers is None else list(writers)
        if not strategy.is_chief:
            self.writers = []
        self._has_evaluated = self._averaged = False
        supervisor().phase("build")
        self.workdir: Workdir | None = None
        self.state = TrainState(strategy, model, optimizer)
        self.optimizer = self.state.optimizer
        support.check(strategy, optimizer, clip_norm)  # a MultiOptimizer knows its optimizers once it is built
        self.jit_compile = support.jit_compile(jit_compile, model)
        if taken := {"loss", "perplexity", "tokens", "bits_per_byte", "kind", "step"} & set(metrics or {}):
            raise UserError(f"metrics: expected other names than the columns of an evaluation, found {sorted(taken)}")
        if reduce_dtype not in ("float32", "bfloat16"):
            raise UserError(f"reduce_dtype: expected float32 or bfloat16, found {reduce_dtype!r}")
        narrow = reduce_dtype if reduce_dtype != "float32" and strategy.num_replicas > 1 else ""
        options = step.StepOptions(clip_norm, seed, narrow, jit_compile == "on", self.jit_compile)
        make_train_step = (server_step if strategy.num_servers else step).make_train_step
        self.train_steps = strategy.make_steps(make_train_step(strategy, self.state, loss, options))
        eval_step = evaluate.make_eval_step(strategy, model, eval_loss or loss, self.jit_compile, metrics)
        self.eval_steps = strategy.make_steps(eval_step)

    @property
    def step(self) -> int:
        """Global batches consumed."""
        return int(self.state.step.numpy())

    def restore(self, workdir: str | Path) -> int:
        """Takes the workdir for this run and loads its newest good checkpoint, if there is one. Returns the step.

        Every worker calls it; the chief reads, the others get the values from it and need no common file system.
        Where there is none, what an earlier run that never saved had logged is moved to `old-N`. Raises `WorkdirInUse`, or
        `CheckpointError` when none of the run's checkpoints can be used, or they are gone.
        """
        self.phase("restore")
        self.workdir = Workdir(workdir)
        found = None
        if self.strategy.is_chief:
            self.workdir.lock()
            beginning.check_writable(self.workdir)
            found = beginning.find(self.workdir)
        if found is not None:
            for name, value in self.facts.items():
                if found.manifest.get(name) != value:
                    there = one_line(repr(found.manifest.get(name)), 60)
                    raise UserError(
                        f"{name}: expected {there} (of {found.path}), found {value!r}; "
                        "a resumed run needs the same; --fresh, or another workdir, starts anew"
                    )
            arrays = found.arrays()
            if not np.array_equal(arrays.get("step", -1), found.step):
                raise CheckpointError(f"checkpoint: expected the values of step {found.step} in {found.path}, found others")
            load(self.state.values(), arrays, str(found.path))
        self.share_state(found is not None)
        if self.strategy.is_chief:
            self.writers = [w for w in self.writers if not isinstance(w, JsonLines)] + [JsonLines(self.workdir.metrics)]
        self.write({"kind": "event", "name": "restore" if found else "start", "step": self.step, **versions()})
        return self.step

    def share_state(self, changed: bool = True) -> None:
        """Every worker takes the chief's values of everything that a checkpoint holds; all of them call it. `changed`:
        whether the chief's differ from what all started with."""
        share(self.strategy, list(self.state.values().values()), changed)

    def save(self, keep: policy.Keep | None = None) -> Path:
        """Writes a checkpoint of this step; for the chief alone. Older ones stay, but for those that `keep` lets go. Raises
        `CheckpointError` when the disk does not take it."""
        self._refuse_averages("save")
        self.phase("save")
        if self.workdir is None:
            raise UserError("expected a workdir to save to, found none; call trainer.restore(workdir) first")
        started_s = time.perf_counter()
        arrays = {key: np.asarray(variable.numpy()) for key, variable in self.state.values().items()}
        what = self.workdir.checkpoints, self.step, arrays, self.facts | {"versions": versions()}
        path = policy.save(*what, keep) if keep else store.save(*what)
        seconds = time.perf_counter() - started_s
        self.write({"kind": "event", "name": "checkpoint", "step": self.step, "seconds": seconds})
        return path

    def train(
        self, dataset_fn: DatasetFn, num_steps: int, actions: Sequence[loop.Action] = (), whole_run: int = 0
    ) -> int:  # fmt: skip
        """Trains up to step `num_steps` (counted from the very first start) or the end of the input; returns the step.

        `whole_run`: the last step of the run, where this is a part of it, on data of its own.

        SIGTERM and Ctrl-C save through the `Checkpoint` action and raise `Stopped` (exit code 143; 4 if that failed).
        The handlers that were there before are put back.
        """
        self._refuse_averages("train")
        with StopRequest(self.strategy.request_stop).installed() as stop:
            self.strategy.request_stop(False)  # one that came too late for the run before
            for writer in self.writers:
                if isinstance(writer, Terminal):  # it leaves out rows that come too fast, but never the last one
                    writer.num_steps = whole_run or num_steps
            if self.step < num_steps:
                iterator = self.strategy.distribute(
                    dataset_fn, accumulate_steps=self.accumulate_steps, start_step=self.step, num_steps=num_steps - self.step
                )
                try:
                    loop.run(self, iterator, num_steps, actions, stop, whole_run)
                except (CheckpointError, KeyboardInterrupt) as error:
                    if not stop.requested:
                        raise
                    logging.error("%s", error or "interrupted while saving; the last good checkpoint is kept")
                    raise Stopped(CheckpointError.exit_code) from error
                self.strategy.release(iterator)
            # nobody leaves before the chief has saved, and a request that came to one after the last step is everybody's
            if b"stop" in self.strategy.exchange(b"stop" if stop.requested else b""):
                self.write({"kind": "event", "name": "stop", "step": self.step})
                raise Stopped
        self.phase("finish")
        return self.step

    def evaluate(self, dataset_fn: DatasetFn, max_steps: int = 0) -> evaluate.EvalResult:
        """The weighted mean loss over a finite dataset, each element counted once; `max_steps` batches of it if not 0.

        With `averaged_weights`.
        """
        self.phase("evaluate" if self._has_evaluated else "compile")
        with self.averaged_weights():
            iterator = self.strategy.distribute(dataset_fn, whole=not max_steps)
            result = evaluate.run(self.eval_steps, iterator, max_steps)
            self.strategy.release(iterator)
        self._has_evaluated = True
        return result

    @contextlib.contextmanager
    def averaged_weights(self):
        """Inside, the model has the moving averages of an optimizer with `use_ema` (and no overwriting of its own), for
        evaluation, sampling and export; the trained weights come back bit by bit. Without averages it changes nothing."""
        if self._averaged or not (self.state.averages and self.state.updates):
            yield
            return
        self._averaged = True
        self.state.swap_averages()
        try:
            yield
        finally:
            self.state.swap_averages()
            self._averaged = False

    def _refuse_averages(self, what: str) -> None:
        if self._averaged:
            raise UserError(f"{what}: expected the trained weights, found their averages; leave `averaged_weights` first")

    def first_not_finite(self, outputs: Mapping[str, float]) -> tuple[str, int]:
        """Of a skipped step: the loss, or the first variable whose gradient was not finite, by name, and the first replica
        where that was so; -1: on none of them, the sum over the replicas is too large."""
        code = round(outputs["not_finite"])
        what = "the loss" if code == 1 else f"the gradient of {self.state.trainable[code - 2].path}"
        return what, round(outputs["not_finite_replica"])

    def phase(self, name: str) -> None:
        """Tells the supervisor, if there is one, what this process does now."""
        supervisor().phase(name, self.step)

    def close(self) -> None:
        """Closes the writers; the workdir stays locked until the process ends."""
        for writer in self.writers:
            writer.close()

    def write(self, row: dict[str, Any]) -> None:
        """One row of metrics to every writer."""
        for writer in self.writers:
            writer.write(row)


def versions() -> dict[str, str]:
    return {
        "tfdist": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
