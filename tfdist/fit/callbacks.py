"""Callbacks on a cluster: the chief alone writes and prints, and all workers take the chief's decisions."""

import json
from collections.abc import Sequence

import keras
from absl import logging

from tfdist.errors import UserError
from tfdist.patches.fit import first_epoch, start_at_epoch
from tfdist.strategies.base import Strategy
from tfdist.train import state

# what they do is for one process: their files, their lines
_WRITERS = tuple(
    getattr(keras.callbacks, name)
    for name in ("BackupAndRestore", "CSVLogger", "ModelCheckpoint", "ProgbarLogger", "RemoteMonitor", "TensorBoard")
    if hasattr(keras.callbacks, name)
)


def of_this_worker(
    strategy: Strategy, callbacks: Sequence[keras.callbacks.Callback], checkpoints: Sequence[keras.callbacks.Callback]
) -> list[keras.callbacks.Callback]:  # fmt: skip
    """The callbacks of one worker. On several workers, which all call it, `Agree` comes before the `checkpoints`."""
    restores = any(isinstance(one, keras.callbacks.BackupAndRestore) for one in callbacks)
    if restores and strategy.is_chief:
        logging.warning(
            "BackupAndRestore: a process that is killed while it saves can leave nothing to restore; "
            "tfdist.fit.Checkpoint cannot, and continues at the exact batch"
        )
    # those of Keras itself: what derives from them may compute, on all workers, and finds `save` silent
    kept = [one for one in callbacks if strategy.is_chief or type(one) not in _WRITERS]
    if strategy.num_workers == 1:
        return [*kept, *checkpoints]
    own = [one for one in kept if type(one).__module__.partition(".")[0] not in ("keras", "tfdist")]
    own += [one for one in kept if isinstance(one, keras.callbacks.LambdaCallback)]
    mine = {"restores": restores, "batches": any(map(_decides_after_batches, own)), "checkpoints": len(checkpoints)}
    all_of_them = [json.loads(text) for text in strategy.exchange(json.dumps(mine).encode())]
    if len({one["checkpoints"] for one in all_of_them}) > 1:
        raise UserError("fit: expected tfdist.fit.Checkpoint among the callbacks of every worker, found it on some only")
    restores, after_each_batch = (any(one[name] for one in all_of_them) for name in ("restores", "batches"))
    return [*kept, Agree(strategy, restores, after_each_batch), *checkpoints]


class Agree(keras.callbacks.Callback):
    """After all others: if one worker wants to stop, all do; the learning rate is the chief's.

    Keras' own callbacks decide by the logs, which are equal on all workers. What others decide after a batch is agreed upon
    after each batch, which costs a message; what any decides at an epoch's beginning or end, there.
    """

    def __init__(self, strategy: Strategy, restores: bool, after_each_batch: bool):
        super().__init__()
        self.strategy, self.restores, self.after_each_batch = strategy, restores, after_each_batch

    def on_train_begin(self, logs=None):
        if self.restores:  # the chief alone has read a backup
            state.share(self.strategy, [*self.model.variables, *self.model.optimizer.variables])
            epochs = self.strategy.exchange(str(first_epoch(self.model)).encode())
            start_at_epoch(self.model, int(epochs[0]))

    def on_epoch_begin(self, epoch, logs=None):
        self._agree()

    def on_epoch_end(self, epoch, logs=None):
        self._agree()

    def on_train_batch_end(self, batch, logs=None):
        if self.after_each_batch:
            self._agree()

    def _agree(self) -> None:
        optimizer = self.model.optimizer
        rate = getattr(optimizer, "learning_rate", None)
        settable = isinstance(rate, keras.Variable)  # else a schedule, which all compute alike
        message = {"stop": bool(self.model.stop_training), "rate": float(rate.numpy()).hex() if settable else ""}
        messages = [json.loads(text) for text in self.strategy.exchange(json.dumps(message).encode())]
        self.model.stop_training = any(one["stop"] for one in messages)
        if settable and messages[0]["rate"] != message["rate"]:
            optimizer.learning_rate = float.fromhex(messages[0]["rate"])


def _decides_after_batches(callback: keras.callbacks.Callback) -> bool:
    hooks = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
    stock = keras.callbacks.Callback
    return any(hook in vars(callback) or getattr(type(callback), hook) is not getattr(stock, hook) for hook in hooks)
