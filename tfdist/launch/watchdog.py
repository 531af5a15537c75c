"""Who is dead, frozen, silent or stuck: pure functions over what was last heard of each process."""

import dataclasses
import signal

from tfdist.cluster.spec import Task
from tfdist.errors import DONE, PEER_LOST, STOPPED, WATCHDOG, one_line

EXIT_TIMEOUT_S = 60.0  # of a process that has said that it ends: TensorFlow is slow to go on a machine that is busy
_LATE_S = 2.5  # several beats and the longest time that Python's lock is held


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds. What may take long (import, building, compiling, saving) is under `start_timeout_s`."""

    start_timeout_s: float = 300.0
    step_timeout_s: float = 300.0
    heartbeat_timeout_s: float = 30.0

    @property
    def late_s(self) -> float:
        """A supervisor that comes to look so much too late has itself stood still, and knows nothing of the others. Not
        less: on a busy machine it would never judge."""
        return min(_LATE_S, self.heartbeat_timeout_s / 2)

    def of(self, seen: "Seen") -> float:
        """How long this task may stand still."""
        if seen.phase in ("wait", "serve"):  # an evaluator without a new checkpoint; a server
            return float("inf")
        if not seen.must_beat and seen.phase in ("start", "import", "build", "callbacks", "finish"):
            return float("inf")  # a program of the user's: what it does before and after training is its own business
        return self.step_timeout_s if seen.phase in ("train", "evaluate") and not seen.exiting else self.start_timeout_s


@dataclasses.dataclass
class Seen:
    """What the watchdog knows of one task; times are of the monotonic clock."""

    task: Task
    heard_s: float  # when its supervisor last said anything
    moved_s: float  # when its training last went forward
    beat_s: float | None = None  # when the process itself last beat; None: it never has (a program without tfdist)
    must_beat: bool = False  # it is a tfdist program: not even a first beat means that its start hangs
    suspended: bool = False  # the system says that it is stopped (SIGSTOP)
    phase: str = "start"
    exiting: bool = False  # the interpreter is going down; `phase` stays what it was
    step: int = 0
    batches: int = 0
    steps: int = 0
    ticks: int = 0
    exit_code: int | None = None
    exited_s: float = 0.0

    def hear(self, status: dict, now_s: float) -> None:
        """Takes over a status message of its supervisor."""
        self.heard_s = now_s
        silent_s = status.get("silent_s")
        self.beat_s = None if silent_s is None else now_s - float(silent_s)
        self.suspended, self.must_beat = bool(status.get("suspended")), bool(status.get("must_beat"))
        before = (self.phase, self.batches, self.steps, self.ticks)
        phase = one_line(status.get("phase", self.phase), 40)
        self.exiting = phase == "exit" or bool(status.get("exiting"))
        self.phase = phase if phase != "exit" else self.phase
        for name in ("step", "batches", "steps", "ticks"):
            setattr(self, name, int(status.get(name, getattr(self, name))))
        if before != (self.phase, self.batches, self.steps, self.ticks):
            self.moved_s = now_s

    def renew(self, now_s: float) -> None:
        """Gives it a new heartbeat, and new time for its next step."""
        self.heard_s = self.moved_s = now_s
        self.beat_s = None if self.beat_s is None else now_s

    @property
    def beat_age_s(self) -> float:
        """How old its last beat was when its supervisor was last heard: what came then nobody knows."""
        return 0.0 if self.beat_s is None else self.heard_s - self.beat_s

    def at(self) -> str:
        return f"phase {self.phase}, step {self.step}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why a group ends. `task` is to blame; None: nobody (all done, or told to stop)."""

    exit_code: int
    message: str
    task: Task | None = None
    step: int = 0
    stacks: bool = False  # whether the stacks of all processes are wanted


def judge(everyone: list[Seen], limits: Limits, now_s: float, own_reason_first_s: float = 0.4) -> Verdict | None:
    """The reason to end the group now, if there is one. A peer's loss is blamed on somebody else if anybody fits."""
    step = max((seen.step for seen in everyone), default=0)
    if any(seen.task.type == "ps" for seen in everyone):
        if everyone[0].exit_code in (DONE, STOPPED):
            return Verdict(everyone[0].exit_code, "the chief is done", None, step)  # servers and their workers never end
        workers = [seen for seen in everyone if seen.task.type == "worker"]
        without = [seen for seen in workers if is_frozen(seen, limits)]  # its own supervisor starts it again
        lost = [seen for seen in workers if is_lost(seen, limits, now_s)]
        without += lost if len(lost) < len(workers) else []  # the others go on
        first = min(lost, key=lambda seen: seen.exited_s, default=None)
        if workers and len(lost) == len(workers) and (first.exit_code is None or first.exit_code > 128):
            message = f"all workers are lost; {first.task} {describe_exit(first.exit_code or PEER_LOST)}"
            return Verdict(PEER_LOST, message, None, step)
        everyone = [seen for seen in everyone if seen not in without]
    failed = [seen for seen in everyone if seen.exit_code not in (None, DONE, STOPPED)]
    causes = [seen for seen in failed if seen.exit_code != PEER_LOST]
    if causes:
        first = min(causes, key=lambda seen: seen.exited_s)
        if now_s - first.exited_s >= own_reason_first_s or len(failed) == len(everyone):
            message = f"{first.task} {describe_exit(first.exit_code)} ({first.at()})"
            return Verdict(first.exit_code, message, first.task, first.step)
        return None
    running = [seen for seen in everyone if seen.exit_code is None and not seen.exiting]
    late = [seen for seen in running if seen.suspended or seen.beat_age_s > _LATE_S]
    late = [seen for seen in late if not _may_beat_late(seen) and now_s - seen.heard_s <= _LATE_S]
    if failed and late:  # the others noticed before its heartbeat ran out
        return Verdict(WATCHDOG, f"{late[0].task} is frozen ({late[0].at()})", late[0].task, late[0].step, stacks=True)
    quiet = [seen for seen in running if now_s - seen.heard_s > _LATE_S]
    if failed and quiet:
        return _is_silent(quiet[0], now_s, step)
    if failed and now_s - min(seen.exited_s for seen in failed) >= 2 * own_reason_first_s:
        first = min(failed, key=lambda seen: seen.exited_s)
        return Verdict(PEER_LOST, f"{first.task} lost a peer ({first.at()})", first.task, first.step)
    if all(seen.exit_code is not None for seen in everyone):
        if any(seen.exit_code == STOPPED for seen in everyone):
            return Verdict(STOPPED, "stopped", None, step)
        return Verdict(PEER_LOST, "every process lost a peer", None, step) if failed else Verdict(DONE, "done", None, step)
    return _without_a_sign(everyone, limits, now_s, step) or _stuck(everyone, limits, now_s, step)


