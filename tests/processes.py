"""Programs in process groups of their own, with a hard limit that kills the whole group.

`start` and `run` start Python anew: for tests of starts, of the launcher, of kills. `fork` and `run_forked` run what is
about something else in a fork of a process that has TensorFlow imported (zygote.py), three seconds earlier.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from zygote import AT_IMPORT

from tfdist.cluster import ports
from tfdist.launch import assign

LIMIT_S = 240
SESSION = "TFDIST_TESTS_SESSION"  # names the folder that the processes of one pytest call share
_IMPORT_S = 60.0
_PEERS_END_S = 10.0
_started: list["subprocess.Popen | Forked"] = []
_reserved: list[socket.socket] = []


def start(
    arguments: Sequence[str], env: dict[str, str] | None = None, output: int = subprocess.PIPE
) -> subprocess.Popen:  # fmt: skip
    """`output`: a file descriptor for stdout and stderr, instead of pipes that are read."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True,
        start_new_session=True, env={**os.environ, **(env or {})},
    )  # fmt: skip
    _started.append(process)
    return process


def addresses(count: int) -> list[str]:
    """On free ports, which nobody else gets from the system before the test has ended."""
    reserved = [ports.reserve() for _ in range(count)]
    _reserved.extend(reserved)
    return [f"localhost:{s.getsockname()[1]}" for s in reserved]


def kill_what_is_left() -> None:
    """Of a test that failed half-way: the groups of its processes. What a launcher started goes with the launcher. And the
    ports that it reserved."""
    while _reserved:
        _reserved.pop().close()
    while _started:
        process = _started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(process: "subprocess.Popen | Forked", limit_s: float = LIMIT_S) -> subprocess.CompletedProcess:
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
    """The command line; commands that import TensorFlow in their own process run in a fork."""
    begin = fork if arguments[0] in ("train", "eval", "generate", "export") else start
    return finish(begin(["-m", "tfdist.cli", *arguments], env))


# ---- forks ----


class Forked:
    """A child of the zygote, as if it were a `Popen`. It goes when this end is closed."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str], output: int | None):
        self.args, self.returncode = list(arguments), None
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        request = {"arguments": self.args, "env": env, "cwd": os.getcwd()}
        self._socket = _zygote()
        socket.send_fds(self._socket, [json.dumps(request).encode()],
                        [self._out.fileno(), self._err.fileno()] if output is None else [output, output])  # fmt: skip
        self.pid = int(self._socket.recv(64))

    def poll(self) -> int | None:
        return self._wait(0.0)

    def _wait(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            self._socket.settimeout(timeout_s)
            with contextlib.suppress(BlockingIOError, TimeoutError):
                self.returncode = int(self._socket.recv(64) or -signal.SIGKILL)  # nothing: the zygote itself is gone
                self._socket.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, once it has ended."""
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read())
        return texts[0], texts[1]


def fork(arguments: Sequence[str], env: dict[str, str] | None = None, output: int | None = None) -> Forked:
    """As `start`; `arguments` are those of Python: a script, -m or -c first."""
    env = env or {}
    late = [name for name in env if name.startswith(AT_IMPORT) and os.environ.get(name) != env[name]]
    assert not late, f"{late}: read when TensorFlow is imported; use processes.start"
    process = Forked(arguments, {**os.environ, **env}, output)
    _started.append(process)
    return process


def run_forked(arguments: Sequence[str], env: dict[str, str] | None = None, limit_s: float = LIMIT_S):
    return finish(fork(arguments, env), limit_s)


def run_forked_cluster(
    arguments: Sequence[str], workers: int, servers: int = 0, limit_s: float = LIMIT_S
) -> list[subprocess.CompletedProcess]:
    """One fork for each task of a cluster on free ports, without launcher and supervisors; the chief comes first. When it,
    or one that fails, has ended, the others have a few seconds."""
    group = assign.Group(arguments, num_workers=workers, num_ps=servers)
    clusters = assign.clusters(group, addresses(workers + servers + bool(servers)))
    own = {"TF_NUM_INTRAOP_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}  # as the launcher does
    processes = [fork(arguments, {"TF_CONFIG": cluster.to_tf_config(), **own}) for cluster in clusters]
    end_s, told = time.monotonic() + limit_s, False
    while any(process.poll() is None for process in processes) and time.monotonic() < end_s:
        codes = [process.poll() for process in processes]
        if not told and (any(codes) or (servers and codes[0] == 0)):
            end_s, told = min(end_s, time.monotonic() + (_PEERS_END_S if any(codes) else 0.0)), True
        time.sleep(0.01)
    ended = [process.poll() is not None for process in processes]
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    found = [finish(process) for process in processes]
    if servers and ended[0]:  # the others serve until they are killed
        return found[:1]
    return found


def _zygote() -> socket.socket:
    """A connection to this session's, which the first who asks starts."""
    folder = session_folder()
    path = folder / "zygote"
    with open(folder / "zygote.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and not _answers(path):  # one that has died
            path.unlink()
        if not path.exists():
            with open(folder / "zygote.log", "w") as log:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).parent / "zygote.py"), str(path), folder.name.rpartition("-")[2]],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            until_s = time.monotonic() + _IMPORT_S
            while not path.exists():
                assert process.poll() is None and time.monotonic() < until_s, (folder / "zygote.log").read_text()
                time.sleep(0.02)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    return connection


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        return connection.connect_ex(str(path)) == 0


def session_folder() -> Path:
    """What the processes of one call of pytest share; its name ends with the number of the first of them."""
    if SESSION not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"tfdist-tests-{os.getpid()}"
        folder.mkdir(exist_ok=True)
        os.environ[SESSION] = str(folder)
    return Path(os.environ[SESSION])


def measured(name: str, seconds: float, at_most: float) -> None:
    """Asserts a promised time, and prints it (`pytest -s` shows the lines; docs/benchmarks.md has them)."""
    print(f"\nmeasured: {name}: {seconds:.2f} s (at most {at_most:g})")
    assert seconds <= at_most, f"{name}: {seconds:.2f} s, expected at most {at_most:g}"
