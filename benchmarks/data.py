"""Reading and building data: tfdist against a NumPy memmap loop, from memory and from a corpus larger than memory.

    python benchmarks/data.py [--rounds=5] [--gigabytes=10]

Readers are processes of their own that take turns; windows of T=256, batches of 32, one worker, consumed inside a
compiled loop as training does. The large corpus is a sparse file. Then: a start at step 1,000,000, the build, and how long
training of configs/lm_tiny.py waits for data.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LENGTH, BATCH, STEPS = 256, 32, 500  # steps per turn
SMALL_TOKENS = 50_000_000
BUFFER_MB = 256  # of the block shuffle
VOCABULARY = 1 << 16

Turn = Callable[[], float]  # tokens/s


# ---- readers ----


def token_file(folder: Path, name: str, tokens: int, sparse: bool) -> Path:
    import numpy as np

    path = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(tokens,))
    if not sparse:
        array[:] = np.random.default_rng(0).integers(0, VOCABULARY, tokens, dtype=np.uint16)
    array.flush()
    return path


def dataset_of(path: Path):
    import numpy as np

    from tfdist.data.shards import Shard, Split, TokenDataset

    array = np.load(path, mmap_mode="r")
    shard = Shard(path, len(array), path.stat().st_size - array.nbytes, "uint16", 0)
    split = Split((shard,), len(array), 0, 0)
    return TokenDataset(path.parent, "", "bytes", "", VOCABULARY, 0, {"train": split})


def dataset_fn(path: Path, buffer_mb: int):
    from tfdist.config import Config, DataConfig, ModelConfig, TrainConfig
    from tfdist.data.input import train_dataset_fn

    config = Config(
        model=ModelConfig(vocab_size=VOCABULARY),
        data=DataConfig(sequence_length=LENGTH, shuffle_buffer_mb=buffer_mb),
        train=TrainConfig(global_batch_size=BATCH),
    )
    return train_dataset_fn(dataset_of(path), config)


def tfdist_reader(path: Path, buffer_mb: int = 1024) -> Turn:
    import tensorflow as tf

    import tfdist

    iterator = tfdist.OneDevice().distribute(dataset_fn(path, buffer_mb))

    @tf.function(autograph=False)
    def loop(iterator):
        def body(i, total):
            batch = next(iterator)
            return i + 1, total + tf.cast(batch.x[0, 0, 0, 0] + batch.y[0, 0, -1, -1], tf.int64)

        return tf.while_loop(lambda i, _: i < STEPS, body, (0, tf.constant(0, tf.int64)), parallel_iterations=1)

    return lambda: timed(lambda: loop(iterator))


def numpy_memmap(path: Path) -> Turn:
    """nanoGPT's way: a memmap made anew for every batch, random places, int64."""
    import numpy as np

    rng, size = np.random.default_rng(0), len(np.load(path, mmap_mode="r"))

    def work():
        for _ in range(STEPS):
            data = np.memmap(path, np.uint16, "r", offset=128)
            places = rng.integers(0, size - LENGTH, BATCH)
            np.stack([data[i : i + LENGTH].astype(np.int64) for i in places])
            np.stack([data[i + 1 : i + 1 + LENGTH].astype(np.int64) for i in places])

    return lambda: timed(work)


def timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return STEPS * BATCH * LENGTH / (time.perf_counter() - started_s)


READERS: dict[str, Callable[[Path, Path], Turn]] = {
    "tfdist, from memory": lambda small, large: tfdist_reader(small),
    "NumPy memmap, nanoGPT's get_batch": lambda small, large: numpy_memmap(small),
    "tfdist, in blocks from disk": lambda small, large: tfdist_reader(large, BUFFER_MB),
}


