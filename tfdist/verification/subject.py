"""What is verified, and on what: a model, its optimizer, loss and data, made by functions that every process can import."""

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tfdist.errors import UserError

STRATEGIES = ("one_device", "mirrored:2", "multi_worker:2x1")
NUM_STEPS = 20
DTYPES = ("float64", "float32", "mixed_bfloat16", "mixed_float16", "own")
_NAME = re.compile(r"one_device|mirrored:[1-9]\d*|multi_worker:([2-9]|[1-9]\d+)x[1-9]\d*")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The pieces of a run, as `tfdist.Trainer` takes them. The first two are called under the strategy's scope."""

    model_fn: Callable
    optimizer_fn: Callable | None  # (model) -> optimizer; None: AdamW
    loss: Any  # None: the squared difference
    dataset_fn: Callable | None  # None: random numbers in the shapes of the model's inputs and outputs
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the Trainer


def check(strategies: Iterable[str], dtype: str) -> list[str]:
    """The strategies, one device first. Raises `UserError`."""
    for name in strategies:
        if not _NAME.fullmatch(name):
            raise UserError(f"strategies: expected one_device, mirrored:2, multi_worker:2x1 and the like, found {name!r}")
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    return list(dict.fromkeys(["one_device", *strategies]))


# whether this process runs for `verify`: it must not verify again
inside_verification = False


def name_of(function: Callable | str | Mapping, what: str) -> str | dict[str, str]:
    """`module:name`, under which another process finds it; of a dict (of losses) each. Raises `UserError` where none can."""
    if isinstance(function, Mapping):
        return {name: name_of(one, f"{what}[{name!r}]") for name, one in function.items()}
    if isinstance(function, str):
        found = load(function, what)
        known = callable(found) or (what == "loss" and isinstance(found, Mapping))
        return function if known else _refuse(what, f"{function}, which cannot be called", "name a function")
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module == "__main__":
        main = sys.modules["__main__"]
        file = getattr(main, "__file__", None)
        if file is None or not Path(file).exists():
            _refuse(
                what, f"{name or function}, defined in a notebook or an interactive session",
                "write it into a file (%%writefile my_model.py in a notebook) and import it from there",
            )  # fmt: skip
        spec = getattr(main, "__spec__", None)  # of python -m package.module
        module = spec.name if spec else Path(file).stem
    if not module or not name or "<" in name:
        _refuse(what, name or repr(function), "define it at the top level of a module")
    return f"{module}:{name}"


def load(name: str, what: str = "function") -> Any:
    """The object that `module:name` names. Raises `UserError`."""
    module, colon, attribute = name.partition(":")
    if not colon:
        _refuse(what, repr(name), "write it as module:name")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what}: expected an importable function or 'module:name', found {name!r} ({error})") from error
    return found


def _refuse(what: str, found: str, hint: str):
    raise UserError(f"{what}: expected an importable function or 'module:name', found {found}; {hint}")
