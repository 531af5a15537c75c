"""Starting this Python again. `python -m` and `python -c` import from the current folder first, where a `random.py` of the
user's may lie; what tfdist starts for itself never does. Programs of the user's are started as they are."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

_FORGET_THE_FOLDER = "import sys\nif sys.path[:1] == ['']: del sys.path[0]\n"
_RUN_MODULE = "import runpy\nrunpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


def module(name: str, version: Sequence[int] = sys.version_info) -> list[str]:
    """The command that runs a module, as `python -m` does."""
    if tuple(version) >= (3, 11):
        return [sys.executable, "-P", "-m", name]
    return code(_RUN_MODULE.format(name=name))


@contextlib.contextmanager
def imports_nothing_from_here() -> Iterator[None]:
    """Inside, processes that `multiprocessing` starts do not import from the current folder either. Python 3.11 and later:
    an older one has no way to say it."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def code(text: str) -> list[str]:
    """The command that runs Python code, as `python -c` does."""
    return [sys.executable, "-c", _FORGET_THE_FOLDER + text]
