"""Two recordings of the same training: where they part, by how much, and the likely cause. NumPy only."""

import dataclasses
import re
from pathlib import Path

import numpy as np

# What counts as equal: (loss, variables); variables relative to max(largest entry, _SMALLEST_SCALE)
_TOLERANCES = {"16": (3e-2, 3e-2), "float32": (1e-6, 2e-5), "float64": (1e-9, 1e-9)}
_SMALLEST_SCALE = 1e-3
_SEEDS = "seed/"
_OUTPUTS = ("loss", "grad_norm", "tokens", "evaluation")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first place where a run is not the oracle's."""

    step: int  # 0: before training
    tensor: str
    replica: int  # -1: it is a number of the whole step
    amount: float  # relative to the tensor's largest entry
    found: float = 0.0  # of a number of the whole step
    expected: float = 0.0

    def __str__(self) -> str:
        where = "before training" if self.step == 0 else f"at step {self.step}"
        if self.tensor.startswith(_SEEDS):
            return f"{where}: replica {self.replica} has the seed of another one in a stock Keras random layer"
        if self.replica < 0:
            return f"{where}: {self.tensor} is {self.found:.9g}, expected {self.expected:.9g}"
        return f"{where}: {self.tensor} on replica {self.replica} differs by {self.amount:.3g} of its largest entry"


@dataclasses.dataclass(frozen=True)
class Recording:
    """One strategy's run, of all its workers."""

    values: dict[str, np.ndarray]  # [steps + 1, replicas, entries]
    outputs: dict[str, np.ndarray]  # [steps + 1]
    rows: list[list[int]]  # [step]: sorted hashes of the rows of the global batch
    in_use: tuple[str, ...]  # features whose absence can be tried
    own_randomness: tuple[str, ...]  # stock random layers, switched off
    noise: tuple[str, ...]  # variables whose true gradient is zero
    dtypes: tuple[str, ...] = ("float64",)  # that layers compute with

    @property
    def num_replicas(self) -> int:
        return next(iter(self.values.values())).shape[1]


def read(folder: Path, experiment: int) -> Recording:
    """Puts the workers' files of one experiment together."""
    workers = []
    for path in sorted(folder.glob(f"{experiment}.*.npz"), key=lambda path: int(path.name.split(".")[1])):
        with np.load(path) as arrays:
            workers.append(dict(arrays))
    first = workers[0]
    num_steps = sum(1 for name in first if name.startswith("rows/"))
    return Recording(
        values={
            name.removeprefix("value/"): np.concatenate([worker[name] for worker in workers], axis=1)
            for name in first
            if name.startswith("value/")
        },
        outputs={name.removeprefix("output/"): first[name] for name in first if name.startswith("output/")},
        rows=[sorted(np.concatenate([worker[f"rows/{i}"] for worker in workers]).tolist()) for i in range(num_steps)],
        in_use=tuple(first["in_use"].tolist()),
        own_randomness=tuple(first["own_randomness"].tolist()),
        noise=tuple(first["noise"].tolist()) if "noise" in first else (),
        dtypes=tuple(first["dtypes"].tolist()),
    )


def tolerances(recording: Recording) -> tuple[float, float]:
    """Of the least precise of the types that its layers compute with."""
    known = (found for kind, found in _TOLERANCES.items() if any(kind in dtype for dtype in recording.dtypes))
    return next(known, _TOLERANCES["float32"])


def largest_differences(oracle: Recording, found: Recording) -> tuple[float, float]:
    """(of the losses, of the variables) over all steps, in the units of the tolerances."""
    loss = max((_of_outputs(oracle, found, "loss", step) for step in range(1, _steps(oracle, found))), default=0.0)
    values = [
        _of_values(oracle, found, name, step)[0] for name in _compared(oracle) for step in range(_steps(oracle, found))
    ]
    return loss, max(values, default=0.0)


