"""`tfdist verify` and `tfdist.verify`: the same training on several strategies, here and now, compared step by step."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfdist import programs
from tfdist.errors import CHECK_FAILED, DONE, Failure, UserError
from tfdist.verification import compare, subject
from tfdist.verification.subject import NUM_STEPS, STRATEGIES, check, name_of

_LIMIT_S = 3600.0


@dataclasses.dataclass(frozen=True)
class Result:
    """One strategy against one device."""

    strategy: str
    num_replicas: int
    loss: float  # the largest difference of a loss, relative to max(loss, 1)
    variables: float  # the largest difference of a variable, relative to its largest entry
    difference: compare.Difference | None  # the first one beyond the tolerance
    causes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return self.difference is None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.strategy}: equal"
        causes = "; ".join(self.causes) or "unknown: the difference stays whatever feature is left out"
        return f"{self.strategy}: {self.difference}. Likely cause: {causes}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found. `print(report)` shows the table."""

    results: tuple[Result, ...]
    num_steps: int
    tolerances: tuple[float, float]
    left_out: tuple[str, ...]  # variables whose true gradient is zero
    switched_off: tuple[str, ...]  # stock Keras layers with randomness of their own

    @property
    def equal(self) -> bool:
        return all(result.equal for result in self.results)

    @property
    def exit_code(self) -> int:
        return DONE if self.equal else CHECK_FAILED

    def __str__(self) -> str:
        rows = [("strategy", "replicas", "loss", "variables", "")]
        rows += [
            (r.strategy, str(r.num_replicas), f"{r.loss:.1e}", f"{r.variables:.1e}", "equal" if r.equal else "DIFFERS")
            for r in self.results
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"largest difference to one_device in {self.num_steps} steps; at most {self.tolerances[0]:g} (loss) and "
            f"{self.tolerances[1]:g} (variables, of their largest entry)"
        )
        if self.left_out:
            lines.append(f"left out, their true gradient is zero and what is there is rounding: {', '.join(self.left_out)}")
        if self.switched_off:
            lines.append(
                "switched off, stock Keras layers whose random numbers differ between replicas by design: "
                + ", ".join(self.switched_off)
            )
        return "\n".join([*lines, *(str(result) for result in self.results if not result.equal)])


def verify(
    model_fn: Callable | str, dataset_fn: Callable | str | None = None, loss: Any = None, *,
    optimizer_fn: Callable | str | None = None, strategies: Sequence[str] = STRATEGIES, num_steps: int = NUM_STEPS,
    dtype: str = "float64", **options: Any,
) -> Report:  # fmt: skip
    """Trains the model on each strategy in processes of their own on this machine, and compares every step with one device.

    Args:
        model_fn: () -> a Keras model. This and the other functions must be importable by other processes: functions of a
            module, or "module:name". In a script, call `verify` under `if __name__ == "__main__":`.
        dataset_fn: as for `Trainer.train`; default: random numbers in the shapes of the model's inputs and outputs, with
            weights and uneven batches.
        loss: as for `Trainer`; default: the squared difference.
        optimizer_fn: (model) -> optimizer; default: AdamW.
        strategies: "one_device" (always there: the oracle), "mirrored:REPLICAS", "multi_worker:WORKERSxREPLICAS".
        dtype: what Keras layers without a dtype of their own compute with. In float64 no mistake hides under rounding.
            "own" leaves the default.
        options: of `Trainer`: clip_norm, accumulate_steps, seed, jit_compile (here "off", if not given).

    Returns a `Report`; `report.equal` says whether all agree. Raises `UserError` for functions that other processes cannot
    import, and `Failure` when a run fails.
    """
    functions = {"model_fn": model_fn, "dataset_fn": dataset_fn, "loss": loss, "optimizer_fn": optimizer_fn}
    allowed = {"clip_norm", "accumulate_steps", "seed", "jit_compile"}
    if set(options) - allowed:
        raise UserError(f"verify: expected options of {sorted(allowed)}, found {sorted(set(options) - allowed)}")
    if num_steps < 1:
        raise UserError(f"num_steps: expected at least 1, found {num_steps}")
    named = {what: name_of(function, what) for what, function in functions.items() if function is not None}
    spec = {"functions": named, "options": {"jit_compile": "off"} | options, "num_steps": num_steps, "dtype": dtype}
    return _run(spec, strategies, tell=lambda line: None)


