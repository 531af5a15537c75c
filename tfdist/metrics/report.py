"""`report.png`: what a run looked like."""

from pathlib import Path

from tfdist.metrics.writers import read_rows


def plot(metrics: Path, out: Path) -> None:
    """Loss of training and validation, learning rate, and throughput over the steps."""
    from matplotlib.figure import Figure

    train, evals = read_rows(metrics, "train"), read_rows(metrics, "eval")
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    steps = [row["step"] for row in train]
    loss.plot(steps, [row["loss"] for row in train], label="train", linewidth=1)
    if evals:
        loss.plot([row["step"] for row in evals], [row["loss"] for row in evals], "o-", label="validation")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    rate.plot(steps, [row["learning_rate"] for row in train], color="tab:green")
    rate.set_ylabel("learning rate")
    speed.plot(steps, [row["tokens_per_s"] for row in train], color="tab:purple")
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("step")
    speed.set_ylim(bottom=0)
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=100)
