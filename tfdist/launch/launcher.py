"""One cluster on this machine: ports, TF_CONFIG for each task, prefixed logs, restarts, and nothing left behind."""

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tfdist.cluster import ports
from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import DONE, PEER_LOST, STOPPED, WATCHDOG
from tfdist.launch import restarts
from tfdist.launch.supervisor import LAUNCHER_FD, MAX_RESTARTS, handle_signals
from tfdist.launch.watchdog import describe_exit

_LAST_LINES = 50
_LAST_EVALUATION_S = 600.0  # an evaluator may go on for so long after the end of training
_END_GRACE_S = 4.0  # from the first supervisor's end to the last one's, then they are killed


@dataclasses.dataclass(frozen=True)
class Group:
    """What to launch. `command` runs in every task, a supervisor over the training process."""

    command: Sequence[str]
    num_workers: int
    num_ps: int = 0
    evaluator: bool = False
    devices_per_worker: int = 0
    max_restarts: int = 0
    log_dir: Path = Path("logs")


def run(group: Group) -> int:
    """Runs the group to its end, restarts included. Returns the exit code."""
    return asyncio.run(Launcher(group).run())


class Launcher:
    def __init__(self, group: Group):
        self.group = group
        num_tasks = group.num_workers + group.num_ps + bool(group.num_ps)
        self.reserved = [ports.reserve() for _ in range(num_tasks)]
        self.clusters = clusters(group, [f"localhost:{s.getsockname()[1]}" for s in self.reserved])
        self.token = secrets.token_hex(16)
        self.members: list[Member] = []
        self.stopping = False
        self.budget = restarts.Budget(group.max_restarts)

    async def run(self) -> int:
        handle_signals(asyncio.get_running_loop(), self._on_signal)
        self.group.log_dir.mkdir(parents=True, exist_ok=True)
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
                        _say(f"no restart: {self.budget.why_not(failure.exit_code)}")
                    return failure.exit_code
                _say(f"restart {self.budget.used} of {self.budget.max_restarts} of the whole group in {wait_s:g} s")
                await self._sleep(wait_s)
                if self.stopping:
                    return STOPPED
        finally:
            for member in self.members:
                member.kill()

    def _restarts_alone(self, failure: "Failure") -> bool:
        if failure.task is None or failure.exit_code == PEER_LOST:
            return False
        return restarts.POLICY[failure.task.type, bool(self.group.num_ps)] == restarts.ALONE

    async def _sleep(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not self.stopping:
            await asyncio.sleep(0.05)

    def _on_signal(self) -> None:
        if not self.stopping:
            _say("stopping: every process saves the same step (once more: stop at once)")
        for member in self.members:
            member.signal(signal.SIGTERM)  # a supervisor's second one kills
        self.stopping = True

    async def _run_once(self) -> "Failure":
        """Starts everyone, waits until all are gone."""
        devices = gpus_of_workers(self.group, os.environ)
        self.members = [Member(self.group, cluster, self._environment(cluster, devices)) for cluster in self.clusters]
        if self.stopping:
            self._on_signal()
        group = [m for m in self.members if m.task.type != "evaluator"]
        await self._wait(group)
        for member in self.members:
            if member.task.type == "evaluator":
                await self._end_evaluator(member, group)
        for member in self.members:
            await member.finish_logs()
        return _cause(self.members)

    async def _wait(self, members: list["Member"]) -> None:
        """Until all have ended; from the first failure on they have a few seconds left."""
        give_up_s = float("inf")
        while any(member.poll() is None for member in members):
            await asyncio.sleep(0.02)
            failed = any(m.poll() not in (None, DONE, STOPPED) for m in members)
            if failed:
                give_up_s = min(give_up_s, time.monotonic() + _END_GRACE_S)
            if time.monotonic() > give_up_s:
                for member in members:
                    member.kill()

    async def _end_evaluator(self, evaluator: "Member", group: list["Member"]) -> None:
        """It ends by itself after the last checkpoint; it is told to when the group did not get that far."""
        patience_s = _LAST_EVALUATION_S if all(member.poll() == DONE for member in group) else 0.0
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
        if self.group.devices_per_worker:
            own["TFDIST_DEVICES_PER_WORKER"] = str(self.group.devices_per_worker)
        if cluster.task in devices:
            own["CUDA_VISIBLE_DEVICES"] = devices[cluster.task]
        elif "TF_NUM_INTRAOP_THREADS" not in os.environ:  # else every worker would start a thread for every core
            own["TF_NUM_INTRAOP_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.group.num_workers))
        # `python` is the one that runs the launcher, also when its environment is not activated
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, **own}


def clusters(group: Group, addresses: Sequence[str]) -> list[Cluster]:
    """One `Cluster` per process. With servers there is one process more, the chief; without, worker 0 is the chief."""
    addresses, n = list(addresses), int(bool(group.num_ps))
    jobs = {
        "chief": tuple(addresses[:n]),
        "worker": tuple(addresses[n : n + group.num_workers]),
        "ps": tuple(addresses[n + group.num_workers : n + group.num_workers + group.num_ps]),
    }
    tasks = [Task(job, i) for job in jobs for i in range(len(jobs[job]))]
    tasks += [Task("evaluator", 0)] if group.evaluator else []
    return [Cluster(**jobs, task=task, source="tfdist launch") for task in tasks]


def gpus_of_workers(group: Group, environ: Mapping[str, str]) -> dict[Task, str]:
    """CUDA_VISIBLE_DEVICES of each task: equal, disjoint shares for the workers, none for the others.

    Empty without GPUs: then nothing is set. Left-over GPUs stay idle, so that all workers have as many.
    """
    gpus = visible_gpus(environ)
    if not gpus:
        return {}
    share = group.devices_per_worker or len(gpus) // group.num_workers
    if share == 0 or share * group.num_workers > len(gpus):
        _say(f"warning: {len(gpus)} GPUs for {group.num_workers} workers of {share or 1}: all run on the CPU")
        share = 0
    devices = {Task("worker", i): ",".join(gpus[i * share : (i + 1) * share]) or "-1" for i in range(group.num_workers)}
    servers = {Task("ps", i): "-1" for i in range(group.num_ps)}
    return devices | servers | {Task("chief", 0): "-1", Task("evaluator", 0): "-1"}


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else what nvidia-smi lists, by index."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [gpu for gpu in environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu and gpu != "-1"]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


@dataclasses.dataclass
class Failure:
    """The cause of a group's end, whoever noticed it."""

    exit_code: int
    message: str
    step: int
    last_lines: list[str]
    task: Task | None

    def show(self, final: bool) -> None:
        if self.last_lines and final and self.exit_code != WATCHDOG:  # else they are stacks, and were printed just now
            print(f"--- the last lines of {self.task} ---", *self.last_lines, "---", sep="\n", file=sys.stderr)
        _say(self.message + ("" if "exit code" in self.message else f" (exit code {self.exit_code})"))


def _cause(members: list["Member"]) -> Failure:
    """The first failure: what most supervisors were told, or the end of a supervisor itself; a lost peer comes last."""
    everyone = [(m.ended_s, m.verdict(), m) for m in members]
    ends = [end for end in everyone if end[2].task.type != "evaluator"]
    if all(end[1]["exit_code"] == DONE for end in ends):  # then a failure of the evaluator counts
        ends = everyone
    failed = [end for end in ends if end[1]["exit_code"] not in (DONE, STOPPED)]
    if not failed:
        stopped = any(end[1]["exit_code"] == STOPPED for end in ends)
        return Failure(STOPPED if stopped else DONE, "", 0, [], None)
    own = [end for end in failed if end[1]["exit_code"] != PEER_LOST] or failed
    _, verdict, member = min(own, key=lambda end: end[0])
    blamed = Task(*verdict["task"]) if verdict["task"] else member.task
    lines = next((list(m.last_lines) for m in members if m.task == blamed), [])
    return Failure(verdict["exit_code"], verdict["message"], verdict["step"], lines, blamed)


class Member:
    """One supervisor that this launcher started."""

    def __init__(self, group: Group, cluster: Cluster, environment: Mapping[str, str]):
        self.task = cluster.task
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.received, self.child_pid, self.end = b"", 0, None
        self.killed = False
        self.ended_s = float("inf")
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.log: IO[bytes] = open(group.log_dir / f"{self.task.type}-{self.task.index}.log", "ab", buffering=0)  # noqa: SIM115
        self.process = subprocess.Popen(
            group.command, env={**environment, LAUNCHER_FD: str(theirs.fileno())}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.ours, self._hear)
        self.streams = [
            asyncio.ensure_future(self._forward(self.process.stdout, sys.stdout)),
            asyncio.ensure_future(self._forward(self.process.stderr, sys.stderr)),
        ]

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            received = self.ours.recv(1 << 16)
            if not received:
                asyncio.get_running_loop().remove_reader(self.ours)
            *lines, self.received = (self.received + received).split(b"\n")
            for message in map(json.loads, lines):
                self.child_pid = message.get("child", self.child_pid)
                self.end = message.get("end", self.end)

    async def _forward(self, pipe: IO[bytes], to: IO[str]) -> None:
        """Whole lines, with a prefix, to the launcher's own output; all bytes to the log."""
        reader = asyncio.StreamReader(limit=1 << 20)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        rest = b""
        while received := await reader.read(1 << 16):
            *lines, rest = (rest + received).split(b"\n")
            if len(rest) > 1 << 20:
                lines, rest = [*lines, rest], b""
            self._emit(lines, to)
        self._emit([rest] if rest else [], to)

    def _emit(self, lines: list[bytes], to: IO[str]) -> None:
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]  # of a progress bar, its last state
            self.last_lines.append(text)
            with contextlib.suppress(OSError):  # whoever read our output is gone; training is not
                print(f"[{self.task}] {text}", file=to, flush=True)
        with contextlib.suppress(OSError):  # a full disk must not end the run either
            self.log.write(b"".join(line + b"\n" for line in lines))

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None and self.ended_s == float("inf"):
            self.ended_s = time.monotonic()
        return code if code is None or code >= 0 else 128 - code

    def verdict(self) -> dict[str, Any]:
        """What the supervisor reported, or what its own end says."""
        code = self.poll()
        if self.end is not None:
            return self.end
        if self.killed or code is None:
            return {"exit_code": PEER_LOST, "message": f"{self.task} had to be killed", "task": None, "step": 0}
        message = f"the supervisor of {self.task} {describe_exit(code)}"
        return {"exit_code": code, "message": message, "task": [self.task.type, self.task.index], "step": 0}

    def signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """The supervisor, its child, and what they started."""
        self.killed = self.killed or self.process.poll() is None
        for group in (self.child_pid, self.process.pid):
            if group:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)

    async def finish_logs(self) -> None:
        """What was written last; a stray grandchild that holds a pipe open is not waited for."""
        await asyncio.wait(self.streams, timeout=1.0)
        for stream in self.streams:
            stream.cancel()
        with contextlib.suppress(ValueError):
            asyncio.get_running_loop().remove_reader(self.ours)
        self._hear()
        self.log.close()
        self.ours.close()


def _say(text: str) -> None:
    print(f"tfdist: {text}", file=sys.stderr, flush=True)
