"""One supervisor that a launcher started: its output with a prefix, its whole log, its report.

What a program prints (stdout) is shown of one process: all run the same program, and print the same. What it writes to
stderr is shown of all.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tfdist import files
from tfdist.cluster.spec import Cluster
from tfdist.cluster.wire import MAX_LINE_BYTES
from tfdist.errors import PEER_LOST
from tfdist.launch import protocol
from tfdist.launch.assign import Group
from tfdist.launch.output import say
from tfdist.launch.process import LAUNCHER_FD, OwnProcess, kill_orphan
from tfdist.launch.watchdog import describe_exit

_LAST_LINES = 50
# What TensorFlow writes about its build and its start; no setting stops all of it.
_CHATTER = re.compile(
    r"I0000 |WARNING: All log messages before absl::InitializeLog|To enable the following instructions: "
    r"|/job:\w+/replica:\d+/task:\d+$"  # whom it waits for
)
_NO_GPU = re.compile(r"E0000 .*failed call to cuInit")


class Member:
    """One supervisor that this launcher started."""

    def __init__(self, group: Group, cluster: Cluster, environment: Mapping[str, str]):
        self.task = cluster.task
        self.prints = group.all_output or cluster.is_chief or self.task.type == "evaluator"
        self.hidden = _chatter(environment)
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.received, self.child_pid, self.end, self.problem = b"", 0, None, ""
        self.killed = self.in_stacks = False
        self.ended_s = float("inf")
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.log = open_log(group.log_dir / f"{self.task.type}-{self.task.index}.log")
        self.process = OwnProcess(
            group.command, env={**environment, LAUNCHER_FD: str(theirs.fileno())}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        asyncio.get_running_loop().add_reader(self.ours, self.hear)
        shown = [sys.stdout if self.prints else None, sys.stderr]
        pipes = [self.process.process.stdout, self.process.process.stderr]
        self.streams = [asyncio.ensure_future(self._forward(*pair)) for pair in zip(pipes, shown, strict=True)]

    def hear(self) -> None:
        """Takes what the supervisor has reported by now. What is none of it ends the connection."""
        try:
            while self.ours.fileno() >= 0 and (received := self.ours.recv(1 << 16)):
                *lines, self.received = (self.received + received).split(b"\n")
                for line in lines:
                    self._take(protocol.parse(line))
                if len(self.received) > MAX_LINE_BYTES:
                    raise protocol.Malformed("a line without an end")
            self._close()
        except (BlockingIOError, ConnectionResetError):
            pass
        except protocol.Malformed as error:
            self.problem = str(error)
            self._close()

    def _take(self, message: dict[str, Any]) -> None:
        protocol.known(message, protocol.TO_LAUNCHER)
        if protocol.CHILD in message:
            self.child_pid = protocol.pid(message[protocol.CHILD])
        if "end" in message:
            self.end = protocol.check(message["end"], protocol.END, "end")

    def _close(self) -> None:
        if self.ours.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self.ours)
            self.ours.close()

    async def _forward(self, pipe: IO[bytes], to: IO[str] | None) -> None:
        """Whole lines, with a prefix, to the launcher's own output (None: nowhere); all bytes to the log."""
        reader = asyncio.StreamReader(limit=1 << 20)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        rest = b""
        while received := await reader.read(1 << 16):
            *lines, rest = (rest + received).split(b"\n")
            if len(rest) > 1 << 20:
                lines, rest = [*lines, rest], b""
            self._emit(lines, to)
        self._emit([rest] if rest else [], to)

    def _emit(self, lines: list[bytes], to: IO[str] | None) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self.log.write(b"".join(line + b"\n" for line in lines))
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]  # of a progress bar, its last state
            if self._is_of_stacks(text) or any(kind.match(text) for kind in self.hidden):  # the log has them
                continue
            self.last_lines.append(text)
            if to is not None:
                print(f"[{self.task}] {text}", file=to, flush=True)

    def _is_of_stacks(self, text: str) -> bool:
        """Whether a line belongs to what faulthandler writes of all threads."""
        begins = re.match(r"(Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\):", text) is not None
        self.in_stacks = begins or (self.in_stacks and (text == "" or text.startswith("  ")))
        return self.in_stacks

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None and self.ended_s == float("inf"):
            self.ended_s = time.monotonic()
        return code

    def verdict(self) -> dict[str, Any]:
        """What the supervisor reported, or what its own end says."""
        code = self.poll()
        self.hear()
        if self.problem:
            message = f"the supervisor of {self.task} sent a malformed message: {self.problem}"
            return {"exit_code": PEER_LOST, "message": message, "task": None, "step": 0}
        if self.end is not None:
            return self.end
        if self.killed or code is None:
            return {"exit_code": PEER_LOST, "message": f"{self.task} had to be killed", "task": None, "step": 0}
        message = f"the supervisor of {self.task} {describe_exit(code)}"
        return {"exit_code": code, "message": message, "task": [self.task.type, self.task.index], "step": 0}

    def signal(self, number: signal.Signals) -> None:
        self.process.signal(number)

    def kill(self) -> None:
        """The supervisor, its child, and what they started."""
        self.killed = self.killed or self.poll() is None
        self.process.kill()
        self.hear()
        if self.child_pid:  # without its supervisor it is the launcher's, or has been reaped
            kill_orphan(self.child_pid)
            self.child_pid = 0

    async def finish_logs(self) -> None:
        """What was written last; a stray grandchild that holds a pipe open is not waited for."""
        await asyncio.wait(self.streams, timeout=1.0)
        for stream in self.streams:
            stream.cancel()
        self.hear()
        self._close()
        self.log.close()


def open_log(path: Path) -> IO[bytes]:
    """To be added to. Where its folder has gone since the start it is made again; a log that cannot be is lost, not the
    run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return files.open_inside(path.parent, path.name, "a+b")
    except OSError as error:
        say(f"cannot write {path}: {error.strerror}; its lines are lost")
        return open(os.devnull, "ab", buffering=0)


def _chatter(environment: Mapping[str, str]) -> list[re.Pattern]:
    """What is not shown: nothing where the user says how much TensorFlow is to log; its words on a lack of GPUs where none
    is wanted."""
    if "TF_CPP_MIN_LOG_LEVEL" in environment:
        return []
    return [_CHATTER] if environment.get("CUDA_VISIBLE_DEVICES", "-1") not in ("", "-1") else [_CHATTER, _NO_GPU]