def first_difference(oracle: Recording, found: Recording, tolerances: tuple[float, float]) -> Difference | None:
    """In the order in which a step computes: its loss, its gradients' norm, then the variables; None: they are equal."""
    for step in range(_steps(oracle, found)):
        for name in _OUTPUTS:
            amount = _of_outputs(oracle, found, name, step)
            if not amount <= tolerances[0]:
                return Difference(step, name, -1, amount, *(float(r.outputs[name][step]) for r in (found, oracle)))
        amounts = [(*_of_values(oracle, found, name, step), name) for name in _compared(oracle)]
        beyond = [one for one in amounts if not one[0] <= tolerances[1]]
        if beyond:
            amount, replica, name = next((one for one in beyond if one[2].startswith("model/")), beyond[0])
            return Difference(step, name, replica, amount)
        for name in [name for name in found.values if name.startswith(_SEEDS) and step]:
            seeds = [tuple(copy) for copy in found.values[name][step]]
            if len(set(seeds)) < len(seeds):  # by design they differ, as from those of one device
                return Difference(step, name, next(i for i, seed in enumerate(seeds) if seed in seeds[:i]), 0.0)
    return None


def cause_without_trying(oracle: Recording, found: Recording, difference: Difference) -> str:
    """What the recordings alone show; "" where features have to be left out to see."""
    for step, (expected, rows) in enumerate(zip(oracle.rows, found.rows, strict=False), 1):
        if expected != rows and step <= max(difference.step, 1):
            return f"data: the batch of step {step} does not have the rows of one device (dataset_fn, sharding)"
    if difference.step == 0:
        return "seed: the initial values differ"
    if difference.tensor.startswith(_SEEDS):
        return "seed: replicas draw the same random numbers in the stock Keras random layers"
    if difference.tensor == "grad_norm" and difference.expected:
        ratio, replicas = difference.found / difference.expected, found.num_replicas
        if abs(ratio - replicas) < 1e-6:
            return f"gradients count {replicas} times, once for each replica (reduced twice)"
        if abs(ratio - 1 / replicas) < 1e-6:
            return f"gradients are divided by {replicas}, the number of replicas (averaged, where the sum is right)"
    return ""


CAUSES = {
    "clipping": "clipping order: without clipping the runs agree; it must come after the sum over the replicas",
    "dropout": "seed of dropout: without it the runs agree; masks must follow the global sample index",
    "accumulation": "accumulation: with one micro-batch a step the runs agree; every micro-batch's gradient must count once",
    "weights": "weighting: with even weights and batches the runs agree; the mean of replicas' means is not the global mean",
    "batch normalisation": "statistics: without batch normalisation the runs agree; its statistics must be of all replicas",
    "EMA": "moving average: without EMA the runs agree; it must be updated on every replica at every update",
}


def suspects(oracle: Recording, difference: Difference) -> list[str]:
    """The features in use that can be the cause of a first difference there: a step computes its loss, then the gradients,
    then the update."""
    if difference.tensor == "loss":
        possible = {"dropout", "accumulation", "weights", "batch normalisation"}
    elif "moving_average" in difference.tensor:
        possible = {"EMA"}
    elif difference.tensor == "evaluation":
        possible = {"EMA", "weights", "batch normalisation"}
    else:
        possible = set(CAUSES) - ({"EMA"} if difference.replica < 0 else set())
    return [feature for feature in oracle.in_use if feature in possible]


def _compared(oracle: Recording) -> list[str]:
    noise = tuple(f"/{name}" for name in oracle.noise)
    return [name for name in oracle.values if not name.startswith(_SEEDS) and not name.endswith(noise)]


def _steps(oracle: Recording, found: Recording) -> int:
    return min(len(recording.outputs["evaluation"]) for recording in (oracle, found))


def _of_outputs(oracle: Recording, found: Recording, name: str, step: int) -> float:
    expected, actual = (float(recording.outputs[name][step]) for recording in (oracle, found))
    if expected == actual or (np.isnan(expected) and np.isnan(actual)):
        return 0.0
    return abs(actual - expected) / max(abs(expected), 1.0)


def _of_values(oracle: Recording, found: Recording, name: str, step: int) -> tuple[float, int]:
    """The largest difference of a tensor, and the replica that has it."""
    expected, copies = oracle.values[name][step][0], found.values[name][step]
    if not expected.size:
        return 0.0, 0
    with np.errstate(invalid="ignore"):  # infinite in both
        difference = np.abs(copies - expected)
    difference = np.where((copies == expected) | (np.isnan(copies) & np.isnan(expected)), 0.0, difference)
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=_SMALLEST_SCALE)
    amounts = difference.max(axis=1) / scale
    return float(amounts.max()), int(amounts.argmax())


def replicas_of(strategy: str) -> int:
    """Of `one_device`, `mirrored:2`, `multi_worker:2x1`."""
    return int(np.prod([int(number) for number in re.findall(r"\d+", strategy)], initial=1))
