"""The child's end of the socket to its supervisor: beats go up, "stop" comes down, and when it ends, so does this process.

One JSON object a line, twice a second: phase, step, batches, ticks. No TensorFlow.
"""

import atexit
import contextlib
import faulthandler
import functools
import json
import os
import signal
import socket
import threading
from collections.abc import Callable

from tfdist.cluster import resolve
from tfdist.cluster.spec import Task
from tfdist.errors import PEER_LOST

BEAT_S = 0.5
_LONGEST_LINE = 80

Progress = Callable[[], tuple[int, int]]  # (batches fetched, steps done)


class SupervisorLink:
    """Says what this process is at. Without a supervisor everything here does nothing."""

    def __init__(self, fd: int | None):
        self.is_there = fd is not None
        self._phase, self._ticks = "import", 0
        self._step, self._steps_before = 0, 0  # the training step that the phase began at, and all loops' steps by then
        self._reached = 0  # the training step by now
        self._progress: Progress = lambda: (0, 0)
        self._on_lost: Callable[[Task], None] = lambda task: None
        self._lost: list[Task] = []
        self._closed = threading.Event()
        if fd is None:
            return
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        # for the stacks of a process that hangs; the file descriptor, because sys.stderr may be replaced
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=False)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._send_beats, self._obey)]
        for thread in self._threads:
            thread.start()
        # before the interpreter and TensorFlow are taken apart: a beat then would crash
        atexit.register(self.close)

    def phase(self, name: str, step: int | None = None) -> None:
        """What this process does from now on; each phase has its own time limit (launch/watchdog.py). `step`: the
        training step that has been reached."""
        if self.is_there and step is not None:
            self._step, self._steps_before = step, self._progress()[1]
        self._phase = name
        if self.is_there and name == "connect":  # no thread may run for a while: say so at once
            self._send_beat()

    @contextlib.contextmanager
    def connecting(self):
        """Inside, TensorFlow may hold Python's lock, and this process be silent."""
        before = self._phase
        self.phase("connect")
        try:
            yield
        finally:
            self._phase = before

    def tick(self) -> None:
        """Something went forward that is no step: a long preparation is alive."""
        self._ticks += 1

    def watch(self, progress: Progress) -> None:
        """Where to read how far training is; called from another thread."""
        self._progress = progress

    def on_lost(self, act: Callable[[Task], None]) -> None:
        """What to do when the supervisor says that a worker is gone that this process can do without; called from another
        thread."""
        self._on_lost = act
        for task in list(self._lost):
            act(task)

    def close(self) -> None:
        if self.is_there and not self._closed.is_set():
            self._phase = "exit"
            self._closed.set()
            self._threads[0].join(timeout=2 * BEAT_S)

    def _send_beats(self) -> None:
        while True:
            last = self._closed.is_set()
            self._send_beat()
            if last:
                return
            self._closed.wait(BEAT_S)

    def _send_beat(self) -> None:
        batches, steps = self._progress()
        if self._phase in ("compile", "train"):
            self._reached = self._step + steps - self._steps_before
        elif self._phase != "exit":
            self._reached = self._step
        beat = {"phase": self._phase, "step": self._reached, "batches": batches, "steps": steps, "ticks": self._ticks}
        # a supervisor that does not read for a while (it is frozen) must not freeze this process too
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._socket.send(json.dumps(beat).encode() + b"\n", socket.MSG_DONTWAIT)

    def _obey(self) -> None:
        rest = b""
        while True:
            try:
                received = self._socket.recv(4096)
            except OSError:
                received = b""
            if not received:
                if not self._closed.is_set():
                    _end("the supervisor of this process is gone")
                return
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                self._do(line)
            if len(rest) > _LONGEST_LINE:
                self._do(rest)

    def _do(self, line: bytes) -> None:
        match line.split():
            case [b"stop"]:
                os.kill(os.getpid(), signal.SIGTERM)
            case [b"lost", b"worker", index] if index.isdigit():
                self._lost.append(Task("worker", int(index)))
                self._on_lost(self._lost[-1])
            case _:
                _end(f"the supervisor of this process sent {line[:40]!r}, expected stop or lost")


def _end(reason: str) -> None:
    """Nobody watches over this process any more: it ends."""
    with contextlib.suppress(OSError):
        os.write(2, f"tfdist: {reason}\n".encode())
    os._exit(PEER_LOST)


@functools.cache
def supervisor() -> SupervisorLink:
    """This process' only link; made on first use."""
    return SupervisorLink(resolve.supervisor_fd())
