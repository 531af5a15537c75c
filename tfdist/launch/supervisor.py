"""The small process over one task's training process: meets the others, starts it, watches it, ends it. No TensorFlow.

Beats go child -> supervisor (socket pair) -> the leader's supervisor (the connection left from the preflight). The
leader judges (watchdog.py) and tells all how it ends. An end of file on any of these connections ends the child.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfdist.cluster.preflight import Meeting, ToldToStop
from tfdist.cluster.resolve import number_of
from tfdist.cluster.spec import Cluster, Task
from tfdist.cluster.wire import Connection
from tfdist.errors import DONE, PEER_LOST, STOPPED, WATCHDOG, Failure, UserError
from tfdist.launch import restarts
from tfdist.launch.process import LAUNCHER_FD, Child
from tfdist.launch.watchdog import Limits, Seen, Verdict, describe_exit, is_frozen, is_lost, judge

MAX_RESTARTS = "TFDIST_MAX_RESTARTS"
_TICK_S = 0.1
_STATUS_EVERY_S = 0.5
_SHARED = ("phase", "step", "batches", "steps", "ticks", "suspended", "exiting", "must_beat")  # of `Seen`, with the leader
_NOTHING_TO_SAVE = ("start", "import", "data", "build")  # phases in which a stop need not wait
_STOP_GRACE_S = 5.0
_GOODBYE_S = 1.0
_SECOND_SIGNAL_S = 0.8  # sooner, it is the same wish by another way: the whole process group, or the launcher as well


@dataclasses.dataclass(frozen=True)
class Job:
    """What a supervisor is given. `launcher_fd` and `max_restarts` come from the launcher, if there is one."""

    cluster: Cluster
    token: str
    command: Sequence[str]
    facts: Mapping[str, Any]  # what must be equal on every task
    limits: Limits
    must_beat: bool = False  # the command is a tfdist program, which beats from its start
    max_restarts: int = 0  # of a process that restarts alone
    launcher_fd: int | None = None  # a socket to the launcher; its end of file is the launcher's death


def run(job: Job) -> int:
    """Supervises the task to its end. Returns the exit code."""
    return asyncio.run(Supervisor(job).run())


def handle_signals(loop: asyncio.AbstractEventLoop, on_signal: Callable[[], None]) -> None:
    """SIGTERM, Ctrl-C and a closed terminal; one that was ignored from the start (nohup) stays ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal)


def from_launcher(environ: Mapping[str, str] = os.environ) -> dict[str, int | None]:
    """What a launcher put into the environment of its supervisors, as fields of `Job`."""
    return {"launcher_fd": _launcher_fd(environ), "max_restarts": number_of(environ, MAX_RESTARTS, 0)}


def _launcher_fd(environ: Mapping[str, str]) -> int | None:
    if not environ.get(LAUNCHER_FD):
        return None
    fd, is_socket = number_of(environ, LAUNCHER_FD, 0), False
    with contextlib.suppress(OSError):
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    if not is_socket:
        raise UserError(f"{LAUNCHER_FD}: expected a socket of tfdist launch, found {fd}, which is none; unset it")
    return fd


