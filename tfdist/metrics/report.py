"""`report.png`: what a run looked like."""

import math
from pathlib import Path

from tfdist import files
from tfdist.metrics.writers import read_rows


def _numbers(rows: list[dict], name: str) -> list[float]:
    """A column; NaN where a row has no number there."""
    return [row[name] if type(row.get(name)) is float or files.is_count(row.get(name)) else math.nan for row in rows]


def plot(metrics: Path, out: Path) -> None:
    """Loss of training and validation, learning rate, and throughput over the steps."""
    from matplotlib.figure import Figure

    train, evals = read_rows(metrics, "train"), read_rows(metrics, "eval")
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    steps = [row["step"] for row in train]
    loss.plot(steps, _numbers(train, "loss"), label="train", linewidth=1)
    if evals:
        loss.plot([row["step"] for row in evals], _numbers(evals, "loss"), "o-", label="validation")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    rate.plot(steps, _numbers(train, "learning_rate"), color="tab:green")
    rate.set_ylabel("learning rate")
    speed.plot(steps, _numbers(train, "tokens_per_s"), color="tab:purple")
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("step")
    speed.set_ylim(bottom=0)
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=100)
