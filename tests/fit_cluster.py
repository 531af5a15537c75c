"""Run by each worker of a cluster: what `fit` promises there. python fit_cluster.py FOLDER"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import DataError

folder = Path(sys.argv[1])
strategy = tfdist.MultiWorkerMirrored()
me = strategy.worker
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(24, 5)).astype("float32"), rng.normal(size=(24, 1)).astype("float32")


def model(**options):
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], **options)
    return model


def same_everywhere(value) -> None:
    messages = strategy.exchange(json.dumps(value).encode())
    assert len(set(messages)) == 1, messages


def digest(model) -> str:
    return float(sum(np.abs(w).sum() for w in model.get_weights())).hex()


# ---- a dataset that shuffles without a seed, initial weights drawn by each worker: alike all the same ----
dataset = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(24).batch(7)
net = model()
history = net.fit(dataset, epochs=2, verbose=2).history
same_everywhere([history, digest(net)])
net.fit(X, Y, batch_size=7, verbose=0)  # an array is shuffled too
same_everywhere(digest(net))

# ---- files are the chief's; decisions are the same ----
seen = []


class StopsOnOneWorker(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        seen.append(batch)
        if me == 1 and len(seen) == 6:
            self.model.stop_training = True


class ChangesTheRate(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.01 * (me + 1)  # as one that looks at a clock would


net = model()
writers = [
    keras.callbacks.ModelCheckpoint(str(folder / "best.keras"), monitor="loss", save_best_only=True),
    keras.callbacks.ModelCheckpoint(str(folder / "epoch-{epoch}.weights.h5"), save_weights_only=True),
    keras.callbacks.CSVLogger(str(folder / "log.csv")),
    keras.callbacks.TensorBoard(str(folder / "tensorboard")),
    keras.callbacks.BackupAndRestore(str(folder / "backup"), delete_checkpoint=False),
    keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: net.save(folder / f"own-{me}.keras")),
]
net.fit(X, Y, batch_size=6, epochs=3, validation_data=(X, Y), callbacks=[*writers, ChangesTheRate(), StopsOnOneWorker()])
assert len(seen) == 6, seen
rate = float(net.optimizer.learning_rate.numpy())
assert np.isclose(rate, 0.01), rate
same_everywhere([digest(net), rate])
strategy.barrier()
assert (folder / "own-0.keras").exists() and not (folder / "own-1.keras").exists()
assert not list(folder.glob("**/*.tmp*"))
assert len((folder / "log.csv").read_text().splitlines()) == 3
assert len(list(folder.glob("tensorboard/train/events*"))) == 1

# ---- what was saved can be loaded, on a cluster and without ----
again = model()
again.load_weights(folder / "epoch-2.weights.h5")
same_everywhere(digest(again))
assert digest(again) == digest(net)
loaded = keras.models.load_model(folder / "own-0.keras")
assert digest(loaded) == digest(net)
with strategy.scope():
    loaded = keras.models.load_model(folder / "own-0.keras")
loaded.fit(X, Y, batch_size=7, verbose=0)
same_everywhere(digest(loaded))
net.save(folder / "all.keras")  # by all workers at once
strategy.barrier()
assert digest(keras.models.load_model(folder / "all.keras")) == digest(net)

# ---- only the chief can read the backup ----
restored = model()
backup = keras.callbacks.BackupAndRestore(str(folder / "backup") if me == 0 else str(folder / "elsewhere"))
restored.fit(X, Y, batch_size=6, epochs=3, verbose=0, callbacks=[backup])
same_everywhere(digest(restored))
assert len(restored.history.epoch) == 1, restored.history.epoch

# ---- what cannot be is refused, with one line ----


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return X[:4], Y[:4]


for data in (Sequence(), ((X[:4], Y[:4]) for _ in range(2))):
    with pytest.raises(ValueError, match="found a .* each worker would run it by itself"):
        net.fit(data, verbose=0)
with pytest.raises(ValueError, match="pass the dataset itself"):
    net.fit(strategy.tf_strategy.experimental_distribute_dataset(dataset), verbose=0)

# ---- workers that read different batches are told so ----
apart = tf.data.Dataset.from_tensor_slices((X, Y)).shard(2, me).batch(4)
with pytest.raises(DataError, match="expected the same batches on every worker"):
    net.fit(apart, verbose=0)
strategy.barrier()
print("all is well")
