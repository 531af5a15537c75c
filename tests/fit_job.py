"""A program with `fit` that can be stopped and run again: python fit_job.py OUT.npz [CHECKPOINTS SLEEP_S]"""

import os
import sys
import time

import keras
import numpy as np

import tfdist

keras.utils.set_random_seed(0)
strategy = tfdist.from_environment()
with strategy.scope():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(64), keras.layers.Dense(1)])
    model.compile("adam", "mse")
rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 5)), rng.normal(size=(64, 1))
callbacks = []
if len(sys.argv) > 2:
    seconds = float(sys.argv[3])
    callbacks.append(keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(seconds)))
    callbacks.append(tfdist.fit.Checkpoint(sys.argv[2], every_steps=1))
epochs = int(os.environ.get("FIT_JOB_EPOCHS", "15"))
history = model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=callbacks).history
if strategy.is_chief:
    np.savez(sys.argv[1], **{f"w{i}": w for i, w in enumerate(model.get_weights())}, loss=history["loss"])
