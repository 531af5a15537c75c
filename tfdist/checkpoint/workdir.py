"""The folder of one run, and the lock that keeps a second run out of it."""

import contextlib
import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import IO

from absl import logging

from tfdist import files
from tfdist.errors import UserError, WorkdirInUse, one_line

_LAUNCH = ".launch"  # which launch began this run anew


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


# A process holds a workdir as long as it lives, whatever becomes of the objects that asked for it.
_held: dict[Path, IO[bytes]] = {}


class Workdir:
    """Paths of one run. Creating the object touches nothing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"  # of a tokenizer that its name alone does not restore
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.report = self.path / "report.png"

    def lock(self) -> None:
        """Creates the folder and holds it until the process ends. Raises `WorkdirInUse` when another process does.

        Taking it again in the same process is fine (a notebook cell that runs twice). The system frees it when the
        process dies.
        """
        if self.path.resolve() in _held:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = files.open_inside(self.path, ".lock", "a+b")  # kept open on purpose
        except OSError as error:
            raise UserError(f"workdir: cannot write to {error.filename or self.path}: {error.strerror}") from error
        self._flock(file)
        with contextlib.suppress(OSError):  # a full disk: others are kept out, but not told by whom
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        _held[self.path.resolve()] = file

    def check_free(self) -> None:
        """Raises `WorkdirInUse` like `lock`, without taking it."""
        try:
            with files.open_inside(self.path, ".lock", "r+b") as file:
                self._flock(file)
        except OSError:  # not there, or not ours: `lock` will say
            return

    def _flock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = one_line(file.read(32).decode(errors="replace")) or "unknown"
            file.close()
            raise WorkdirInUse(
                f"{self.path} is in use by another run (process {holder}); stop it, or use another folder"
            ) from None

    def is_of_launch(self, token: str) -> bool:
        """Whether `belongs_to_launch` was called with this token; never for an empty one."""
        try:
            return bool(token) and files.read_inside(self.path, _LAUNCH, 64) == _digest(token).encode()
        except OSError:
            return False

    def belongs_to_launch(self, token: str) -> None:
        if token:
            files.write(self.path / _LAUNCH, _digest(token).encode())

    def set_aside(self, *only: Path) -> Path | None:
        """Moves everything of an earlier run, or `only` these, into `old-N`, so that a new one loses nothing. Returns that
        folder.

        But for `logs/`: a launcher is writing there already.
        """
        stays = (".lock", _LAUNCH, "logs")
        present = [p for p in self.path.iterdir() if p.name not in stays and not p.name.startswith("old-")]
        present = [p for p in present if p in only or not only]
        if not present:
            return None
        numbers = [int(p.name[4:]) for p in self.path.glob("old-*") if re.fullmatch("[0-9]{1,9}", p.name[4:])]
        aside = self.path / f"old-{max(numbers, default=0) + 1}"
        aside.mkdir()
        for path in present:
            path.rename(aside / path.name)
        logging.info("the earlier run was moved to %s", aside)
        return aside
