"""Keras `fit` under tfdist against stock `fit`, and against tfdist's own loop on two workers.

    python benchmarks/fit.py [--rounds=7]

The model is that of benchmarks/step.py, 8 sequences a worker. Contestants take turns of 8 steps, one at a time, in one run;
ratios are medians of the ratios within a round. One process has all cores; of two workers each is pinned to one.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cluster
import step


def fit_turn(strategy_name: str, jit_compile: bool | str) -> step.Turn:
    import contextlib

    import keras

    from tfdist.models.transformer import TransformerLM

    scope, num_workers = contextlib.nullcontext(), 1
    if strategy_name:
        import tfdist

        strategy = tfdist.Mirrored(1) if strategy_name == "Mirrored" else tfdist.MultiWorkerMirrored()
        scope, num_workers = strategy.scope(), strategy.num_workers
    with scope:
        model = TransformerLM(step.model_config(), step.LENGTH)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(3e-4), loss, jit_compile=jit_compile)
    step.BATCH *= num_workers
    dataset = step.batches()
    step.BATCH //= num_workers

    class Clock(keras.callbacks.Callback):
        """Of the steps alone: beginning and ending a `fit` is measured by itself."""

        def on_train_begin(self, logs=None):
            self.ends_s = []

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])
            self.ends_s.append(time.perf_counter())

    clock = Clock()

    def turn() -> float:
        model.fit(dataset, steps_per_epoch=step.STEPS + 1, epochs=1, verbose=0, callbacks=[clock])
        return step.STEPS * step.BATCH * step.LENGTH / (clock.ends_s[-1] - clock.ends_s[0])

    return turn


# name -> (workers, how to make one)
CONTESTANTS = {
    "stock fit": (1, lambda **_: fit_turn("", "auto")),
    "stock fit, jit_compile=True": (1, lambda **_: fit_turn("", True)),
    "fit, Mirrored x1": (1, lambda **_: fit_turn("Mirrored", "auto")),
    "fit, Mirrored x1, jit_compile=True": (1, lambda **_: fit_turn("Mirrored", True)),
    "fit, 2 workers, jit_compile=True": (2, lambda **_: fit_turn("MultiWorkerMirrored", True)),
    "Trainer, 2 workers": (2, lambda **_: cluster.tfdist_worker(lm_tiny=False)),
}
RATIOS = [
    ("fit, Mirrored x1", "stock fit", 1.0),
    ("fit, Mirrored x1, jit_compile=True", "stock fit", 1.15),
    ("fit, Mirrored x1, jit_compile=True", "stock fit, jit_compile=True", None),
    ("fit, 2 workers, jit_compile=True", "Trainer, 2 workers", 0.95),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for hidden in ("--contestant", "--rank", "--port"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.contestant:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        num_workers, make = CONTESTANTS[arguments.contestant]
        if num_workers > 1:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(arguments.rank)]})
        step.take_turns(make())
        return
    contestants = {
        name: cluster.Contestant(name, sys.executable, __file__, num_workers)
        for name, (num_workers, _) in CONTESTANTS.items()
    }
    rounds = []
    for i in range(arguments.rounds):  # in the other direction each time: the machine's speed drifts
        names = list(contestants)[:: 1 if i % 2 else -1]
        rounds.append({name: contestants[name].turn() for name in names})
    for contestant in contestants.values():
        contestant.end()
    print("| contestant | tokens/s |\n|---|---|")
    for name in CONTESTANTS:
        print(f"| {name} | {statistics.median(turn[name] for turn in rounds):,.0f} |")
    print("\n| ratio | measured (lowest to highest) | target |\n|---|---|---|")
    for one, other, target in RATIOS:
        found = [turn[one] / turn[other] for turn in rounds]
        row = f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"
        print(f"| {one} / {other} | {row} | {target or ''} |")


if __name__ == "__main__":
    main()
