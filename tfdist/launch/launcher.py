"""One cluster on this machine: ports, TF_CONFIG for each task, prefixed logs, restarts, and nothing left behind."""

import asyncio
import dataclasses
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfdist.cluster import ports
from tfdist.cluster.resolve import DATA_SERVICE
from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import DONE, PEER_LOST, STOPPED, UserError
from tfdist.launch import process, restarts
from tfdist.launch.assign import Group, clusters, gpus_of_workers
from tfdist.launch.data_service import DataService
from tfdist.launch.member import Member
from tfdist.launch.output import detached, say
from tfdist.launch.supervisor import MAX_RESTARTS, handle_signals

_LAST_EVALUATION_S = 600.0  # an evaluator may go on for so long after the end of training
_LONGEST_ERROR = 300  # characters
_SAME_FOLDER = "; every process runs this program in the same folder: use os.makedirs(..., exist_ok=True)"
# The name of an exception. Python writes a traceback piece by piece, and what TensorFlow writes meanwhile goes between:
# source lines and carets may stand without their indentation, and lines of a log in their middle.
_ERROR = re.compile(r"((?!\d)[\w<>]+(\.[\w<>]+)+|(?=\w*[a-z])[A-Z]\w*)(:|$)")
_REAP_EVERY_S = 1.0
_END_GRACE_S = 4.0  # from the first supervisor's end to the last one's, then they are killed


def run(group: Group) -> int:
    """Runs the group to its end, restarts included. Returns the exit code."""
    process.keep_children()
    process.adopt_orphans()
    with detached():
        return asyncio.run(Launcher(group).run())


