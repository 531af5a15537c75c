"""Processes that are started, heard, asked to stop and ended, and signalled only while they are there."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tfdist.launch import protocol

LAUNCHER_FD = "TFDIST_LAUNCHER_FD"  # names the supervisor's socket to the launcher; its end of file is the launcher's end
_STACKS_S = 1.0  # time to write stacks between SIGUSR1 and SIGKILL
_KILL_S = 5.0  # what the system may need to end a process
_LATE_S = 1.0  # without a beat it is worth while to ask the system
_MOST_WAITING_BYTES = 1 << 16  # of a line whose end is not there yet
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CAN_LOOK = hasattr(os, "waitid")  # not on macOS before Python 3.13


class OwnProcess:
    """A process in a group of its own.

    It stays unreaped (as a zombie) until its group is killed: for so long the system gives its number, which is that of the
    group, to nobody else.
    """

    def __init__(self, command: Sequence[str], **options: Any):
        self.process = subprocess.Popen(command, start_new_session=True, **({"stdin": subprocess.DEVNULL} | options))
        self.pid, self.is_reaped = self.process.pid, False
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, 128 + n for death by signal n; None while it runs."""
        if self._code is None and not self.is_reaped:
            self._code = _exit_code(self.pid) if _CAN_LOOK else self._reap_and_kill()
        return self._code

    def wait(self, timeout_s: float) -> int | None:
        """As `poll`, once it has ended, or after so long."""
        until_s = time.monotonic() + timeout_s
        while (code := self.poll()) is None and time.monotonic() < until_s:
            time.sleep(0.01)
        return code

    def signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)  # until it is reaped the number is its own

    def kill(self) -> None:
        """It and what it started."""
        if self.is_reaped:
            return
        _kill_group(self.pid)
        if self.wait(_KILL_S) is not None:
            self.process.wait()
            self.is_reaped = True

    def _reap_and_kill(self) -> int | None:
        code = self.process.poll()
        if code is None:
            return None
        self.is_reaped = True
        _kill_group(self.pid)  # at once: nobody has got the number yet
        return code if code >= 0 else 128 - code


def _exit_code(pid: int) -> int | None:
    """Of a child, which stays unreaped. None while it runs; `ChildProcessError` for what is no child, or reaped."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# ---- parents, children, orphans ----


def keep_children() -> None:
    """Under a starter that ignores SIGCHLD, which is inherited, the system would reap them, and their codes be lost."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def wake_when_parent_dies() -> None:
    """On Linux: this process goes on (SIGCONT) when its parent dies, also if it is stopped, and can end itself."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def adopt_orphans() -> None:
    """On Linux: what the children of this process leave behind becomes its own child, not that of the system."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_orphan(pid: int) -> None:
    """The group of a process that was a child of our child, and that is ours since that one's end. Nothing if it is not, or
    not any more: its number may be somebody else's."""
    if not _CAN_LOOK:
        return
    with contextlib.suppress(ChildProcessError):
        _exit_code(pid)  # only a child, unreaped, gives an answer
        _kill_group(pid)
        until_s = time.monotonic() + _KILL_S
        while _exit_code(pid) is None and time.monotonic() < until_s:
            time.sleep(0.01)
        os.waitpid(pid, os.WNOHANG)


def reap_orphans(keep: Collection[int]) -> None:
    """Those that have ended, but for `keep`."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for pid in set(map(int, children)) - set(keep):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# ---- the training process ----


def tied(command: Sequence[str], fd: int | str = "", wait_s: float = 0.0) -> list[str]:
    """The command, so that it ends with this process. `fd`: of a socket for its beats."""
    wrapper = str(Path(__file__).with_name("child.py"))
    return [sys.executable, "-S", "-E", wrapper, str(fd), str(os.getpid()), str(wait_s), *command]


class Child(OwnProcess):
    """The training process of a supervisor."""

    def __init__(self, command: Sequence[str], wait_s: float = 0.0):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.socket, self.buffer = ours, b""
        self.beat_s: float | None = None
        self.beat: dict[str, Any] = {"phase": "start"}
        self.stop_sent_s = float("inf")
        self.problem = ""  # what it sent that is no beat
        super().__init__(
            tied(command, theirs.fileno(), wait_s), pass_fds=[theirs.fileno()],
            env={name: value for name, value in os.environ.items() if name != LAUNCHER_FD},
        )  # fmt: skip
        theirs.close()

    def read(self) -> None:
        """Takes the newest beat. What is none ends the connection, and is the `problem`."""
        try:
            while not self.problem and (received := self.socket.recv(1 << 16)):
                *lines, self.buffer = (self.buffer + received).split(b"\n")
                if len(self.buffer) > _MOST_WAITING_BYTES:
                    raise protocol.Malformed("a line without an end")
                for line in lines:
                    self.beat, self.beat_s = protocol.check(protocol.parse(line), protocol.BEAT, "beat"), time.monotonic()
        except (BlockingIOError, ConnectionResetError):
            pass
        except protocol.Malformed as error:
            self.problem = str(error)
            self.socket.close()

    def status(self, now_s: float) -> dict[str, Any]:
        silent_s = None if self.beat_s is None else now_s - self.beat_s
        is_late = silent_s is None or silent_s > _LATE_S
        return self.beat | {"silent_s": silent_s, "suspended": is_late and self._is_suspended()}

    def _is_suspended(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def stop(self) -> None:
        """Asks it to save and end. Through the socket, where tfdist listens; TensorFlow swallows SIGTERM at times."""
        self.stop_sent_s = time.monotonic()
        if self.beat_s is None:
            self.signal(signal.SIGTERM)
            return
        with contextlib.suppress(OSError):
            self.socket.send(b"stop\n")

    def tell(self, line: str) -> None:
        """Through the socket, where tfdist listens."""
        with contextlib.suppress(OSError):
            self.socket.send(line.encode() + b"\n")

    async def write_stacks(self) -> None:
        """A suspended process writes nothing until it goes on; SIGUSR1 waits for that."""
        if self.beat_s is not None:  # it has a handler; without one the signal would end it silently
            self.signal(signal.SIGUSR1)
        self.signal(signal.SIGCONT)
        await asyncio.sleep(_STACKS_S)

    def renew(self, now_s: float) -> None:
        """Gives it a new heartbeat: nobody could have heard the last ones."""
        self.beat_s = None if self.beat_s is None else now_s
