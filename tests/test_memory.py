"""How much memory a step takes: measured, in a process for each run."""

import json

import keras
import pytest
from processes import run

import tfdist

PARAMETERS = 2 * 6000 * 6000
PROGRAM = """
import json, resource, sys
import keras, numpy as np, tensorflow as tf, tfdist
jit_compile, accumulate_steps, clip_norm = json.loads(sys.argv[1])
tf.config.threading.set_inter_op_parallelism_threads(1)  # else it depends on what happens to run at once
strategy = tfdist.OneDevice()
with strategy.scope():
    layers = [keras.layers.Dense(6000, use_bias=False) for _ in range(2)]
    model = keras.Sequential([keras.Input((6000,)), *layers])
    optimizer = keras.optimizers.SGD(1e-3)
trainer = tfdist.Trainer(
    strategy, model, optimizer, lambda y, p: tf.square(p[:, 0] - y), jit_compile=jit_compile,
    accumulate_steps=accumulate_steps, clip_norm=clip_norm, writers=[],
)
data = tf.data.Dataset.from_tensors((np.ones((8, 6000), "float32"), np.ones(8, "float32"))).repeat()
trainer.train(lambda context: data, 4)
peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([peak_bytes, trainer.state.bytes_per_replica(accumulate_steps)]))
"""


def peak_bytes(*arguments):
    done = run(["-c", PROGRAM, json.dumps(arguments)])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", ["on", "off"])
def test_accumulation_and_clipping_add_at_most_one_copy_of_the_gradients(jit_compile):
    plain, held = peak_bytes(jit_compile, 1, 0.0)
    both, held_while_accumulating = peak_bytes(jit_compile, 4, 0.1)
    gradients = PARAMETERS * 4
    print(
        f"\nmeasured: {jit_compile}: {(both - plain) / gradients:.2f} copies of the gradients ({plain / 1e6:.0f} MB without)"
    )
    assert both - plain <= 1.1 * gradients
    assert held["gradients"] == gradients and held_while_accumulating["gradients"] == 2 * gradients
    assert held["parameters"] == gradients and held["optimizer state"] < 100


def test_what_a_replica_holds_is_counted():
    strategy = tfdist.OneDevice()
    with strategy.scope():
        layers = [keras.layers.Dense(7), keras.layers.BatchNormalization()]
        model = keras.Sequential([keras.Input((3,)), *layers])
        optimizer = keras.optimizers.AdamW(1e-3)
    trainer = tfdist.Trainer(strategy, model, optimizer, keras.losses.MeanSquaredError(reduction="none"), writers=[])
    trainable = 3 * 7 + 7 + 2 * 7
    found = trainer.state.bytes_per_replica()
    assert found["parameters"] == 4 * (trainable + 2 * 7) and found["gradients"] == 4 * trainable
    assert found["optimizer state"] == 4 * 2 * trainable + 8 + 4, "two moments, iterations, learning rate"