class Launcher:
    def __init__(self, group: Group):
        self.group = group
        num_tasks = group.num_workers + group.num_ps + bool(group.num_ps)
        self.reserved = [ports.reserve() for _ in range(num_tasks)]
        self.clusters = clusters(group, [f"localhost:{s.getsockname()[1]}" for s in self.reserved])
        self.token = secrets.token_hex(16)
        self.members: list[Member] = []
        self.data_service: DataService | None = None
        self.stopping = False
        self._failure_of_data_service: Failure | None = None
        self.said_lost: list[Member] = []
        self.reaped_s = 0.0
        self.budget = restarts.Budget(group.max_restarts)

    async def run(self) -> int:
        handle_signals(asyncio.get_running_loop(), self._on_signal)
        try:
            self.group.log_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.group.log_dir).close()
        except OSError as error:
            raise UserError(f"--log_dir: cannot write to {self.group.log_dir}: {error.strerror}") from error
        try:
            while True:
                failure = await self._run_once()
                if failure.exit_code in (DONE, STOPPED) or self.stopping:
                    return failure.exit_code
                if self._restarts_alone(failure):  # and has used up its restarts
                    failure.show(final=True)
                    return failure.exit_code
                error = f"{failure.task} {failure.exit_code}"
                wait_s = self.budget.next_start_in_s(failure.exit_code, error, failure.step)
                failure.show(final=wait_s is None)
                if wait_s is None:
                    if self.group.max_restarts:
                        say(f"no restart: {self.budget.why_not(failure.exit_code)}")
                    return failure.exit_code
                say(f"restart {self.budget.used} of {self.budget.max_restarts} of the whole group in {wait_s:g} s")
                await self._sleep(wait_s)
                if self.stopping:
                    return STOPPED
        finally:
            for member in self.members:
                member.kill()
            if self.data_service:
                self.data_service.close()

    def _restarts_alone(self, failure: "Failure") -> bool:
        if failure.task is None or failure.exit_code == PEER_LOST:
            return False
        return restarts.POLICY[failure.task.type, bool(self.group.num_ps)] == restarts.ALONE

    async def _sleep(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not self.stopping:
            await asyncio.sleep(0.05)

    def _on_signal(self) -> None:
        for member in self.members:
            member.signal(signal.SIGTERM)  # a supervisor's second one kills
        if not self.stopping:
            say("stopping: every process ends after the same step, saved where that was asked for (once more: stop at once)")
        self.stopping = True

    async def _run_once(self) -> "Failure":
        """Starts everyone, waits until all are gone."""
        devices = gpus_of_workers(self.group, os.environ)
        if self.data_service:
            self.data_service.close()
        if self.group.data_workers:  # a new one for each start: it keeps nothing
            self.data_service = DataService(self.group.data_workers, self.group.log_dir)
        self.members = [Member(self.group, cluster, self._environment(cluster, devices)) for cluster in self.clusters]
        if self.stopping:
            self._on_signal()
        group = [m for m in self.members if m.task.type != "evaluator"]
        await self._wait(group)
        for member in self.members:
            if member.task.type == "evaluator":
                await self._end_evaluator(member, group)
        for member in self.members:
            member.kill()  # what is left of those that have ended
            await member.finish_logs()
        return self._failure_of_data_service or _cause(self.members)

    async def _wait(self, members: list[Member]) -> None:
        """Until all have ended; from the first failure on they have a few seconds left."""
        give_up_s = float("inf")
        self._failure_of_data_service = None
        while any(member.poll() is None for member in members):
            await asyncio.sleep(0.02)
            self._look_after_orphans()
            self._tell_of_lost_workers(members)
            if self.data_service and not self._failure_of_data_service and (end := self.data_service.failure()):
                self._failure_of_data_service = Failure(PEER_LOST, f"the data service is lost: {end}", 0, [], None)
                for member in members:
                    member.kill()
            ended = [m for m in members if not self._can_do_without(m, members)]
            failed = any(m.problem or m.poll() not in (None, DONE, STOPPED) for m in ended)
            if failed:
                give_up_s = min(give_up_s, time.monotonic() + _END_GRACE_S)
            if time.monotonic() > give_up_s:
                for member in members:
                    member.kill()

    def _tell_of_lost_workers(self, members: list[Member]) -> None:
        """Its supervisor would have started it again; nobody starts a supervisor again: it cannot meet those that train."""
        for member in members:
            is_new = member.poll() is not None and not member.killed and member not in self.said_lost
            if is_new and self._can_do_without(member, members):
                message = member.verdict()["message"]
                if member.end is None:
                    self.said_lost.append(member)
                    member.kill()  # what it has left behind
                    say(f"{member.task} is lost for good: {message}; the others go on")

    def _look_after_orphans(self) -> None:
        if time.monotonic() - self.reaped_s > _REAP_EVERY_S:
            self.reaped_s = time.monotonic()
            for member in self.members:
                member.hear()
            services = self.data_service.processes.values() if self.data_service else ()
            own = [pid for member in self.members for pid in (member.process.pid, member.child_pid)]
            process.reap_orphans([*own, *(service.pid for service in services)])

    def _can_do_without(self, member: Member, members: list[Member]) -> bool:
        """Parameter servers go on while any worker is there."""
        workers = [m for m in members if m.task.type == "worker"]
        return bool(self.group.num_ps) and member in workers and any(m.poll() is None for m in workers)

    async def _end_evaluator(self, evaluator: Member, group: list[Member]) -> None:
        """It ends by itself after the last checkpoint; it is told to when the group did not get that far."""
        patience_s = _LAST_EVALUATION_S if all(m.verdict()["exit_code"] == DONE for m in _deciding(group)) else 0.0
        for end_it in (lambda: evaluator.signal(signal.SIGTERM), evaluator.kill):
            until_s = time.monotonic() + patience_s
            while evaluator.poll() is None and time.monotonic() < until_s:
                await asyncio.sleep(0.05)
            end_it()
            patience_s = _END_GRACE_S
        while evaluator.poll() is None:
            await asyncio.sleep(0.05)

    def _environment(self, cluster: Cluster, devices: Mapping[Task, str]) -> dict[str, str]:
        own = {"TF_CONFIG": cluster.to_tf_config(), "TFDIST_JOB_TOKEN": self.token,
               MAX_RESTARTS: str(self.group.max_restarts), "PYTHONUNBUFFERED": "1"}  # fmt: skip
        if self.data_service:
            own[DATA_SERVICE] = self.data_service.address
        if self.group.devices_per_worker:
            own["TFDIST_DEVICES_PER_WORKER"] = str(self.group.devices_per_worker)
        if cluster.task in devices:
            own["CUDA_VISIBLE_DEVICES"] = devices[cluster.task]
        elif "TF_NUM_INTRAOP_THREADS" not in os.environ:  # else every worker would start a thread for every core
            own["TF_NUM_INTRAOP_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.group.num_workers))
        # `python` is the one that runs the launcher, also when its environment is not activated
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, **own}


@dataclasses.dataclass
class Failure:
    """The cause of a group's end, whoever noticed it."""

    exit_code: int
    message: str
    step: int
    last_lines: list[str]
    task: Task | None
    alone: bool = True  # a group of one process

    def show(self, final: bool) -> None:
        if self.last_lines and final:
            print(f"--- the last lines of {self.task} ---", *self.last_lines, "---", sep="\n", file=sys.stderr)
        if "exit code" not in self.message:
            say(f"{self.message} (exit code {self.exit_code})")
        else:
            error = uncaught_error(self.last_lines)
            hint = _SAME_FOLDER if error.startswith("FileExistsError") and not self.alone else ""
            say(f"{self.message}: {error[:_LONGEST_ERROR]}{hint}" if error else self.message)


def uncaught_error(lines: Sequence[str]) -> str:
    """The line that ends the last traceback among the last lines of a program; empty: there is none. Python also shows
    errors of `__del__`, which end nothing."""
    error, ignored = "", False
    in_traceback = bool(lines) and lines[0][:1].isspace()  # of one whose first lines are gone
    for line in lines:
        if line.startswith("Exception ignored in"):
            ignored = True
        elif line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif in_traceback and _ERROR.match(line):
            error = error if ignored else line
            in_traceback = ignored = False
    return error


def _cause(members: list[Member]) -> Failure:
    """The first failure: what most supervisors were told, or the end of a supervisor itself; a lost peer comes last."""
    evaluators = [m for m in members if m.task.type == "evaluator"]
    deciding = _deciding([m for m in members if m not in evaluators])
    if all(m.verdict()["exit_code"] == DONE for m in deciding):  # then a failure of the evaluator counts
        deciding = deciding + evaluators
    ends = [(m.ended_s, m.verdict(), m) for m in deciding]
    failed = [end for end in ends if end[1]["exit_code"] not in (DONE, STOPPED)]
    if not failed:
        stopped = any(end[1]["exit_code"] == STOPPED for end in ends)
        return Failure(STOPPED if stopped else DONE, "", 0, [], None)
    own = [end for end in failed if end[1]["exit_code"] != PEER_LOST] or failed
    _, verdict, member = min(own, key=lambda end: end[0])
    blamed = Task(*verdict["task"]) if verdict["task"] else member.task
    lines = next((list(m.last_lines) for m in members if m.task == blamed), [])
    return Failure(verdict["exit_code"], verdict["message"], verdict["step"], lines, blamed, len(members) == 1)


def _deciding(group: list[Member]) -> list[Member]:
    """Those by whose ends a group is judged: a chief that got there, whoever of the others was lost on the way; else all."""
    chiefs = [m for m in group if m.task.type == "chief" and m.verdict()["exit_code"] in (DONE, STOPPED)]
    return chiefs or group
