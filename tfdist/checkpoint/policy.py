"""Which checkpoints to keep, also on a disk that is full."""

import dataclasses
import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tfdist import files
from tfdist.checkpoint import store
from tfdist.errors import CheckpointError, UserError

_MANIFEST_BYTES = 4096  # and this much for each array


@dataclasses.dataclass(frozen=True)
class Keep:
    """The newest `last` that verify, and those at the multiples of `every_steps` when that is not 0."""

    last: int = 3
    every_steps: int = 0

    def __post_init__(self):
        if self.last < 1:
            raise UserError(f"keep_last: expected at least 1, found {self.last}")

    def promises(self, step: int) -> bool:
        return bool(self.every_steps) and step % self.every_steps == 0

    def to_delete(self, steps: list[int], is_good: Callable[[int], bool], saved: int) -> list[int]:
        """What is older than the newest `last` good ones, but for `saved` and the promised ones. A damaged one takes no good
        one's place."""
        newest_first, num_good = sorted(steps, reverse=True), 0
        for i, step in enumerate(newest_first):
            num_good += is_good(step)
            if num_good == self.last:
                return [one for one in sorted(newest_first[i + 1 :]) if one != saved and not self.promises(one)]
        return []

    def to_give_up(self, sizes: Mapping[int, int], is_good: Callable[[int], bool], missing: int) -> list[int]:
        """The oldest ones whose sizes make up for the `missing` bytes, but for the newest good one and promised ones. When
        that is not enough, or none is good: nothing."""
        newest_good = next((step for step in sorted(sizes, reverse=True) if is_good(step)), None)
        if newest_good is None:
            return []
        given_up: list[int] = []
        for step in sorted(sizes):
            if missing <= 0:
                break
            if step != newest_good and not self.promises(step):
                given_up.append(step)
                missing -= sizes[step]
        return given_up if missing <= 0 else []


def save(folder: Path, step: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], keep: Keep) -> Path:
    """`store.save`, and deletes what is not to be kept: afterwards, or before where the disk is full."""
    try:
        path = store.save(folder, step, arrays, facts)
    except CheckpointError as error:
        needed = sum(array.nbytes + _MANIFEST_BYTES for array in arrays.values()) + _MANIFEST_BYTES
        if not _made_room(folder, needed, keep, getattr(error.__cause__, "errno", None)):
            raise
        path = store.save(folder, step, arrays, facts)
    for one in keep.to_delete(store.steps(folder), _is_good_in(folder), step):
        files.remove(folder / store.folder_name(one), ignore_errors=True)
    return path


def _made_room(folder: Path, needed: int, keep: Keep, reason: int | None) -> bool:
    """Whether older checkpoints were given up for a save of `needed` bytes that the disk did not take."""
    if reason not in (errno.ENOSPC, errno.EDQUOT):
        return False
    free = shutil.disk_usage(folder).free if reason == errno.ENOSPC else 0  # what is left of a quota is not known
    paths = {step: folder / store.folder_name(step) for step in store.steps(folder)}
    sizes = {step: _size(path) for step, path in paths.items() if store.is_readable(path)}
    given_up = keep.to_give_up(sizes, _is_good_in(folder), needed - free)
    for step in given_up:
        path = folder / store.folder_name(step)
        logging.warning("checkpoint: the disk is full; %s is given up for the next one", path)
        files.remove(path, ignore_errors=True)
    return bool(given_up)


def _is_good_in(folder: Path) -> Callable[[int], bool]:
    return lambda step: store.is_good(folder / store.folder_name(step))


def _size(path: Path) -> int:
    """In bytes; 0 where that cannot be known."""
    try:
        return sum(file.lstat().st_size for file in path.iterdir())
    except OSError:
        return 0