def verify_subject(
    subject_fn: str, argument: str, *, strategies: Sequence[str], num_steps: int, dtype: str, tell: Callable[[str], None]
) -> Report:  # fmt: skip
    """`subject_fn` names a function ("module:name") that makes a `Subject` of the `argument`. `tell` gets progress."""
    spec = {"subject": subject_fn, "argument": argument, "num_steps": num_steps, "dtype": dtype}
    return _run(spec, strategies, tell)


def _run(spec: dict, strategies: Sequence[str], tell: Callable[[str], None]) -> Report:
    strategies = check(strategies, spec["dtype"])
    if subject.inside_verification:
        raise UserError('verify: called while it imports the program again; call it under `if __name__ == "__main__":`')
    spec = spec | {"sys_path": [path or os.getcwd() for path in sys.path]}
    results, oracle = [], None
    for strategy in strategies:
        tell(f"{strategy}: {spec['num_steps']} steps")
        (found,) = _record(spec, strategy, [[]])
        oracle = oracle or found
        tolerances = compare.tolerances(oracle)
        difference = compare.first_difference(oracle, found, tolerances)
        causes = _causes(spec, strategy, oracle, found, difference, tolerances, tell) if difference else ()
        largest = compare.largest_differences(oracle, found)
        results.append(Result(strategy, compare.replicas_of(strategy), *largest, difference, causes))
    return Report(tuple(results), spec["num_steps"], tolerances, oracle.noise, oracle.own_randomness)


def _causes(spec, strategy, oracle, found, difference, tolerances, tell) -> tuple[str, ...]:
    """The features without which the difference is gone, unless the recordings themselves say more."""
    if cause := compare.cause_without_trying(oracle, found, difference):
        return (cause,)
    features = compare.suspects(oracle, difference)
    if not features:
        return ()
    tell(f"{strategy}: differs {difference}; trying without {', '.join(features)}")
    spec, experiments = spec | {"num_steps": max(difference.step, 1)}, [[feature] for feature in features]
    at_once = 1 if shutil.which("nvidia-smi") else 2  # a GPU is one process' own
    spec["num_replicas"] = compare.replicas_of(strategy)
    try:
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            recorded = pool.map(lambda name: _record(spec, name, experiments), ("one_device", strategy))
            pairs = list(zip(*recorded, strict=True))
    except (Failure, subprocess.TimeoutExpired) as error:  # the difference itself is found all the same
        return (f"unknown: trying without {', '.join(features)} failed ({' '.join(str(error).split())[:200]})",)
    agree = [
        feature
        for feature, (expected, actual) in zip(features, pairs, strict=True)
        if compare.first_difference(expected, actual, tolerances) is None
    ]
    return tuple(compare.CAUSES[feature] for feature in agree)


def _record(spec: Mapping[str, Any], strategy: str, experiments: list[list[str]]) -> list[compare.Recording]:
    """Runs the strategy's processes to their end."""
    with tempfile.TemporaryDirectory(prefix="tfdist-verify-") as folder:
        (Path(folder) / "spec.json").write_text(json.dumps({**spec, "experiments": experiments}))
        program = [*programs.module("tfdist.verification.record"), f"{folder}/spec.json", strategy, folder]
        kind, _, shape = strategy.partition(":")
        if kind == "multi_worker":
            launch = ["launch", f"--workers={shape.partition('x')[0]}", f"--log_dir={folder}"]
            program = [*programs.module("tfdist.cli"), *launch, "--", *program]
        _finish(program, strategy)
        return [compare.read(Path(folder), number) for number in range(len(experiments))]


def _finish(program: list[str], strategy: str) -> None:
    """Raises what the process failed of."""
    process = subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=_LIMIT_S)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        own = [line.partition("tfdist: ")[2] for line in output.splitlines() if "tfdist: " in line]
        error = Failure(f"{strategy}: " + (own[0] if own else f"exit code {process.returncode}:\n{output[-3000:]}"))
        error.exit_code = process.returncode if process.returncode > 0 else 128 - process.returncode
        raise error
