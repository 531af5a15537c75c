"""Where rows of metrics go: a JSON-lines file, TensorBoard, the terminal. A row is `{"kind": "train" | "eval" |
"event", "step": ..., ...}`."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tfdist import files
from tfdist.errors import printable

_MOST_ROW_BYTES = 1 << 20  # a longer line is no row
_LOCK_S = 1.0
_PLAIN_EVERY_S = 5.0
_AGAIN_S = 60.0  # after a failure of TensorBoard's files


class Writer(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass
class Lost:
    """Rows that a file did not take."""

    first_step: int
    last_step: int
    rows: int
    reason: str


class JsonLines:
    """One JSON object a line, written at once. Numbers that are not finite become null: JSON has none.

    Rows that the disk does not take are left out whole, and never end the run: the next one that it takes comes behind an
    event `rows_lost`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lost: Lost | None = None
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115  open as long as the run
        with contextlib.suppress(OSError), self._alone():
            self._drop_torn()  # of a killed run

    def write(self, row: dict[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self._append(self._lost_row() + json.dumps(clean).encode() + b"\n")
        except OSError as error:
            self._lose(row["step"], error.strerror or str(error))
        else:
            self._found()

    def _append(self, lines: bytes) -> None:
        """All of it, or nothing and an `OSError`."""
        with self._alone():
            self._drop_torn()
            start = os.fstat(self.file.fileno()).st_size
            try:
                while lines:
                    lines = lines[self.file.write(lines) :]
            except OSError:
                os.ftruncate(self.file.fileno(), start)
                raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, an evaluator does not write to the same file. It is not waited for long: it may have been stopped. Where
        files cannot be locked, nobody is."""
        until_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > until_s:
                    raise OSError(errno.EBUSY, "another process holds its lock") from error
                time.sleep(_LOCK_S / 100)
            except OSError:
                break
            else:
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self.file, fcntl.LOCK_UN)

    def _drop_torn(self) -> None:
        """Cuts off a last line without an end, or ends it where it is a whole row."""
        descriptor = self.file.fileno()
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            first = max(0, size - _MOST_ROW_BYTES)
            content = os.pread(descriptor, size - first, first)
            start = content.rfind(b"\n") + 1
            if _row(content[start:]) is None:
                os.ftruncate(descriptor, first + start)
            else:
                self.file.write(b"\n")

    def _lose(self, step: int, reason: str) -> None:
        if self.lost is None:
            logging.warning("metrics: cannot write %s: %s; training goes on without", self.path, reason)
            self.lost = Lost(step, step, 0, reason)
        self.lost = Lost(self.lost.first_step, step, self.lost.rows + 1, reason)

    def _lost_row(self) -> bytes:
        if self.lost is None:
            return b""
        row = {"kind": "event", "name": "rows_lost", "step": self.lost.last_step, **dataclasses.asdict(self.lost)}
        return json.dumps(row).encode() + b"\n"

    def _found(self) -> None:
        if self.lost is not None:
            logging.warning(
                "metrics: %s lacks %d rows of the steps %d to %d",
                self.path, self.lost.rows, self.lost.first_step, self.lost.last_step,
            )  # fmt: skip
        self.lost = None

    def close(self) -> None:
        if not self.file.closed:
            with contextlib.suppress(OSError):
                self._append(self._lost_row())
            self._found()
            self.file.close()


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and "kind" in row and files.is_count(row.get("step")) else None


def read_all(path: Path) -> Iterator[dict[str, Any]]:
    """Every row, as written; none where the file is not there. What a killed run left half-written is skipped."""
    try:
        file = files.open_inside(path.parent, path.name)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_MOST_ROW_BYTES):
            if (row := _row(line)) is not None:
                yield row


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind, by step; of a step that was run again after a restart, the newest."""
    by_step = {row["step"]: row for row in read_all(path) if row["kind"] == kind}
    return [by_step[step] for step in sorted(by_step)]


class TensorBoard:
    """Scalars under `train/` and `eval/`. The folder is made by the first row.

    What cannot be written is left out and never ends the run; once a minute it is tried again, with a new file: what comes
    behind a torn record is never read.
    """

    def __init__(self, folder: Path):
        import tensorflow as tf

        self.tf, self.folder, self.writer, self.again_s = tf, folder, None, -math.inf

    def write(self, row: dict[str, Any]) -> None:
        if row["kind"] == "event" or time.monotonic() < self.again_s:
            return
        with self._rescued():
            if self.writer is None:
                self.writer = self.tf.summary.create_file_writer(str(self.folder))
            with self.writer.as_default(step=row["step"]):
                for name, value in row.items():
                    if isinstance(value, (int, float)) and name != "step":
                        self.tf.summary.scalar(f"{row['kind']}/{name}", value)

    @contextlib.contextmanager
    def _rescued(self) -> Iterator[None]:
        try:
            yield
        except self.tf.errors.OpError as error:
            logging.warning(
                "tensorboard: cannot write to %s: %s; training goes on without", self.folder, type(error).__name__
            )
            self.writer, self.again_s = None, time.monotonic() + _AGAIN_S

    def close(self) -> None:
        if self.writer is not None:
            with self._rescued():
                self.writer.close()


class _Unread:
    """A stream that nobody may read any more: what it does not take is lost. Rich would end the program with code 1."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, AttributeError):  # of None, where there is no stderr at all
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.stream.flush()


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere (a file, a pipe, a notebook's log). What cannot be written there
    is left out, and never ends the run."""

    def __init__(self, num_steps: int = 0, console: Console | None = None):
        self.console = console or Console(file=_Unread(sys.stderr), highlight=False, soft_wrap=True)
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
        self.console.print(printable(text), markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
