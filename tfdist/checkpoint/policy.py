"""Which checkpoints to keep."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tfdist.checkpoint import store


def to_delete(
    steps: list[int], is_good: Callable[[int], bool], saved: int, keep_last: int, keep_every_steps: int
) -> list[int]:  # fmt: skip
    """What is older than the newest `keep_last` good ones, but for `saved` and, when `keep_every_steps` is not 0, those at
    its multiples. A damaged one takes no good one's place."""
    newest_first, num_good = sorted(steps, reverse=True), 0
    for i, step in enumerate(newest_first):
        num_good += is_good(step)
        if num_good == keep_last:
            old = sorted(newest_first[i + 1 :])
            return [one for one in old if one != saved and not is_promised(one, keep_every_steps)]
    return []


def is_promised(step: int, keep_every_steps: int) -> bool:
    return bool(keep_every_steps) and step % keep_every_steps == 0


def prune(folder: Path, saved: int, keep_last: int, keep_every_steps: int) -> None:
    """After step `saved` was."""

    def is_good(step: int) -> bool:
        return store.is_good(folder / store.folder_name(step))

    for step in to_delete(store.steps(folder), is_good, saved, keep_last, keep_every_steps):
        shutil.rmtree(folder / store.folder_name(step), ignore_errors=True)
