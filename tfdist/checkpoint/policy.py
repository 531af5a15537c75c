"""Which checkpoints to keep."""

import shutil
from pathlib import Path

from tfdist.checkpoint import store


def to_delete(steps: list[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """All but the newest `keep_last` and, when `keep_every_steps` is not 0, those at its multiples."""
    old = sorted(steps)[:-keep_last]
    return [step for step in old if not (keep_every_steps and step % keep_every_steps == 0)]


def prune(folder: Path, keep_last: int, keep_every_steps: int) -> None:
    for step in to_delete(store.steps(folder), keep_last, keep_every_steps):
        shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
