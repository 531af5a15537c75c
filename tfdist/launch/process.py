"""The training process under a supervisor: started, heard, asked to stop, ended."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAUNCHER_FD = "TFDIST_LAUNCHER_FD"  # names the supervisor's socket to the launcher; its end of file is the launcher's end
_STACKS_S = 1.0  # time to write stacks between SIGUSR1 and SIGKILL


class Child:
    """The training process, in a process group of its own."""

    def __init__(self, command: Sequence[str], wait_s: float = 0.0):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.socket, self.buffer = ours, b""
        self.beat_s: float | None = None
        self.beat: dict[str, Any] = {"phase": "start"}
        self.stop_sent_s = float("inf")
        wrapper = str(Path(__file__).with_name("child.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", wrapper, str(theirs.fileno()), str(os.getpid()), str(wait_s), *command],
            env={name: value for name, value in os.environ.items() if name != LAUNCHER_FD}, stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """The exit code, 128 + n for death by signal n; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def read(self) -> None:
        """Takes the newest beat."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while received := self.socket.recv(1 << 16):
                *lines, self.buffer = (self.buffer + received).split(b"\n")
                self.buffer = self.buffer[-(1 << 16) :]
                for line in lines:
                    with contextlib.suppress(ValueError):
                        beat = json.loads(line)
                        if isinstance(beat, dict):
                            self.beat, self.beat_s = beat, time.monotonic()

    def status(self, now_s: float) -> dict[str, Any]:
        silent_s = None if self.beat_s is None else now_s - self.beat_s
        return self.beat | {"silent_s": silent_s, "suspended": silent_s is None and self._is_suspended()}

    def _is_suspended(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def stop(self) -> None:
        """Asks it to save and end. Through the socket, where tfdist listens; TensorFlow swallows SIGTERM at times."""
        self.stop_sent_s = time.monotonic()
        if self.beat_s is None:
            self._signal(signal.SIGTERM)
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
            self._signal(signal.SIGUSR1)
        self._signal(signal.SIGCONT)
        await asyncio.sleep(_STACKS_S)

    def kill(self) -> None:
        """It and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
