"""Training speed of one step on one device, against Keras, PyTorch and the machine itself.

    python benchmarks/step.py [--rounds=5] [--torch_python=.venv-torch/bin/python]

Decoder d=256, 4 layers, 4 heads, T=256, B=8, V=4096, AdamW. Each contestant is a process of its own; they take turns,
one at a time, and the medians and the ratios within a round are printed. PyTorch takes part when --torch_python names a
Python that has it (`python -m venv .venv-torch; .venv-torch/bin/pip install torch==2.13.0`).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DIM, LAYERS, HEADS, LENGTH, BATCH, VOCABULARY = 256, 4, 4, 256, 8, 4096
STEPS = 8  # per turn
MATMUL_SIZE = 1024

Turn = Callable[[], float]  # does its work once and returns tokens/s (matmul: FLOP/s)


# ---- contestants ----


def model_config(dtype: str = "float32"):
    from tfdist.config import ModelConfig

    return ModelConfig(vocab_size=VOCABULARY, num_layers=LAYERS, num_heads=HEADS, model_dim=DIM, dtype=dtype)


def random_tokens():
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCABULARY, (64, LENGTH + 1)).astype("int32")


def batches():
    import tensorflow as tf

    tokens = random_tokens()
    data = tf.data.Dataset.from_tensor_slices((tokens[:, :-1], tokens[:, 1:]))
    return data.repeat().batch(BATCH, drop_remainder=True).prefetch(2)


def timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return STEPS * BATCH * LENGTH / (time.perf_counter() - started_s)


def tfdist(dtype: str = "float32") -> Turn:
    import keras

    import tfdist
    from tfdist.models.transformer import TransformerLM, next_token_loss

    strategy = tfdist.OneDevice()
    with strategy.scope():
        model = TransformerLM(model_config(dtype), LENGTH)
        optimizer = keras.optimizers.AdamW(3e-4)
    trainer = tfdist.Trainer(strategy, model, optimizer, next_token_loss, steps_per_loop=STEPS, writers=[])
    iterator = strategy.distribute(lambda context: batches())
    return lambda: timed(lambda: trainer.train_steps(iterator, STEPS))


def whole_step() -> Turn:
    """What one would write by hand for one device: everything in one compiled function."""
    import keras
    import tensorflow as tf

    from tfdist.models.transformer import TransformerLM, next_token_loss

    model, optimizer = TransformerLM(model_config(), LENGTH), keras.optimizers.AdamW(3e-4)
    optimizer.build(model.trainable_variables)
    iterator = iter(batches())

    @tf.function(jit_compile=True, autograph=False)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(next_token_loss(y, model(x, training=True)))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    def work():
        for _ in range(STEPS):
            loss = step(*next(iterator))
        return float(loss)

    return lambda: timed(work)


def keras_fit() -> Turn:
    import keras

    from tfdist.models.transformer import TransformerLM

    model = TransformerLM(model_config(), LENGTH)
    model.compile(keras.optimizers.AdamW(3e-4), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    iterator = batches()
    return lambda: timed(lambda: model.fit(iterator, steps_per_epoch=STEPS, epochs=1, verbose=0))


def matmul() -> Turn:
    """The machine's own rate: square float32 products, compiled like the step."""
    import tensorflow as tf

    a = tf.random.normal([MATMUL_SIZE, MATMUL_SIZE])
    product = tf.function(lambda a: tf.matmul(a, a), jit_compile=True, autograph=False)

    def turn() -> float:
        started_s = time.perf_counter()
        for _ in range(200):
            c = product(a)
        float(c[0, 0])
        return 200 * 2 * MATMUL_SIZE**3 / (time.perf_counter() - started_s)

    return turn


def torch_step(compiled: bool, bfloat16: bool = False, wrap: Callable | None = None) -> Turn:
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
            self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
            self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

        def forward(self, x):
            q, k, v = self.qkv(self.norm_1(x)).split(DIM, -1)
            q, k, v = (t.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(BATCH, LENGTH, DIM))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LENGTH, DIM)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(DIM)

        def forward(self, x, y):
            h = self.tokens(x) + self.positions.weight
            for block in self.blocks:
                h = block(h)
            logits = self.norm(h) @ self.tokens.weight.T
            return F.cross_entropy(logits.float().view(-1, VOCABULARY), y.reshape(-1))

    torch.manual_seed(0)
    model = wrap(LanguageModel()) if wrap else LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(random_tokens()).long()
    place = 0

    def work():
        nonlocal place
        for _ in range(STEPS):
            rows = tokens[place : place + BATCH]
            place = (place + BATCH) % len(tokens)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = forward(rows[:, :-1], rows[:, 1:])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return float(loss)

    return lambda: timed(work)


CONTESTANTS: dict[str, Callable[[], Turn]] = {
    "tfdist": tfdist,
    "whole step by hand": whole_step,
    "Keras fit": keras_fit,
    "tfdist mixed_bfloat16": lambda: tfdist("mixed_bfloat16"),
    "matmul": matmul,
    "PyTorch eager": lambda: torch_step(compiled=False),
    "PyTorch compiled": lambda: torch_step(compiled=True),
    "PyTorch autocast": lambda: torch_step(compiled=False, bfloat16=True),
}


# ---- taking turns ----


def contest(name: str) -> None:
    """A contestant's process: warm up, then one turn for each line on stdin."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    take_turns(CONTESTANTS[name]())


def take_turns(turn: Turn) -> None:
    turn(), turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(turn(), flush=True)


class Contestant:
    def __init__(self, name: str, python: str):
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(
            [python, __file__, f"--contestant={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{name} did not start; run it alone: {python} {__file__} --contestant='{name}'")

    def turn(self) -> float:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch_python", default=".venv-torch/bin/python")
    arguments = parser.parse_args()
    if arguments.contestant:
        contest(arguments.contestant)
        return
    has_torch = Path(arguments.torch_python).exists()
    names = [name for name in CONTESTANTS if has_torch or not name.startswith("PyTorch")]
    contestants = {n: Contestant(n, arguments.torch_python if n.startswith("PyTorch") else sys.executable) for n in names}
    rounds = [{name: contestant.turn() for name, contestant in contestants.items()} for _ in range(arguments.rounds)]
    for contestant in contestants.values():
        contestant.process.stdin.close()

    from tfdist.models import count

    flops = count.flops_per_token(model_config(), LENGTH)

    def ratio(a: str, b: str) -> str:
        return f"{statistics.median(r[a] / r[b] for r in rounds):.3f}"

    print("| contestant | tokens/s (median) | tfdist / it |\n|---|---|---|")
    for name in names:
        if name != "matmul":
            print(f"| {name} | {statistics.median(r[name] for r in rounds):,.0f} | {ratio('tfdist', name)} |")
    rate = statistics.median(r["matmul"] for r in rounds) / 1e9
    share = statistics.median(r["tfdist"] * flops / r["matmul"] for r in rounds)
    print(f"\nfloat32 matrix product ({MATMUL_SIZE}^3): {rate:.0f} GFLOP/s; tfdist uses {share:.3f} of it")
    print(f"mixed_bfloat16 / tfdist float32: {ratio('tfdist mixed_bfloat16', 'tfdist')}")


if __name__ == "__main__":
    main()
