"""Draws the picture of the README: one program of Keras `fit`, trained three times, and the loss of each epoch.

    python docs/clipping.py                        # half a minute; writes docs/images/clipping-{light,dark}.png
    python docs/clipping.py --epochs=2 --out=FOLDER

The program clips its gradients (`global_clipnorm=1`). Model, data, seed and the order of the batches are the same each time:

    one_device   stock Keras, no strategy
    tfdist       tfdist.Mirrored on two replicas
    stock        tf.distribute.MirroredStrategy on two replicas: each clips its own half, then the halves are added up

Each run is a process of its own, because devices are set up once in a process. The replicas are two logical CPU devices.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

RUNS = {  # name -> (its line in the picture, colour on a light page, colour on a dark page, style)
    "one_device": ("stock Keras, one device", "#afb8c1", "#57606a", {"linewidth": 7, "solid_capstyle": "round"}),
    "tfdist": ("tfdist, two replicas", "#0969da", "#79c0ff", {"linewidth": 2, "linestyle": (0, (4, 3)), "zorder": 3}),
    "stock": ("stock Keras, two replicas", "#d1242f", "#ff7b72", {"linewidth": 2}),
}
INK = {"light": "#1f2328", "dark": "#e6edf3"}


def scope_of(run: str):
    if run == "tfdist":
        import tfdist

        return tfdist.Mirrored(num_devices=2).scope()
    if run == "stock":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    return contextlib.nullcontext()


def data():
    """2048 rows of 20 numbers. The target: a weighted sum, a bend that needs a hidden layer, and noise."""
    import numpy as np

    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(2048, 20)), 3 * rng.normal(size=(20, 1))
    y = x @ weights + 5 * np.sin(x[:, :1] * x[:, 1:2]) + rng.normal(size=(2048, 1))
    return x.astype("float32"), y.astype("float32")


def losses_of(run: str, epochs: int) -> list[float]:
    """The program. Only the scope differs."""
    scope = scope_of(run)
    import keras

    keras.utils.set_random_seed(0)
    with scope:
        model = keras.Sequential(
            [
                keras.Input((20,)),
                keras.layers.Dense(32, activation="gelu"),
                keras.layers.Dense(32, activation="gelu"),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.25, global_clipnorm=1.0), "mse")
    x, y = data()
    return model.fit(x, y, batch_size=8, epochs=epochs, verbose=0).history["loss"]


def in_a_process(run: str, epochs: int) -> list[float]:
    command = [sys.executable, __file__, f"--run={run}", f"--epochs={epochs}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def draw(losses: dict[str, list[float]], page: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink = INK[page]
    figure, axes = plt.subplots(figsize=(7.2, 3.2), dpi=130, layout="constrained")
    for run, (label, light, dark, style) in RUNS.items():
        epochs = range(1, len(losses[run]) + 1)
        axes.plot(epochs, losses[run], label=label, color=light if page == "light" else dark, **style)
    axes.set_yscale("log")
    axes.set_yticks([4, 5, 6, 8, 10, 15, 20, 30], ["4", "5", "6", "8", "10", "15", "20", "30"])
    axes.minorticks_off()
    axes.set_xlabel("epoch", color=ink)
    axes.set_ylabel("training loss", color=ink)
    axes.tick_params(which="both", colors=ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.legend(frameon=False, labelcolor=ink)
    figure.savefig(path, transparent=True)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=RUNS, help="one run alone; prints its losses")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(losses_of(options.run, options.epochs)))
        return
    losses = {run: in_a_process(run, options.epochs) for run in RUNS}
    (options.out / "losses.json").write_text(json.dumps(losses))
    for page in INK:
        draw(losses, page, options.out / f"clipping-{page}.png")
    for run, values in losses.items():
        print(f"{run:10s}  loss of the last epoch: {values[-1]:.4f}")


if __name__ == "__main__":
    main()
