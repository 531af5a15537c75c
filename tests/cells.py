"""Training runs that every strategy must agree on. Runs in a process of its own:

    python tests/cells.py mirrored:2 float64 out.npz [CELL ...]

writes the losses of every step and every variable on every replica of those cells (default: all). `multi_worker:2x1`
(workers x devices) is one worker of a cluster and writes out.npz.0, out.npz.1.
"""

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tfdist
from tfdist.config import ModelConfig
from tfdist.data.input import pipeline_rows
from tfdist.models.transformer import TransformerLM, next_token_loss
from tfdist.train.step import LossFn

NUM_STEPS = 20
LENGTH, VOCABULARY = 8, 13
CELLS: dict[str, Callable[["Bench"], None]] = {}

# true gradient zero: a key bias shifts all scores of a query alike, so its gradient is rounding noise, which Adam
# scales up to the size of the learning rate
ZERO_GRADIENT = ("attention/key/bias",)


def cell(fn):
    CELLS[fn.__name__] = fn
    return fn


class Bench:
    """One cell on one strategy."""

    def __init__(self, strategy, dtype: str):
        self.strategy, self.dtype = strategy, dtype
        self.results: dict[str, np.ndarray] = {}

    def train(
        self, make_model, make_optimizer, loss: LossFn, batches: list[tuple], num_steps: int = NUM_STEPS,
        jit_compile: str = "off", **options,
    ):  # fmt: skip
        """Trains over `batches` again and again and keeps losses and variables."""
        keras.utils.set_random_seed(1)
        rows = []

        class Rows:
            write = staticmethod(rows.append)

        with self.strategy.scope():
            model, optimizer = make_model(), make_optimizer()
        trainer = tfdist.Trainer(
            self.strategy,
            model,
            optimizer,
            loss,
            jit_compile=jit_compile,
            writers=[Rows()],
            steps_per_loop=7,
            **options,
        )
        micro_batches = options.get("accumulate_steps", 1)
        trainer.train(lambda context: dataset(batches, context, micro_batches), num_steps, [tfdist.actions.Log()])
        train_rows = [row for row in rows if row["kind"] == "train"]
        assert len(train_rows) == (num_steps if self.strategy.is_chief else 0)
        self.results["losses"] = np.array([row["loss"] for row in train_rows])
        self.results["tokens"] = np.array([row["tokens"] for row in train_rows])
        for key, variable in trainer.state.values().items():
            copies = self.strategy.tf_strategy.experimental_local_results(variable.value)
            self.results[f"var/{key}"] = np.stack([copy.numpy() for copy in copies])
        evaluated = trainer.evaluate(lambda context: dataset(batches, context).take(len(batches)))
        self.results["eval"] = np.array([evaluated.loss, evaluated.weight, evaluated.tokens])
        return trainer

    def lm(self, **config):
        values = dict(vocab_size=VOCABULARY, num_layers=1, num_heads=2, model_dim=8, dtype=self.dtype) | config
        return TransformerLM(ModelConfig(**values), LENGTH)


def dataset(batches: list[tuple], context, micro_batches: int = 1) -> tf.data.Dataset:
    """Batches of any size, over and over, from `start_step` on: this pipeline's rows of each."""
    rows = pipeline_rows(max(len(batch[0]) for batch in batches), micro_batches, context)
    mine = [tuple(a[rows[rows < len(a)]] for a in batch) for batch in batches]
    spec = tuple(tf.TensorSpec([None, *a.shape[1:]], a.dtype) for a in batches[0])
    data = tf.data.Dataset.from_generator(lambda: iter(mine), output_signature=spec)
    return data.repeat().skip(context.start_step)


def tokens(rows: list[int], weights: bool = False, seed: int = 0) -> list[tuple]:
    """One batch per entry of `rows`; weights are 0 beyond a random length of each row."""
    rng = np.random.default_rng(seed)
    batches = []
    for n in rows:
        ids = rng.integers(0, VOCABULARY, (n, LENGTH + 1)).astype(np.int32)
        weight = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (n, 1))).astype(np.float32)
        weight *= rng.choice([0.5, 1.0, 2.0], weight.shape).astype(np.float32)
        batches.append((ids[:, :-1], ids[:, 1:], weight) if weights else (ids[:, :-1], ids[:, 1:]))
    return batches


def adamw(**options):
    return keras.optimizers.AdamW(5e-3, weight_decay=0.1, **options)


@cell
def clip_and_decay_with_xla(bench: Bench) -> None:
    bench.train(bench.lm, adamw, next_token_loss, tokens([8]), clip_norm=0.5, jit_compile="on")


@cell
def accumulation_and_dropout(bench: Bench) -> None:
    bench.train(lambda: bench.lm(dropout=0.2), adamw, next_token_loss, tokens([16, 16]), accumulate_steps=4)


@cell
def llama_parts_with_dropout_and_recompute(bench: Bench) -> None:
    parts = dict(
        positions="rotary", norm="rms", activation="swiglu", num_kv_heads=1, use_bias=False, tie_embeddings=False,
        dropout=0.1, recompute=True,
    )  # fmt: skip
    bench.train(lambda: bench.lm(**parts), adamw, next_token_loss, tokens([8]), jit_compile="on", clip_norm=1.0)


@cell
def token_weights_uneven_batches_and_a_step_without_weight(bench: Bench) -> None:
    batches = tokens([8, 8, 5], weights=True)
    batches[1] = (*batches[1][:2], np.zeros_like(batches[1][2]))
    bench.train(bench.lm, adamw, next_token_loss, batches, accumulate_steps=2, clip_norm=1.0)


@cell
def empty_replicas_and_dropout(bench: Bench) -> None:
    bench.train(lambda: bench.lm(dropout=0.2), adamw, next_token_loss, tokens([8, 1], weights=True))


@cell
def dense_model_with_l2_momentum_and_clip_by_value(bench: Bench) -> None:
    def make_model():
        l2 = keras.regularizers.L2(1e-2)
        return keras.Sequential([
            keras.Input((5,), dtype=bench.dtype),
            keras.layers.Dense(7, activation="tanh", kernel_regularizer=l2, dtype=bench.dtype),
            keras.layers.Dense(3, dtype=bench.dtype),
        ])  # fmt: skip

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 5)), rng.normal(size=(n, 3))) for n in (8, 6)]
    loss = keras.losses.MeanSquaredError(reduction="none", dtype=bench.dtype)
    bench.train(make_model, lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipvalue=0.05), loss, batches)


@cell
def clip_by_norm_and_ema(bench: Bench) -> None:
    def optimizer():
        return adamw(clipnorm=0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5)

    bench.train(bench.lm, optimizer, next_token_loss, tokens([8]))


def make_strategy(name: str):
    kind, _, count = name.partition(":")
    if kind == "multi_worker":
        return tfdist.MultiWorkerMirrored(num_devices=int(count.partition("x")[2]))
    return tfdist.OneDevice() if kind == "one_device" else tfdist.Mirrored(int(count))


def main(name: str, dtype: str, out: str, *cell_names: str) -> None:
    strategy = make_strategy(name)
    keras.config.set_floatx(dtype)
    arrays = {}
    for cell_name in cell_names or CELLS:
        bench = Bench(strategy, dtype)
        started_s = time.perf_counter()
        CELLS[cell_name](bench)
        print(f"{cell_name}: {time.perf_counter() - started_s:.1f} s")
        arrays |= {f"{cell_name}|{key}": value for key, value in bench.results.items()}
    with open(f"{out}.{strategy.worker}", "wb") as file:
        np.savez(file, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
