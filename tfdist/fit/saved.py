"""What a checkpoint of `fit` says besides its arrays: where the `fit` was, and what callbacks had counted. It may come from
elsewhere, so it is checked before anything is set."""

from typing import Any

import keras

from tfdist import files
from tfdist.checkpoint import store
from tfdist.errors import CheckpointError, one_line
from tfdist.patches.fit import names_of_counters

_BEST = "best_weights"


def facts_of(found: store.Checkpoint) -> dict[str, Any]:
    """Raises `CheckpointError` for a checkpoint of another kind, or one that contradicts itself."""
    facts = found.manifest.get("fit")
    if facts is None:
        raise CheckpointError(f"checkpoint: expected one of tfdist.fit.Checkpoint, found another: {found.path}")
    problem = _problem(facts, found)
    if problem:
        raise CheckpointError(f"checkpoint: {found.path} is damaged: {problem} of `fit` is not what it was saved as")
    return facts


def _problem(facts: Any, found: store.Checkpoint) -> str:
    """The name of what is wrong; "" if nothing is."""
    if not isinstance(facts, dict):
        return "all"
    for name in ("step", "epoch", "batch", "initial_epoch", "steps_per_execution"):
        if not files.is_count(facts.get(name)):
            return name
    if facts["step"] != found.step:
        return "step"
    if type(facts.get("stopped")) is not bool:
        return "stopped"
    history = facts.get("history")
    if not isinstance(history, dict) or not all(isinstance(values, list) for values in history.values()):
        return "history"
    done, logged = facts["epoch"] - facts["initial_epoch"], max(map(len, history.values()), default=facts["step"])
    if not 0 <= done <= min(logged, facts["step"]):
        return "epoch"
    return "" if _are_counters(facts.get("callbacks"), found) else "callbacks"


def _are_counters(callbacks: Any, found: store.Checkpoint) -> bool:
    num_weights = 0
    for one in callbacks if isinstance(callbacks, list) else [None]:
        if not (isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], dict)):
            return False
        for name, value in one[1].items():
            if isinstance(value, dict) and name == _BEST and files.is_count(value.get("weights")):
                num_weights += value["weights"]
            elif not (value is None or (isinstance(value, (bool, int, float)) and name != _BEST)):
                return False
    return num_weights == sum(key.startswith(f"{_BEST}/") for key in found.manifest["arrays"])


def set_counters(callback: keras.callbacks.Callback, counted: dict[str, Any], origin: str) -> None:
    """Those that `fit` keeps of such a callback; nothing else that a checkpoint names is set."""
    for name in names_of_counters(callback):
        if name in counted:
            if not _fits(counted[name], vars(callback).get(name)):
                shown = f"{type(callback).__name__}.{name}={one_line(repr(counted[name]), 60)}"
                raise CheckpointError(f"checkpoint: {origin} is damaged: it has {shown}")
            setattr(callback, name, counted[name])


def _fits(value: Any, now: Any) -> bool:
    """Whether a counter that is `now` at the beginning may have this value."""
    if isinstance(now, bool) or isinstance(value, bool):
        return type(value) is type(now)
    return value is not None or not isinstance(now, int)
