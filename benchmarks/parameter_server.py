"""Parameter servers on this machine: scaling, the cost of a step, bytes on the wire, a slow worker.

    python benchmarks/parameter_server.py [--rounds=3]

Each number comes from clusters that run one after the other, in turns; medians of the rounds. Workers are pinned to a core
each; the chief and the server run where there is room.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from absl import app, flags

flags.DEFINE_integer("rounds", 3, "of each measurement")
flags.DEFINE_string("job", "", "what a task of a cluster runs (set by this program)")

NUM_ROWS, DIM, BATCH = 1_000_000, 16, 512


# ---- a task of a cluster ----


def run_job(job: str) -> None:
    task = json.loads(os.environ["TF_CONFIG"])["task"]
    if task["type"] == "worker":
        os.sched_setaffinity(0, {task["index"] % os.cpu_count()})
        print(f"pid {os.getpid()}", flush=True)
    import keras
    import tensorflow as tf

    import tfdist
    from tfdist.config import ModelConfig
    from tfdist.models.transformer import TransformerLM, next_token_loss

    strategy = tfdist.ParameterServer()
    keras.utils.set_random_seed(0)

    def squared(y, predicted):
        return tf.square(predicted[:, 0] - y)

    with strategy.scope():
        if job == "compute":
            model = TransformerLM(ModelConfig(num_layers=2, num_heads=4, model_dim=128), 256)
            optimizer, loss = keras.optimizers.AdamW(1e-3), next_token_loss
            batch = tf.zeros([16, 256], tf.int32), tf.zeros([16, 256], tf.int32)
        elif job == "empty":
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
            optimizer, loss, batch = keras.optimizers.SGD(0.1), squared, (tf.zeros([1, 1]), tf.zeros([1]))
        else:
            ids = keras.Input((), dtype="int64")
            model = keras.Model(ids, keras.layers.Dense(1)(keras.layers.Embedding(NUM_ROWS, DIM)(ids)))
            optimizer, loss, batch = keras.optimizers.Adagrad(0.1), squared, None

    def rows(step):
        ids = tf.random.stateless_uniform([BATCH], tf.stack([step, 1]), maxval=NUM_ROWS, dtype=tf.int64)
        return ids, tf.ones([BATCH])

    def dataset_fn(context):
        if batch is None:
            return context.steps().map(rows)
        return tf.data.Dataset.from_tensors(batch).repeat()

    trainer = tfdist.Trainer(strategy, model, optimizer, loss, writers=[], steps_per_loop=1000)
    warm, measured = {"compute": (8, 30), "empty": (50, 1000), "rows": (50, 300)}[job]
    trainer.train(dataset_fn, warm)
    done = strategy.report()["steps"]
    started_s, bytes_before = time.perf_counter(), loopback_bytes()
    trainer.train(dataset_fn, warm + measured)
    seconds, sent = time.perf_counter() - started_s, loopback_bytes() - bytes_before
    steps = {worker: count - done[worker] for worker, count in strategy.report()["steps"].items()}
    call = tf.function(lambda number: number + 1, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int64))
    calls = [lambda: call(tf.constant(1, tf.int64)).numpy()] * 1000
    started_s = time.perf_counter()
    strategy.run_on_workers(calls)
    schedule_s = (time.perf_counter() - started_s) / len(calls)
    print(
        "result "
        + json.dumps({"step_s": seconds / measured, "bytes": sent / measured, "steps": steps, "schedule_s": schedule_s}),
        flush=True,
    )


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


# ---- this program ----


def measure(job: str, workers: int, slow_worker: int = -1) -> dict:
    """One run of a cluster with one server. `slow_worker` runs a quarter of the time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tfdist.cli", "launch", f"--workers={workers}", "--ps=1", "--all-output",
                   f"--log_dir={folder}", "--", sys.executable, __file__, f"--job={job}"]  # fmt: skip
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        result, over = None, threading.Event()
        for line in process.stdout:
            text = line.partition("] ")[2].strip()
            if text.startswith("pid") and line.startswith(f"[worker {slow_worker}]"):
                threading.Thread(target=slow_down, args=(int(text.split()[1]), over), daemon=True).start()
            if text.startswith("result "):
                result = json.loads(text.removeprefix("result "))
        over.set()
        if process.wait() or result is None:
            raise SystemExit(f"{job} with {workers} workers failed")
        return result


def slow_down(pid: int, over: threading.Event) -> None:
    """Stopped three quarters of every 40 ms: too short for a heartbeat to be missed."""
    while not over.wait(0.01):
        try:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.03)
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return


def main(_) -> None:
    if flags.FLAGS.job:
        run_job(flags.FLAGS.job)
        return
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        print(f"{name}: {value:.3f}", flush=True)

    for _ in range(flags.FLAGS.rounds):
        one, two, uneven = measure("compute", 1), measure("compute", 2), measure("compute", 2, slow_worker=1)
        alone = measure("compute", 1, slow_worker=0)
        note("compute-bound, 1 -> 2 workers: steps/s (x)", one["step_s"] / two["step_s"])
        rates = 1 / one["step_s"] + 1 / alone["step_s"]
        note("slowed worker alone / worker alone: step time (x)", alone["step_s"] / one["step_s"])
        note("one of two slowed: steps/s / the workers' own rates", 1 / uneven["step_s"] / rates)
        note("one of two slowed: share of the slow one's steps", uneven["steps"]["worker 1"] / sum(uneven["steps"].values()))
        empty = measure("empty", 2)
        note("scheduling alone, 2 workers: ms per step", 1e3 * empty["schedule_s"])
        note("empty step (pull, push, update), 2 workers: ms", 1e3 * empty["step_s"])
        wire = measure("rows", 2)["bytes"]
        note("rows of a table: kB on the wire per step", wire / 1e3)
        note("rows of a table: kB allowed (3 x rows + 20 kB)", (3 * BATCH * DIM * 4 + 20e3) / 1e3)
    print("\nmedians")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} |")


if __name__ == "__main__":
    app.run(main)