class Supervisor:
    def __init__(self, job: Job):
        self.job, self.me = job, job.cluster.task
        now_s = time.monotonic()
        self.is_member = self.me in job.cluster.tasks  # an evaluator is not
        self.serves = self.me.type if job.cluster.ps and self.me.type in ("worker", "ps") else ""  # the chief, till its end
        self.said_lost: set[Task] = set()
        self.is_leader = job.cluster.is_chief or not self.is_member
        watched = job.cluster.tasks if self.is_member and job.cluster.is_chief else (self.me,)
        self.seen = {task: Seen(task, now_s, now_s) for task in watched}
        self.peers: dict[Task, Connection] = {}
        self.leader_heard_s = now_s
        self.child: Child | None = None
        self.verdict: Verdict | None = None
        self.stopping = False
        self.signalled_s: float | None = None
        self.kill_now = False
        self.budget = restarts.Budget(job.max_restarts)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        meeting = Meeting(self.job.cluster, self.job.token, self.job.facts) if self.is_member else None

        def on_signal() -> None:
            now_s = time.monotonic()
            if self.signalled_s is None:
                self.signalled_s = now_s
            elif now_s - self.signalled_s > _SECOND_SIGNAL_S:
                self.kill_now = True
            if self.stopping:
                return
            if self.child is None and meeting is not None:
                self.stopping = True
                meeting.stop()
            else:
                self._stop(tell=True)

        handle_signals(loop, on_signal)
        launcher = asyncio.ensure_future(self._watch_launcher())
        try:
            if meeting is not None:
                self.peers = await meeting.run(self.job.limits.start_timeout_s)
            now_s = time.monotonic()
            for seen in self.seen.values():
                seen.heard_s = seen.moved_s = now_s
            self.leader_heard_s = now_s
            self._start_child()
            readers = [asyncio.ensure_future(self._listen(task, peer)) for task, peer in self.peers.items()]
            verdict = await self._watch()
            await self._end(verdict)
            if readers and self.is_leader:  # closing with statuses unread would reset the connection, and lose "end"
                await asyncio.wait(readers, timeout=_GOODBYE_S)
            for reader in readers:
                reader.cancel()
            return verdict.exit_code
        except ToldToStop as error:
            self._say(f"{error} before training began")
            self._report(Verdict(STOPPED, "stopped", None))
            return STOPPED
        except Failure as error:
            self._say(" ".join(str(error).split()))
            self._report(Verdict(error.exit_code, str(error), None if error.exit_code == PEER_LOST else self.me))
            return error.exit_code
        finally:
            launcher.cancel()
            if self.child is not None:
                self.child.kill()
            if meeting is not None:
                await meeting.close()

    # ---- watching ----

    async def _watch(self) -> Verdict:
        """Ticks until somebody knows how this ends."""
        said_s = 0.0
        while True:
            now_s = time.monotonic()
            mine = self.seen[self.me]
            self._hear_child(mine, now_s)
            if self.kill_now:
                self.child.kill()
            if now_s - said_s >= _STATUS_EVERY_S or mine.exit_code is not None:
                said_s = now_s
                self._send_status(mine)
            if self.is_leader and self.verdict is None:
                self.verdict = judge(list(self.seen.values()), self.job.limits, now_s)
                self._tell_of_lost_workers(now_s)
            elif not self.is_leader and now_s - self.leader_heard_s > self.job.limits.heartbeat_timeout_s:
                leader, silent_s = self.job.cluster.leader, now_s - self.leader_heard_s
                message = f"{leader} is silent for {silent_s:.1f} s: its supervisor is frozen or the network is cut"
                self.verdict = Verdict(PEER_LOST, message, leader, mine.step, stacks=True)
            if self.verdict is not None:
                return self.verdict
            await asyncio.sleep(_TICK_S if mine.exit_code is None else _TICK_S / 4)

    def _tell_of_lost_workers(self, now_s: float) -> None:
        """The chief of parameter servers goes on without them, also where no error will ever tell it to."""
        for task, seen in self.seen.items():
            gone = task.type == "worker" and self.job.cluster.ps and is_lost(seen, self.job.limits, now_s)
            if gone and task not in self.said_lost:
                self.said_lost.add(task)
                self._say(f"{task} is lost; the others go on")
                self.child.tell(f"lost {task.type} {task.index}")

    def _hear_child(self, mine: Seen, now_s: float) -> None:
        """Takes over the child's beats and its end; starts one that restarts alone again."""
        child = self.child
        child.read()
        mine.hear(child.status(now_s) | {"must_beat": self.job.must_beat}, now_s)
        nothing_to_save = self.job.must_beat and mine.phase in _NOTHING_TO_SAVE and not mine.exiting
        cut_short = self.kill_now
        if self.stopping and nothing_to_save and now_s - child.stop_sent_s > _STOP_GRACE_S:
            cut_short = True
            child.kill()
        code = child.poll()
        if code is None and self.serves == "worker" and is_frozen(mine, self.job.limits, now_s):
            self._say(f"{self.me} is frozen: no heartbeat for {now_s - mine.beat_s:.1f} s")
            child.kill()
            code = WATCHDOG
        if code is None or mine.exit_code is not None:
            return
        if cut_short:
            code = STOPPED  # it had nothing to save, or nobody wanted to wait
        role = (self.me.type, bool(self.job.cluster.ps))
        if code not in (DONE, STOPPED) and restarts.POLICY[role] == restarts.ALONE and not self.stopping:
            if self.serves and mine.phase == "serve":  # it got that far: whatever came then is no error of its start
                self.budget.last = None
            wait_s = self.budget.next_start_in_s(code, describe_exit(code), mine.step)
            if wait_s is not None:
                wait_s = 0.0 if self.serves and mine.phase == "serve" else wait_s  # a lost machine, not a bad start
                self._say(f"{self.me} {describe_exit(code)}; it starts again in {wait_s:g} s "
                          f"({self.budget.used} of {self.budget.max_restarts} restarts)")  # fmt: skip
                child.kill()  # what it had started
                self._start_child(wait_s)
                mine.moved_s = now_s + wait_s
                return
        mine.exit_code, mine.exited_s = code, now_s
        if code == STOPPED:  # it was told to by somebody else than this supervisor
            self._stop(tell=True)

    def _send_status(self, mine: Seen) -> None:
        if self.is_leader:
            for peer in self.peers.values():
                peer.send({"alive": True})
            return
        now_s = time.monotonic()
        status = {name: getattr(mine, name) for name in _SHARED}
        status |= {"silent_s": None if mine.beat_s is None else now_s - mine.beat_s, "exit_code": mine.exit_code}
        self.peers[self.job.cluster.leader].send({"status": status})

    async def _listen(self, task: Task, peer: Connection) -> None:
        """The leader hears statuses; the others hear the leader."""
        while (message := await peer.inbox.get()) is not None:
            now_s = time.monotonic()
            if not self.is_leader:
                self.leader_heard_s = now_s
            if "status" in message and self.is_leader:
                seen = self.seen[task]
                with contextlib.suppress(TypeError, ValueError):
                    seen.hear(message["status"], now_s)
                    code = message["status"].get("exit_code")
                    if code is not None and seen.exit_code is None:
                        seen.exit_code, seen.exited_s = int(code), now_s
            if message.get("stop") is True:
                self._stop(tell=self.is_leader)
            if "end" in message and not self.is_leader and self.verdict is None:
                end = message["end"]
                blamed = Task(*end["task"]) if end["task"] else None
                self.verdict = Verdict(
                    int(end["exit_code"]), str(end["message"]), blamed, int(end["step"]), bool(end["stacks"])
                )
        seen = self.seen.get(task)
        if self.job.cluster.ps and task.type == "worker":
            if seen is not None and seen.exit_code is None:  # the leader goes on without it
                seen.exit_code, seen.exited_s = PEER_LOST, time.monotonic()
            return
        if self.verdict is None and not (seen is not None and seen.exit_code is not None):
            step = self.seen[self.me].step
            self.verdict = Verdict(PEER_LOST, f"{task} is lost: its supervisor is gone", task, step)

    # ---- stopping and ending ----

    def _stop(self, tell: bool) -> None:
        """Everybody saves the same step: the training processes agree on it among themselves."""
        if self.stopping:
            return
        self.stopping = True
        if self.child is not None and not self.serves:
            self.child.stop()
        if tell:
            for peer in self.peers.values():
                peer.send({"stop": True})

    async def _end(self, verdict: Verdict) -> None:
        """Tells everyone, ends the child, says one line."""
        if self.is_leader:
            blamed = [verdict.task.type, verdict.task.index] if verdict.task else None
            end = {"exit_code": verdict.exit_code, "message": verdict.message, "task": blamed, "step": verdict.step,
                   "stacks": verdict.stacks}  # fmt: skip
            for peer in self.peers.values():
                peer.send({"end": end})
        if verdict.exit_code not in (DONE, STOPPED):
            self._say(f"{verdict.message}; the group is stopped")
        if verdict.stacks and self.child.poll() is None:
            await self.child.write_stacks()
        self.child.kill()
        self._report(verdict)

    def _say(self, text: str) -> None:
        print(f"tfdist: {text}", file=sys.stderr, flush=True)

    # ---- child and launcher ----

    def _start_child(self, wait_s: float = 0.0) -> None:
        self.child = Child(self.job.command, wait_s)
        self._tell_launcher({"child": self.child.pid})

    def _report(self, verdict: Verdict) -> None:
        task = [verdict.task.type, verdict.task.index] if verdict.task else None
        self._tell_launcher({"end": {"exit_code": verdict.exit_code, "message": verdict.message, "task": task,
                                     "step": verdict.step}})  # fmt: skip

    def _tell_launcher(self, message: dict[str, Any]) -> None:
        if self.job.launcher_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self.job.launcher_fd, json.dumps(message).encode() + b"\n")

    async def _watch_launcher(self) -> None:
        """When the launcher dies, even by SIGKILL, nothing of its group may stay."""
        if self.job.launcher_fd is None:
            return
        gone = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self.job.launcher_fd, lambda: gone.done() or gone.set_result(None))
        await gone  # it never writes: only an end of file wakes this
        if self.child is not None:
            self.child.kill()
        os._exit(PEER_LOST)