def is_lost(seen: Seen, limits: Limits, now_s: float) -> bool:
    """Whether a worker of parameter servers, which training can do without, is gone."""
    return seen.exit_code is not None or now_s - seen.heard_s > limits.heartbeat_timeout_s


def is_frozen(seen: Seen, limits: Limits) -> bool:
    """Whether a process had not beaten for too long when its own supervisor was last heard."""
    return seen.exit_code is None and seen.beat_age_s > _beat_limit_s(seen, limits)


def _beat_limit_s(seen: Seen, limits: Limits) -> float:
    """How long no thread of a process may beat."""
    if seen.exiting:  # its last beat said so: Python has ended its threads, and TensorFlow takes its own apart
        return max(limits.heartbeat_timeout_s, EXIT_TIMEOUT_S)
    return limits.start_timeout_s if _may_beat_late(seen) else limits.heartbeat_timeout_s


def _may_beat_late(seen: Seen) -> bool:
    """TensorFlow holds Python's lock while its libraries are loaded, and until all members have come."""
    return seen.phase in ("import", "connect") and not seen.suspended


def _without_a_sign(everyone: list[Seen], limits: Limits, now_s: float, step: int) -> Verdict | None:
    for seen in everyone:
        if seen.exit_code is not None:
            continue
        if now_s - seen.heard_s > limits.heartbeat_timeout_s:
            return _is_silent(seen, now_s, step)
        if is_frozen(seen, limits):
            where = " at its exit" if seen.exiting else ""
            message = f"{seen.task} is frozen{where}: no heartbeat for {seen.beat_age_s:.1f} s ({seen.at()})"
            return Verdict(WATCHDOG, message, seen.task, step, stacks=True)
        if seen.beat_s is None and seen.suspended and seen.heard_s - seen.moved_s > limits.heartbeat_timeout_s:
            return Verdict(WATCHDOG, f"{seen.task} is frozen: its process is stopped", seen.task, step, stacks=True)
    return None


def _is_silent(seen: Seen, now_s: float, step: int) -> Verdict:
    return Verdict(PEER_LOST, f"{silent(seen.task, now_s - seen.heard_s)} ({seen.at()})", seen.task, step, stacks=True)


def silent(task: Task, seconds: float) -> str:
    """What is said of a machine whose supervisor is not heard: what its process does is not known."""
    return f"{task} is silent: network or machine; nothing of its supervisor for {seconds:.1f} s"


def _stuck(everyone: list[Seen], limits: Limits, now_s: float, step: int) -> Verdict | None:
    """In a synchronous group whoever waits for others looks stuck too, so only a group that all stands still is stuck,
    each by the limit of its own phase; then those who are furthest behind are to blame."""
    running = [seen for seen in everyone if seen.exit_code is None and (seen.beat_s is not None or seen.must_beat)]
    running = [seen for seen in running if seen.phase != "serve"]  # who asks them stands still, if anybody does
    if not running or any(now_s - seen.moved_s <= limits.of(seen) for seen in running):
        return None
    least = min((seen.steps, seen.batches) for seen in running)
    behind = [seen for seen in running if (seen.steps, seen.batches) == least]
    most = max(seen.batches for seen in running)
    seconds = now_s - max(seen.moved_s for seen in running)
    if len(behind) == len(running) and len(running) > 1:
        where = ", ".join(f"{seen.task} in {seen.at()}" for seen in running[:8])
        return Verdict(WATCHDOG, f"stuck: nobody went forward for {seconds:.1f} s: {where}", None, step, stacks=True)
    names = ", ".join(f"{seen.task} ({seen.at()}, batch {seen.batches + 1} not fetched)" if seen.batches < most
                      else f"{seen.task} ({seen.at()})" for seen in behind[:8])  # fmt: skip
    others = " while the others wait" if len(running) > 1 else ""
    verb = "is" if len(behind) == 1 else "are"
    return Verdict(WATCHDOG, f"stuck: {names} {verb} behind for {seconds:.1f} s{others}", behind[0].task, step, stacks=True)


def describe_exit(code: int) -> str:
    if code > 128 and code - 128 in {s.value for s in signal.Signals} and code not in (PEER_LOST, WATCHDOG, STOPPED):
        return f"was killed by signal {code - 128} ({signal.Signals(code - 128).name})"
    return f"ended with exit code {code}"
