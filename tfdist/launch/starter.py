"""What a supervisor was started by: it is told what happens, and its end is this task's end too."""

import asyncio
import contextlib
import json
import os
from typing import Any

from tfdist.launch import process, protocol
from tfdist.launch.watchdog import Verdict

_LOOK_EVERY_S = 0.1


class Starter:
    """`launcher_fd`: a socket to the launcher. `parent_pid`: of another program that must not be outlived; 0: any may."""

    def __init__(self, launcher_fd: int | None, parent_pid: int):
        self.launcher_fd, self.parent_pid = launcher_fd, parent_pid
        if launcher_fd is not None or parent_pid:
            process.wake_when_parent_dies()

    def report_child(self, pid: int) -> None:
        self._tell({protocol.CHILD: pid})

    def report(self, verdict: Verdict) -> None:
        task = [verdict.task.type, verdict.task.index] if verdict.task else None
        self._tell({"end": {"exit_code": verdict.exit_code, "message": verdict.message, "task": task,
                            "step": verdict.step}})  # fmt: skip

    def _tell(self, message: dict[str, Any]) -> None:
        if self.launcher_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self.launcher_fd, json.dumps(message).encode() + b"\n")

    async def gone(self) -> None:
        """Waits for its death, even by SIGKILL."""
        loop = asyncio.get_running_loop()
        closed = loop.create_future()
        if self.launcher_fd is not None:  # which never writes: only an end of file wakes this
            loop.add_reader(self.launcher_fd, lambda: closed.done() or closed.set_result(None))
        while not closed.done() and (not self.parent_pid or os.getppid() == self.parent_pid):
            await asyncio.wait({closed}, timeout=_LOOK_EVERY_S if self.parent_pid else None)
