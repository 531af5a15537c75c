"""Where rows of metrics go: a JSON-lines file, TensorBoard, the terminal. A row is `{"kind": "train" | "eval" |
"event", "step": ..., ...}`."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 5.0


class Writer(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, written at once. Numbers that are not finite become null: JSON has none.

    A disk that does not take rows is a warning, said once: it must not end the run.
    """

    def __init__(self, path: Path):
        self.path, self.failed = path, False
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
        if self.file.tell() and path.read_bytes()[-1:] != b"\n":
            self._append(b"\n")  # the last line of a killed run

    def write(self, row: dict[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._append(json.dumps(clean).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        try:
            self.file.write(line)
        except OSError as error:
            if not self.failed:
                logging.warning("metrics: cannot write %s: %s; training goes on without", self.path, error.strerror)
            self.failed = True

    def close(self) -> None:
        self.file.close()


def read_all(path: Path) -> Iterator[dict[str, Any]]:
    """Every row, as written; none where the file is not there. What a killed run left half-written is skipped."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row and isinstance(row.get("step"), int):
            yield row


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind, by step; of a step that was run again after a restart, the newest."""
    by_step = {row["step"]: row for row in read_all(path) if row["kind"] == kind}
    return [by_step[step] for step in sorted(by_step)]


class TensorBoard:
    """Scalars under `train/` and `eval/`. The folder is made by the first row."""

    def __init__(self, folder: Path):
        import tensorflow as tf

        self.tf, self.folder, self.writer = tf, folder, None

    def write(self, row: dict[str, Any]) -> None:
        if row["kind"] == "event":
            return
        if self.writer is None:
            self.writer = self.tf.summary.create_file_writer(str(self.folder))
        with self.writer.as_default(step=row["step"]):
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.tf.summary.scalar(f"{row['kind']}/{name}", value)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere (a file, a pipe, a notebook's log)."""

    def __init__(self, num_steps: int = 0, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.num_steps, self.printed_s = num_steps, -math.inf
        self.bar = self.task = None
        if self.console.is_terminal and num_steps:
            self.bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(), console=self.console, refresh_per_second=4,
            )  # fmt: skip
            self.task = self.bar.add_task("train", total=num_steps, numbers="compiling ...")

    def write(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            self._train(row)
        elif row["kind"] == "eval":
            bits = f", {row['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in row else ""
            self._line(
                f"eval  step {row['step']}: loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}{bits}, "
                f"{row['tokens']:,} tokens"
            )
        elif row["name"] == "start":
            self._start()
        else:
            reason = f": {row['reason']}" if "reason" in row else ""
            self._line(f"{row['name']} at step {row['step']}{reason}")
            self._start()

    def _start(self) -> None:
        if self.bar is not None and not self.bar.live.is_started:
            self.bar.start()

    def _train(self, row: dict[str, Any]) -> None:
        mfu = f"  MFU {row['mfu']:.1%}" if row["mfu"] else ""  # 0: not known
        numbers = f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s{mfu}"
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], numbers=numbers)
            return
        now_s = time.monotonic()
        if now_s - self.printed_s >= _PLAIN_EVERY_S or row["step"] == self.num_steps:
            self.printed_s = now_s
            of = f"/{self.num_steps}" if self.num_steps else ""
            self._line(f"train step {row['step']}{of}: {numbers}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
