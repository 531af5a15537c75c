"""Programs in process groups of their own, with a hard limit that kills the whole group."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

LIMIT_S = 240
_started: list[subprocess.Popen] = []


def start(arguments: Sequence[str], env: dict[str, str] | None = None) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, **(env or {})},
    )  # fmt: skip
    _started.append(process)
    return process


def kill_what_is_left() -> None:
    """Of a test that failed half-way: the groups of its processes. What a launcher started goes with the launcher."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(process: subprocess.Popen, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess:
    """Waits for the end; past the limit the group is killed and the test fails."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"killed after {limit_s} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(arguments: Sequence[str], env: dict[str, str] | None = None, limit_s: float = LIMIT_S):
    return finish(start(arguments, env), limit_s)


def tfdist(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return run(["-m", "tfdist.cli", *arguments], env)


def measured(name: str, seconds: float, at_most: float) -> None:
    """Asserts a promised time, and prints it (`pytest -s` shows the lines; docs/benchmarks.md has them)."""
    print(f"\nmeasured: {name}: {seconds:.2f} s (at most {at_most:g})")
    assert seconds <= at_most, f"{name}: {seconds:.2f} s, expected at most {at_most:g}"