def contest(name: str, small: Path, large: Path) -> None:
    """A reader's process: one turn, and its largest resident memory, for each line on stdin."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    turn = READERS[name](small, large)
    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(turn(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


class Reader:
    def __init__(self, name: str, small: Path, large: Path):
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--contestant={name}", str(small), str(large)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{name} did not start")

    def turn(self) -> tuple[float, float]:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        rate, memory_mb = self.process.stdout.readline().split()
        return float(rate), float(memory_mb)


def read(rounds: int, small: Path, large: Path, gigabytes: float) -> None:
    readers = {name: Reader(name, small, large) for name in READERS}
    turns = [{name: reader.turn() for name, reader in readers.items()} for _ in range(rounds)]
    for reader in readers.values():
        reader.process.stdin.close()
        reader.process.wait()
    print("| reader | million tokens/s (lowest to highest) | resident MB |\n|---|---|---|")
    for name in READERS:
        rates = [turn[name][0] / 1e6 for turn in turns]
        memory = max(turn[name][1] for turn in turns)
        print(f"| {name} | {statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}) | {memory:.0f} |")
    memory, numpy, _ = READERS
    ratios = [turn[memory][0] / turn[numpy][0] for turn in turns]
    print(f"\nfrom memory / NumPy: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"the large corpus: {gigabytes:g} GB, data.shuffle_buffer_mb={BUFFER_MB}")


# ---- the rest ----


def resume(small: Path, large: Path) -> None:
    import tfdist

    strategy = tfdist.OneDevice()
    for name, path, buffer_mb in (("from memory", small, 1024), ("in blocks", large, BUFFER_MB)):
        times = []
        for _ in range(4):  # the first one warms TensorFlow up
            started_s = time.perf_counter()
            next(strategy.distribute(dataset_fn(path, buffer_mb), start_step=1_000_000))
            times.append(time.perf_counter() - started_s)
        print(f"start at step 1,000,000, {name}: {statistics.median(times[1:]):.2f} s until the first batch")


def build(folder: Path, rounds: int) -> None:
    """Python source of the installed packages; everything from start to end of the command counts."""
    import numpy

    corpus = folder / "corpus"
    corpus.mkdir()
    packages, size = Path(numpy.__file__).parent.parent, 0
    for i, path in enumerate(sorted(packages.rglob("*.py"))):
        if size > 100e6:
            break
        text = path.read_bytes()
        if b"\0" not in text:
            (corpus / f"{i:06}.txt").write_bytes(text)
            size += len(text)
    rates: dict[str, list[float]] = {}
    tokenizer = folder / "tokenizer-1" / "tokenizer.json"
    for turn in range(rounds):
        for name, spec in (
            ("bytes", "bytes"),
            ("BPE, trained and encoded", "bpe:8192"),
            ("BPE, encoded", f"file:{tokenizer}"),
        ):
            out = folder / ("tokenizer-1" if spec == "bpe:8192" and not turn else f"built-{name}-{turn}")
            command = [
                "data",
                "build",
                f"--source=files:{corpus}/*.txt",
                f"--tokenizer={spec}",
                f"--out={out}",
                "--processes=2",
            ]
            started_s = time.perf_counter()
            subprocess.run([sys.executable, "-m", "tfdist.cli", *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            rates.setdefault(name, []).append(size / 1e6 / (time.perf_counter() - started_s))
    for name, found in rates.items():
        rate = f"{statistics.median(found):.1f} MB/s ({min(found):.1f} to {max(found):.1f})"
        print(f"build of {size / 1e6:.0f} MB, {name}: {rate}")


def data_wait(folder: Path) -> None:
    workdir = folder / "run"
    command = ["train", "--config=lm_tiny", f"--workdir={workdir}", "--config.train.num_steps=60"]
    command += ["--config.eval.every_steps=0", "--config.eval.max_steps=1", "--config.log.sample_tokens=0"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-m", "tfdist.cli", *command], check=True, cwd=ROOT, **quiet)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    shares = [row["data_wait_s"] / row["step_time_s"] for row in rows if row["kind"] == "train" and row["step"] > 5]
    print(f"lm_tiny waits for data {statistics.mean(shares):.3%} of the step time, median {statistics.median(shares):.3%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=10)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = token_file(folder, "small", SMALL_TOKENS, sparse=False)
        large = token_file(folder, "large", int(arguments.gigabytes * 5e8), sparse=True)
        read(arguments.rounds, small, large, arguments.gigabytes)
        resume(small, large)
        build(folder, max(1, arguments.rounds // 2))
        data_wait(folder)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("--contestant="):
        contest(sys.argv[1].partition("=")[2], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
