"""Two workers against one, and against PyTorch DDP: weak scaling on the cores of one machine.

    python benchmarks/cluster.py [--rounds=5] [--torch_python=.venv-torch/bin/python] [--only=NAME,NAME]

Each worker is a process pinned to one core. The model is that of benchmarks/step.py, 8 sequences a worker, no
accumulation; and the shape of configs/lm_tiny.py with its batch a worker in 4 micro-batches. Contestants take turns, one
at a time, in one run; ratios are medians of the ratios within a round.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import step

STEPS = 8  # per turn

Turn = Callable[[], float]  # this worker's tokens/s over one turn


def tfdist_worker(lm_tiny: bool, reduce_dtype: str = "float32") -> Turn:
    import keras
    import numpy as np
    import tensorflow as tf

    import tfdist
    from tfdist.models.transformer import TransformerLM, next_token_loss

    strategy = tfdist.from_environment()
    if lm_tiny:
        from tfdist.configs.lm_tiny import get_config

        config = get_config()
        model_config, length, rows, micro_batches = (
            config.model,
            config.data.sequence_length,
            config.train.global_batch_size,
            4,
        )
    else:
        model_config, length, rows, micro_batches = step.model_config(), step.LENGTH, step.BATCH, 1
    with strategy.scope():
        model, optimizer = TransformerLM(model_config, length), keras.optimizers.AdamW(3e-4)
    trainer = tfdist.Trainer(
        strategy, model, optimizer, next_token_loss, steps_per_loop=STEPS, writers=[], accumulate_steps=micro_batches,
        reduce_dtype=reduce_dtype,
    )  # fmt: skip

    def dataset_fn(context):
        tokens = (
            np.random.default_rng(context.pipeline).integers(0, model_config.vocab_size, (64, length + 1)).astype("int32")
        )
        data = tf.data.Dataset.from_tensor_slices((tokens[:, :-1], tokens[:, 1:]))
        return data.repeat().batch(rows, drop_remainder=True).prefetch(2)

    iterator = strategy.distribute(dataset_fn, accumulate_steps=micro_batches)

    def turn() -> float:
        started_s = time.perf_counter()
        trainer.train_steps(iterator, STEPS)
        return STEPS * rows * length / (time.perf_counter() - started_s)

    return turn


def torch_worker(num_workers: int, rank: int, port: int) -> Turn:
    import torch

    torch.set_num_threads(1)
    if num_workers > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=num_workers
        )
    wrap = torch.nn.parallel.DistributedDataParallel if num_workers > 1 else None
    step.STEPS = STEPS
    return step.torch_step(compiled=False, wrap=wrap)


# name -> (workers, how to make one)
CONTESTANTS: dict[str, tuple[int, Callable[..., Turn]]] = {
    "1 worker": (1, lambda **_: tfdist_worker(lm_tiny=False)),
    "2 workers float32": (2, lambda **_: tfdist_worker(lm_tiny=False)),
    "2 workers bfloat16": (2, lambda **_: tfdist_worker(lm_tiny=False, reduce_dtype="bfloat16")),
    "lm_tiny 1 worker": (1, lambda **_: tfdist_worker(lm_tiny=True)),
    "lm_tiny 2 workers": (2, lambda **_: tfdist_worker(lm_tiny=True)),
    "PyTorch 1 worker": (1, torch_worker),
    "PyTorch DDP 2 workers": (2, torch_worker),
}


def contest(name: str, rank: int, port: int) -> None:
    """A worker's process: warm up, then one turn for each line on stdin."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    num_workers, make = CONTESTANTS[name]
    turn = make(num_workers=num_workers, rank=rank, port=port)
    step.take_turns(turn)


class Contestant:
    """All workers of one contestant."""

    def __init__(self, name: str, python: str, program: str = __file__, num_workers: int = 0):
        num_workers = num_workers or CONTESTANTS[name][0]
        ports = free_ports(num_workers)
        addresses = [f"localhost:{port}" for port in ports]
        self.workers = []
        for rank in range(num_workers):
            tf_config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
            environment = {"TF_CONFIG": json.dumps(tf_config)} if num_workers > 1 else {}
            self.workers.append(subprocess.Popen(
                [python, program, f"--contestant={name}", f"--rank={rank}", f"--port={ports[0]}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
            ))  # fmt: skip
        for worker in self.workers:
            if worker.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{name} did not start: {' '.join(worker.args)}")

    def turn(self) -> float:
        """Tokens/s of all workers together."""
        for worker in self.workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        return sum(float(worker.stdout.readline()) for worker in self.workers)

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--contestant", "--rank", "--port"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--torch_python", default=".venv-torch/bin/python")
    arguments = parser.parse_args()
    if arguments.contestant:
        contest(arguments.contestant, int(arguments.rank), int(arguments.port))
        return
    has_torch = Path(arguments.torch_python).exists()
    names = [n for n in CONTESTANTS if has_torch or not n.startswith("PyTorch")]
    names = [n for n in names if not arguments.only or n in arguments.only.split(",")]
    contestants = {n: Contestant(n, arguments.torch_python if n.startswith("PyTorch") else sys.executable) for n in names}
    try:
        rounds = [{name: contestant.turn() for name, contestant in contestants.items()} for _ in range(arguments.rounds)]
    finally:
        for contestant in contestants.values():
            contestant.end()
    print("| contestant | tokens/s (median) |\n|---|---|")
    for name in names:
        print(f"| {name} | {statistics.median(r[name] for r in rounds):,.0f} |")
    print("\n| ratio (median within rounds) | measured | target |\n|---|---|---|")
    for a, b, target in (
        ("lm_tiny 2 workers", "lm_tiny 1 worker", "1.7"),
        ("2 workers bfloat16", "1 worker", "1.6"),
        ("2 workers float32", "1 worker", "1.5"),
        ("2 workers bfloat16", "PyTorch DDP 2 workers", "1.0"),
        ("2 workers float32", "PyTorch DDP 2 workers", "reported"),
        ("PyTorch DDP 2 workers", "PyTorch 1 worker", "reported"),
    ):
        if a in names and b in names:
            ratios = sorted(r[a] / r[b] for r in rounds)
            print(f"| {a} / {b} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {target} |")


if __name__ == "__main__":
    main()
