"""Failures with an exit code. A user's mistake is a `ValueError` whose one line says what was expected, what was found
and how to fix it; the command line prints that line and nothing else."""

import sys

DONE, INTERNAL, USAGE, DATA, CHECKPOINT, NOT_FINITE, IN_USE, CHECK_FAILED = range(8)
# 128 and above: starting again may help
PEER_LOST, WATCHDOG, STOPPED = 140, 142, 143


def one_line(text: object, at_most: int = 480) -> str:
    """What files and strangers say, as a part of a message: printable, in one line, without the middle of a long one. With a
    word in front it has less than 500 characters."""
    line = " ".join(_short(str(text), 2 * at_most).split())
    return _short(printable(line), at_most)


def printable(text: str) -> str:
    """The text for a terminal, with control characters spelt out, but line ends and tabs: what comes from files and other
    processes must not move a cursor, or rename a window."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _short(text: str, at_most: int) -> str:
    if len(text) <= at_most:
        return text
    end = at_most // 3
    return f"{text[: at_most - end - 5]} ... {text[-end:]}"


class Failure(Exception):
    """Anything that ends a run for a reason that a user can act on."""

    exit_code = INTERNAL

    def __str__(self) -> str:
        """Names in it may come from a file or a peer, and the text goes to a terminal."""
        return printable(super().__str__())


class UserError(Failure, ValueError):
    """Usage, config, or an argument of the Python interface."""

    exit_code = USAGE


class DataError(UserError):
    exit_code = DATA


class CheckpointError(UserError):
    exit_code = CHECKPOINT


class NotFiniteError(Failure, ArithmeticError):
    """The loss or the gradients were not finite for too many steps in a row."""

    exit_code = NOT_FINITE


class WorkdirInUse(UserError):
    exit_code = IN_USE


class PeerLost(Failure, ConnectionError):
    """Another process of the cluster died, or never came."""

    exit_code = PEER_LOST


class Stopped(SystemExit):
    """Told to stop by SIGTERM or Ctrl-C, and saved (143), or the save failed (4)."""

    def __init__(self, code: int = STOPPED):
        super().__init__(code)


def exit_with_codes() -> None:
    """From now on a `Failure` that nobody catches ends this process with its exit code, behind Python's traceback. Python's
    own code, 1, would say that it was a bug."""
    if not isinstance(sys.excepthook, _ExitWithCode):
        sys.excepthook = _ExitWithCode(sys.excepthook)


class _ExitWithCode:
    def __init__(self, show):
        self._show = show

    def __call__(self, kind, error, trace) -> None:
        self._show(kind, error, trace)
        interactive = hasattr(sys, "ps1") or sys.flags.interactive  # there the session goes on
        if isinstance(error, Failure) and not interactive:
            raise SystemExit(error.exit_code)
