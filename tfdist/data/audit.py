"""Which worker reads what, found by running every worker's real input pipeline here, one after the other; no cluster."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tfdist.config import Config, worker_weights
from tfdist.data.input import Reader, phases, train_dataset_fn
from tfdist.data.samples import Samples
from tfdist.data.shards import Split, TokenDataset
from tfdist.strategies.base import DatasetFn, InputContext

_SHOWN = 12  # documents of a worker in the text


@dataclasses.dataclass(frozen=True)
class Reads:
    """What one worker read, by row: the step, its first token in the corpus (-1: none), the number of its targets."""

    step: np.ndarray
    place: np.ndarray
    targets: np.ndarray
    tokens_differ: int  # rows whose tokens are not those of the shards


@dataclasses.dataclass(frozen=True)
class Worker:
    rows: int
    targets: int
    padding: float  # share of the places of its rows that are no targets
    documents: list[int]  # by number, in the corpus' order


@dataclasses.dataclass(frozen=True)
class Report:
    workers: list[Worker]
    steps: int
    num_documents: int
    duplicates: int  # readings of a sample before its turn comes again
    gaps: int  # samples whose turn had come and that nobody read
    violations: list[str]

    @property
    def exit_code(self) -> int:
        return 7 if self.violations else 0

    def as_dict(self) -> dict:
        return dataclasses.asdict(self) | {"exit_code": self.exit_code}

    def __str__(self) -> str:
        total = max(1, sum(worker.targets for worker in self.workers))
        lines = [f"{self.steps} steps, {len(self.workers)} workers, {self.num_documents} documents",
                 "worker  rows      tokens        share    padding  documents"]  # fmt: skip
        for i, worker in enumerate(self.workers):
            shown = ", ".join(map(str, worker.documents[:_SHOWN])) + (", ..." if len(worker.documents) > _SHOWN else "")
            share, documents = f"{worker.targets / total:.2%}", f"{len(worker.documents)}: {shown}"
            lines.append(f"{i:<7} {worker.rows:<9} {worker.targets:<13} {share:<8} {f'{worker.padding:.2%}':<8} {documents}")
        lines.append(f"duplicates: {self.duplicates}, gaps: {self.gaps}")
        return "\n".join([*lines, *(f"VIOLATION: {text}" for text in self.violations)])


MakeDatasetFn = Callable[[int], DatasetFn]  # phase -> the dataset_fn of training, with places


def audit(
    dataset: TokenDataset, config: Config, workers: int, steps: int, make: MakeDatasetFn | None = None
) -> Report:  # fmt: skip
    """Reads the first `steps` steps as each of so many workers, and as one alone.

    A violation is a row that is not what the shards hold; with `data.sharding=batch` a global batch that is not that of one
    worker; a sample that two workers read, that comes again before its turn, or that nobody read when its turn had come; a
    worker that reads nothing.
    """
    make = make or (lambda phase: train_dataset_fn(dataset, config, phase, with_places=True))
    contexts = [(worker, workers) for worker in range(workers)]
    split = dataset.splits["train"]
    reads = [_read(make, config, *context, steps, split) for context in contexts]
    policy, violations = config.data.sharding, []
    for i, found in enumerate(reads):
        if found.tokens_differ:
            violations.append(f"worker {i}: {found.tokens_differ} rows are not what the shards hold")
        if not found.targets.sum():
            violations.append(f"worker {i} reads nothing (data.sharding={policy})")
    if policy == "batch":
        alone = _read(make, config, 0, 1, steps, split)
        together = _joined(reads)
        wrong = [s for s in range(steps) if not np.array_equal(_of_step(together, s), _of_step(alone, s))]
        if wrong:
            violations.append(f"the global batch of step {wrong[0]} is not that of one worker ({len(wrong)} such steps)")
    padded = config.data.packing == "padded"
    whole = [Samples(part.splits["train"], config.data.sequence_length, padded).number for _, part in dataset.parts()]
    numbers = [whole] * workers
    groups = {"batch": [_joined(reads)], "replicate": reads[:1]}.get(policy, reads)
    duplicates = gaps = 0
    if policy in ("file", "hash", "random"):
        numbers = [Reader(dataset, config, InputContext(*context)).own_samples() for context in contexts]
        if policy != "file":  # the ends of files are cut off
            gaps += sum(whole) - sum(map(sum, numbers))
    for found, number in zip(groups, numbers, strict=False):
        more, fewer = _turns(dataset, number, found)
        duplicates, gaps = duplicates + more, gaps + fewer
    if policy == "replicate" and any(not np.array_equal(found.place, reads[0].place) for found in reads):
        violations.append("the workers do not read the same samples (data.sharding=replicate)")
    if policy in ("file", "hash", "random"):
        owners = [set(found.place[found.targets > 0].tolist()) for found in reads]
        shared = sum(map(len, owners)) - len(set().union(*owners))
        duplicates += shared
        if shared:
            violations.append(f"{shared} samples are read by more than one worker")
    if duplicates and not any("more than one worker" in text for text in violations):
        violations.append(f"{duplicates} readings of a sample before its turn comes again")
    if gaps:
        violations.append(f"{gaps} samples whose turn had come were read by nobody")
    starts = split.starts_and_keys()[:, 0]
    return Report([_worker(found, starts, config) for found in reads], steps, len(starts), duplicates, gaps, violations)


def _read(
    make: MakeDatasetFn, config: Config, worker: int, workers: int, steps: int, split: Split
) -> Reads:  # fmt: skip
    devices = max(1, config.strategy.num_devices)
    found, differ, length = [], 0, config.data.sequence_length
    bounds, ends = phases(config), np.cumsum([shard.tokens for shard in split.shards])
    for i, phase in enumerate(bounds):
        last = min(steps, bounds[i + 1].step if i + 1 < len(bounds) else steps)
        if last <= phase.step:
            continue
        context = InputContext(worker, workers, workers * devices, phase.step, weights=_weights(config, workers))
        rows = make(i)(context).take(last - phase.step)
        for step, (inputs, labels, *weight, place) in enumerate(rows.as_numpy_iterator(), phase.step):
            targets = weight[0] > 0 if weight else np.ones(labels.shape, bool)
            found.append((np.full(len(place), step), place, targets.sum(1)))
            where = place[:, None] + np.arange(length + 1)
            expected = _tokens_at(split, np.clip(where, 0, split.tokens - 1))
            wrong = (expected[:, :-1] != inputs) | (expected[:, 1:] != labels)
            if config.data.sharding == "file":  # behind the end of a worker's file comes its next one
                wrong &= where[:, 1:] < ends[np.searchsorted(ends, place, side="right")][:, None]
            differ += int((wrong & targets).any(1).sum())
    columns = [np.concatenate(column) if found else np.zeros(0, np.int64) for column in zip(*found, strict=True)]
    return Reads(*(columns or [np.zeros(0, np.int64)] * 3), differ)


def _tokens_at(split: Split, places: np.ndarray) -> np.ndarray:
    found, before = np.zeros(places.shape, np.int64), 0
    for shard in split.shards:
        mine = (places >= before) & (places < before + shard.tokens)
        if mine.any():
            found[mine] = shard.read()[places[mine] - before]
        before += shard.tokens
    return found


def _weights(config: Config, workers: int) -> tuple[float, ...]:
    return worker_weights(config) if workers > 1 else ()


def _joined(reads: list[Reads]) -> Reads:
    columns = [np.concatenate([getattr(r, name) for r in reads]) for name in ("step", "place", "targets")]
    return Reads(*columns, 0)


def _of_step(reads: Reads, step: int) -> np.ndarray:
    """Which samples, and how many targets of each, whoever reads them."""
    mine = reads.step == step
    return np.sort(reads.place[mine] * (1 << 20) + reads.targets[mine])


def _turns(dataset: TokenDataset, numbers: list[int], reads: Reads) -> tuple[int, int]:
    """(readings too many, readings that are missing): after n readings of N samples each was read n / N times, rounded
    down or up. Of a mixture for each of its datasets."""
    duplicates = gaps = before = 0
    for (_, part), number in zip(dataset.parts(), numbers, strict=True):
        split = part.splits["train"]
        mine = (reads.place >= before) & (reads.place < before + split.tokens) & (reads.targets > 0)
        places, times = np.unique(reads.place[mine], return_counts=True)
        if number:
            duplicates += int(np.maximum(times - math.ceil(mine.sum() / number), 0).sum())
            at_least = mine.sum() // number
            gaps += int(np.maximum(at_least - times, 0).sum() + at_least * (number - len(places)))
        before += split.tokens
    return duplicates, gaps


def _worker(reads: Reads, starts: np.ndarray, config: Config) -> Worker:
    real, length = reads.targets > 0, config.data.sequence_length
    first = np.searchsorted(starts, reads.place[real], side="right") - 1
    last = np.searchsorted(starts, reads.place[real] + reads.targets[real] - 1, side="right") - 1
    documents = sorted({int(d) for a, b in zip(first, last, strict=True) for d in range(max(a, 0), b + 1)})
    places = max(1, len(reads.place) * length)
    return Worker(int(real.sum()), int(reads.targets.sum()), float(1 - reads.targets.sum() / places), documents)
