"""How a mistake on the command line is answered: one line, the nearest names, exit code 2."""

import contextlib
import difflib
import sys
from collections.abc import Collection, Iterator

from absl import logging

from tfdist import errors
from tfdist.cluster import ports


def near(name: str, known: Collection[str]) -> str:
    """The nearest names; a key of another section with the same last part counts as near."""
    last = name.rpartition(".")[2]
    names = [k for k in known if k.rpartition(".")[2] == last] + difflib.get_close_matches(name, known, n=3)
    if not names:
        parts = {k.rpartition(".")[2]: k for k in known}
        names = [parts[part] for part in difflib.get_close_matches(last, parts, n=1)]
    return f"; did you mean {', '.join(dict.fromkeys(names))}?" if names else ""


class OneLine(logging.PythonFormatter):
    """How this program's warnings look."""

    def format(self, record) -> str:
        return f"tfdist: {record.levelname.lower()}: {errors.printable(record.getMessage())}"


def fail(message: str, code: int = errors.USAGE) -> None:
    print(f"tfdist: {errors.one_line(message)}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Around a command: what a user can act on ends the process with one line and its exit code."""
    try:
        yield
    except errors.Failure as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        if not ports.is_out_of_descriptors(error):
            raise
        fail(ports.out_of_descriptors())
