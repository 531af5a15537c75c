"""The small process over one task's training process: meets the others, starts it, watches it, ends it. No TensorFlow.

Beats go child -> supervisor (socket pair) -> the leader's supervisor (the connection left from the preflight). The
leader judges (watchdog.py) and tells all how it ends. An end of file on any of these connections ends the child.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfdist.cluster.preflight import Meeting, ToldToStop
from tfdist.cluster.resolve import number_of
from tfdist.cluster.spec import Cluster, Task
from tfdist.cluster.wire import Connection
from tfdist.errors import DONE, INTERNAL, PEER_LOST, STOPPED, WATCHDOG, Failure, UserError
from tfdist.launch import process, protocol, restarts
from tfdist.launch.output import detached, passed_on, say
from tfdist.launch.process import LAUNCHER_FD, Child
from tfdist.launch.starter import Starter
from tfdist.launch.watchdog import Limits, Seen, Verdict, describe_exit, is_frozen, is_lost, judge, silent

MAX_RESTARTS = "TFDIST_MAX_RESTARTS"
_TICK_S = 0.1
_STATUS_EVERY_S = 0.5
_SHARED = ("phase", "step", "batches", "steps", "ticks", "suspended", "exiting", "must_beat")  # of `Seen`, with the leader
_NOTHING_TO_SAVE = ("start", "import", "data", "build")  # phases in which a stop need not wait
_STOP_GRACE_S = 5.0
_GOODBYE_S = 1.0
_PRINTED_S = 0.5
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
    parent_pid: int = 0  # of a starter to end with; 0: to outlive it


def run(job: Job) -> int:
    """Supervises the task to its end. Returns the exit code."""
    process.keep_children()
    with detached():
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
        self.starter = Starter(job.launcher_fd, job.parent_pid)
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
        starter = asyncio.ensure_future(self._end_with_starter())
        try:
            if meeting is not None:
                self.peers = await meeting.run(self.job.limits.start_timeout_s)
            now_s = time.monotonic()
            self._renew(now_s)
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
            say(f"{error} before training began")
            self.starter.report(Verdict(STOPPED, "stopped", None))
            return STOPPED
        except Failure as error:
            say(" ".join(str(error).split()))
            self.starter.report(Verdict(error.exit_code, str(error), None if error.exit_code == PEER_LOST else self.me))
            return error.exit_code
        finally:
            starter.cancel()
            if self.child is not None:
                self.child.kill()
            if meeting is not None:
                await meeting.close()

    # ---- watching ----

    async def _watch(self) -> Verdict:
        """Ticks until somebody knows how this ends."""
        said_s, last_s = 0.0, time.monotonic()
        while True:
            now_s = time.monotonic()
            mine = self.seen[self.me]
            if now_s - last_s > self.job.limits.late_s:
                self._wake_up(now_s - last_s, now_s)
            last_s = now_s
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
                leader = self.job.cluster.leader
                message = silent(leader, now_s - self.leader_heard_s)
                self.verdict = Verdict(PEER_LOST, message, leader, mine.step, stacks=True)
            if self.verdict is not None:
                return self.verdict
            await asyncio.sleep(_TICK_S if mine.exit_code is None else _TICK_S / 4)

    def _wake_up(self, seconds: float, now_s: float) -> None:
        """This supervisor stood still, most likely with all others: the machine slept, the group was stopped. What it did
        not hear meanwhile says nothing."""
        if seconds > self.job.limits.heartbeat_timeout_s:
            say(f"{self.me}: nothing ran here for {seconds:.1f} s; everybody has a new heartbeat")
        self._renew(now_s)
        self.child.renew(now_s)

    def _renew(self, now_s: float) -> None:
        for seen in self.seen.values():
            seen.renew(now_s)
        self.leader_heard_s = now_s

    def _tell_of_lost_workers(self, now_s: float) -> None:
        """The chief of parameter servers goes on without them, also where no error will ever tell it to."""
        for task, seen in self.seen.items():
            gone = task.type == "worker" and self.job.cluster.ps and is_lost(seen, self.job.limits, now_s)
            if gone and task not in self.said_lost:
                self.said_lost.add(task)
                say(f"{task} is lost; the others go on")
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
        if child.problem and mine.exit_code is None:
            say(f"the process of {self.me} sent its supervisor a malformed message: {child.problem}")
            child.kill()
            code = INTERNAL
        if code is None and self.serves == "worker" and is_frozen(mine, self.job.limits):
            say(f"{self.me} is frozen: no heartbeat for {mine.beat_age_s:.1f} s")
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
                say(f"{self.me} {describe_exit(code)}; it starts again in {wait_s:g} s "
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
        try:
            while (message := await peer.inbox.get()) is not None:
                (self._hear_member if self.is_leader else self._hear_leader)(task, message, time.monotonic())
        except protocol.Malformed as error:
            peer.refuse(str(error))
        seen = self.seen.get(task)
        if self.job.cluster.ps and task.type == "worker":
            if peer.problem:
                say(f"{task} sent a malformed message: {peer.problem}")
            if seen is not None and seen.exit_code is None:  # the leader goes on without it
                seen.exit_code, seen.exited_s = PEER_LOST, time.monotonic()
            return
        if self.verdict is None and not (seen is not None and seen.exit_code is not None):
            why = f"malformed message: {peer.problem}" if peer.problem else "its supervisor is gone"
            self.verdict = Verdict(PEER_LOST, f"{task} is lost: {why}", task, self.seen[self.me].step)

    def _hear_member(self, task: Task, message: dict[str, Any], now_s: float) -> None:
        protocol.known(message, protocol.TO_LEADER)
        if "status" in message:
            seen, status = self.seen[task], protocol.check(message["status"], protocol.STATUS, "status")
            seen.hear(status, now_s)
            if status["exit_code"] is not None and seen.exit_code is None:
                seen.exit_code, seen.exited_s = status["exit_code"], now_s
        if "stop" in message:
            self._stop(tell=True)

    def _hear_leader(self, _: Task, message: dict[str, Any], now_s: float) -> None:
        protocol.known(message, protocol.TO_MEMBER)
        self.leader_heard_s = now_s
        if "stop" in message:
            self._stop(tell=False)
        if "end" in message:
            end = protocol.check(message["end"], protocol.END_OF_ALL, "end")
            blamed = Task(*end["task"]) if end["task"] else None
            ended = Verdict(end["exit_code"], end["message"], blamed, end["step"], end["stacks"])
            self.verdict = self.verdict or ended

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
            say(f"{verdict.message}; the group is stopped")
        if verdict.stacks and self.child.poll() is None:
            await passed_on(_PRINTED_S)  # stacks come in pieces, and a line between them would not be known for one
            await self.child.write_stacks()
        self.child.kill()
        self.starter.report(verdict)

    # ---- child and starter ----

    def _start_child(self, wait_s: float = 0.0) -> None:
        self.child = Child(self.job.command, wait_s)
        self.starter.report_child(self.child.pid)

    async def _end_with_starter(self) -> None:
        """Nothing of a group may stay when its launcher dies."""
        await self.starter.gone()
        if self.child is not None:
            self.child.kill()
        os._exit(PEER_LOST)
