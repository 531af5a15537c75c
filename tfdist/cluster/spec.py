"""Who I am and who we all are: frozen values, in and out of TF_CONFIG. No TensorFlow, no network.

The parser is strict by construction: every field has a type, a range and a place; what has none of them is refused with
one line, `TF_CONFIG: <field>: <what>, got <value>; <hint>`.
"""

import dataclasses
import difflib
import hashlib
import ipaddress
import itertools
import json
import re
from typing import Any

from tfdist.errors import UserError

JOBS = ("chief", "worker", "ps", "evaluator")
MAX_BYTES = 1 << 20
MAX_DEPTH = 8


class TFConfigError(UserError):
    """TF_CONFIG cannot be used; one line that says which field and why."""


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """One process of a cluster."""

    type: str  # chief | worker | ps | evaluator
    index: int

    def __str__(self) -> str:
        return f"{self.type} {self.index}"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """All processes, by role ("host:port" each), and which of them this one is.

    An evaluator is never part of the group that trains together; it need not be listed and may have no address.
    """

    chief: tuple[str, ...] = ()
    worker: tuple[str, ...] = ()
    ps: tuple[str, ...] = ()
    evaluator: tuple[str, ...] = ()
    task: Task = Task("worker", 0)
    source: str = dataclasses.field(default="nothing", compare=False)  # where this came from, for people

    @property
    def is_local(self) -> bool:
        """Nobody else: this process trains alone."""
        return not (self.chief or self.worker or self.ps)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Everyone who must be there before training starts; the leader first. Never an evaluator."""
        return tuple(Task(job, i) for job in ("chief", "worker", "ps") for i in range(len(getattr(self, job))))

    @property
    def collective(self) -> tuple[Task, ...]:
        """Those who compute gradients together: the chief and the workers, in the order of their replicas."""
        return tuple(task for task in self.tasks if task.type in ("chief", "worker"))

    @property
    def leader(self) -> Task:
        """The chief, else worker 0: the one that writes."""
        return (self.tasks or (self.task,))[0]

    @property
    def is_chief(self) -> bool:
        return self.task == self.leader

    def address(self, task: Task) -> str | None:
        """host:port; None for an evaluator that is not listed, and for a process that is alone."""
        addresses = getattr(self, task.type)
        return addresses[task.index] if task.index < len(addresses) else None

    def jobs(self) -> dict[str, list[str]]:
        """What a TF_CONFIG has under `cluster`."""
        return {job: list(getattr(self, job)) for job in JOBS if getattr(self, job)}

    def to_tf_config(self) -> str:
        if self.is_local and self.task.type != "evaluator":
            return "{}"
        return json.dumps({"cluster": self.jobs(), "task": {"type": self.task.type, "index": self.task.index}})

    def identity(self) -> str:
        """A name for this set of processes, the same in each of them. It is not a secret."""
        members = {job: addresses for job, addresses in self.jobs().items() if job != "evaluator"}
        return hashlib.sha256(json.dumps(members, sort_keys=True).encode()).hexdigest()[:32]


def check_strategy(cluster: Cluster, kind: str) -> None:
    """Raises `TFConfigError` for a cluster that the strategy kind (`strategy.kind` of a config) cannot use."""
    if kind in ("one_device", "mirrored") and len(cluster.collective) > 1 and cluster.task.type != "evaluator":
        raise TFConfigError(
            f"TF_CONFIG: cluster: has {len(cluster.collective)} tasks, got strategy.kind={kind}, which trains alone; use "
            "multi_worker or auto, or unset TF_CONFIG"
        )
    if kind in ("multi_worker", "parameter_server") and cluster.source == "nothing":
        raise TFConfigError(
            f"TF_CONFIG: not set; strategy.kind={kind} needs a cluster: set it in each process, or start with tfdist launch"
        )
    if kind == "parameter_server" and not cluster.ps:
        raise TFConfigError(f"TF_CONFIG: cluster.ps: missing; strategy.kind={kind} needs at least one server")
    if kind == "multi_worker" and cluster.ps:
        raise TFConfigError(
            f"TF_CONFIG: cluster.ps: ps needs strategy.kind=parameter_server, got {kind!r}; leave the servers out"
        )


def split_address(address: str) -> tuple[str, int]:
    """`"[::1]:2222"` -> `("::1", 2222)`. For addresses that `from_tf_config` accepted."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


# ---- reading TF_CONFIG ----


def from_tf_config(text: str | bytes) -> tuple[Cluster, list[str]]:
    """The cluster, and warnings for a person. Raises `TFConfigError`; resolves no host name, opens no socket."""
    tree = _parse(text)
    if tree == {}:
        return Cluster(source="TF_CONFIG"), ["TF_CONFIG: is {}: a single worker, on its own"]
    _only_known("", tree, _TOP_FIELDS)
    jobs = _jobs(tree)
    task, warnings = _task(tree, jobs)
    return Cluster(**jobs, task=task, source="TF_CONFIG"), warnings


_TOP_FIELDS = {"cluster", "task", "environment", "rpc_layer", "job"}  # the last three: what cloud services add
_TASK_FIELDS = {"type", "index", "trial", "cloud"}
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def _parse(text: str | bytes) -> dict[str, Any]:
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise TFConfigError(
            f"TF_CONFIG: is longer than {MAX_BYTES} bytes, got {len(text)} characters; is it the right file?"
        )
    if not text.strip():
        raise TFConfigError(f"TF_CONFIG: is empty, got {_short(text)}; unset it to train on this machine alone")
    brackets = re.sub(r"[^\[\]{}]+", "", _STRING.sub("", text))[:10_000]
    depth = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    if max(depth, default=0) > MAX_DEPTH:
        raise TFConfigError(f"TF_CONFIG: too deep, got {_short(text)}; expected at most {MAX_DEPTH} nested brackets")
    try:
        tree = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeated_keys)
    except json.JSONDecodeError as error:
        raise TFConfigError(
            f"TF_CONFIG: not JSON at column {error.pos + 1}, got {_short(text)}; {' '.join(error.msg.split())}"
        ) from None
    except RecursionError:
        raise TFConfigError(f"TF_CONFIG: too deep, got {_short(text)}") from None
    except TFConfigError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise TFConfigError(f"TF_CONFIG: not JSON, got {_short(text)}; {' '.join(str(error).split())[:80]}") from None
    _must_be("", tree, dict)
    return tree


def _no_constant(name: str) -> None:
    raise TFConfigError(f"TF_CONFIG: not JSON ({name}), got {name}; JSON has finite numbers only")


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in tree:
            raise TFConfigError(f"TF_CONFIG: a key stands twice, got {_short(name)}; leave one out")
        tree[name] = value
    return tree


def _jobs(tree: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    if tree.get("rpc_layer", "grpc") != "grpc":
        raise TFConfigError(f"TF_CONFIG: rpc_layer: must be 'grpc', got {_short(tree['rpc_layer'])}; leave it out")
    if tree.get("environment") is not None:
        _must_be("environment", tree["environment"], str)
    if tree.get("cluster") is None:
        raise TFConfigError("TF_CONFIG: cluster: missing; give the addresses of all tasks")
    cluster = tree["cluster"]
    _must_be("cluster", cluster, dict)
    if not cluster:
        raise TFConfigError("TF_CONFIG: cluster: has no jobs, got {}; give at least one worker")
    jobs: dict[str, tuple[str, ...]] = {}
    seen: dict[str, str] = {}
    for job, addresses in cluster.items():
        _known_job("cluster", job)
        if isinstance(addresses, dict):
            raise TFConfigError(
                f"TF_CONFIG: cluster.{job}: sparse cluster not supported, got {_short(addresses)}; list every address"
            )
        _must_be(f"cluster.{job}", addresses, list)
        if not addresses:
            raise TFConfigError(f"TF_CONFIG: cluster.{job}: empty, got []; give its addresses or leave it out")
        if job in ("chief", "evaluator") and len(addresses) > 1:
            raise TFConfigError(f"TF_CONFIG: cluster.{job}: at most one {job}, got {len(addresses)}; the others are workers")
        for i, address in enumerate(addresses):
            normal = _normal_address(f"cluster.{job}[{i}]", address)
            if normal in seen:
                raise TFConfigError(
                    f"TF_CONFIG: cluster: cluster.{job}[{i}] repeats {seen[normal]}, got {_short(address)}; each task needs "
                    "its own host:port"
                )
            seen[normal] = f"{job}[{i}]"
        jobs[job] = tuple(addresses)
    if not (jobs.get("chief") or jobs.get("worker")):
        raise TFConfigError(f"TF_CONFIG: cluster: has no worker and no chief, got {_short(cluster)}; nobody would train")
    return jobs


def _normal_address(field: str, address: Any) -> str:
    """Checks host:port and returns a form in which equal addresses are equal."""
    _must_be(field, address, str)
    got = f"got {_short(address)}"
    if "://" in address:
        scheme = address.partition("://")[0]
        raise TFConfigError(f"TF_CONFIG: {field}: needs host:port, {got}; give host:port, without {_plain(scheme)}://")
    if re.search(r"\s", address):
        raise TFConfigError(f"TF_CONFIG: {field}: host has a space, {got}; give host:port")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port:
        raise TFConfigError(f"TF_CONFIG: {field}: needs host:port, {got}; for example '10.0.0.1:2222'")
    if host.startswith("[") or host.endswith("]") or ":" in host:
        host = _normal_ipv6(field, address, host)
    elif not _HOST.fullmatch(host):
        raise TFConfigError(f"TF_CONFIG: {field}: not a host name, {got}; letters, digits, '.', '-' and '_' only")
    if not re.fullmatch("[0-9]+", port):
        raise TFConfigError(f"TF_CONFIG: {field}: port is not a number, {got}; for example '10.0.0.1:2222'")
    if len(port) > 5 or port.startswith("0") or not 1 <= int(port) <= 65535:
        raise TFConfigError(f"TF_CONFIG: {field}: needs host:port, {got}; a port is 1 to 65535")
    return f"{host.lower()}:{int(port)}"


def _normal_ipv6(field: str, address: str, host: str) -> str:
    if not (host.startswith("[") and host.endswith("]")):
        raise TFConfigError(
            f"TF_CONFIG: {field}: several colons, got {_short(address)}; write IPv6 as [::1]:2222, others as host:port"
        )
    try:
        return f"[{ipaddress.IPv6Address(host[1:-1])}]"
    except ValueError:
        raise TFConfigError(
            f"TF_CONFIG: {field}: not an IPv6 address in brackets, got {_short(address)}; write IPv6 as [::1]:2222"
        ) from None


def _task(tree: dict[str, Any], jobs: dict[str, tuple[str, ...]]) -> tuple[Task, list[str]]:
    task, warnings = tree.get("task"), []
    if task is None:
        raise TFConfigError("TF_CONFIG: task: missing; say which task this process is, for example "
                            '{"type": "worker", "index": 0}')  # fmt: skip
    _must_be("task", task, dict)
    _only_known("task.", task, _TASK_FIELDS)
    for name in ("trial", "cloud"):
        if task.get(name) is not None:
            _must_be(f"task.{name}", task[name], str)
    if task.get("type") is None:
        raise TFConfigError("TF_CONFIG: task.type: missing; one of " + ", ".join(JOBS))
    _must_be("task.type", task["type"], str)
    job = task["type"]
    _known_job("task.type", job)
    if job not in jobs and job != "evaluator":
        raise TFConfigError(f"TF_CONFIG: task.type: the cluster has no {job}, got {job!r}; it has {', '.join(jobs)}")
    index = task.get("index")
    if index is None:
        raise TFConfigError("TF_CONFIG: task.index: missing; the place of this task in its job, from 0")
    if isinstance(index, str) and _INDEX.fullmatch(index):
        warnings.append(f"TF_CONFIG: task.index: a string, got {_short(index)}; read as the number {index}")
        index = int(index)
    _must_be("task.index", index, int)
    if index < 0:
        raise TFConfigError(f"TF_CONFIG: task.index: must be ≥ 0, got {_short(index)}; the first task is 0")
    count = len(jobs.get(job, ())) or 1  # an evaluator that is not listed is the only one
    if index >= count:
        tasks = "1 task" if count == 1 else f"{count} tasks"
        raise TFConfigError(f"TF_CONFIG: task.index: {_short(index)}, but {job} has {tasks} (0…{count - 1})")
    return Task(job, index), warnings


_JSON_NAMES = {dict: "object", list: "list", str: "string", bool: "bool", int: "integer", float: "float", type(None): "null"}


def _must_be(field: str, value: Any, expected: type) -> None:
    if type(value) is expected:
        return
    kind = _JSON_NAMES[type(value)]
    article = "an" if expected in (dict, int) else "a"
    where = f"{field}: " if field else ""
    got = kind if value is None else f"{kind} {_short(value)}"
    raise TFConfigError(f"TF_CONFIG: {where}must be {article} {_JSON_NAMES[expected]}, got {got}")


def _only_known(prefix: str, tree: dict[str, Any], known: set[str]) -> None:
    for name in tree:
        if name not in known:
            raise TFConfigError(f"TF_CONFIG: {prefix}{_plain(name)}: unknown field, got {_short(name)}{_near(name, known)}")


def _known_job(field: str, job: str) -> None:
    if job not in JOBS:
        near = _near({"master": "chief"}.get(job, job), JOBS) or f"; expected {', '.join(JOBS)}"
        raise TFConfigError(f"TF_CONFIG: {field}: unknown job {_short(job)}{near}")


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name.lower()[:40], sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _short(value: Any) -> str:
    """At most 80 characters of a value, on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**60:
        return "a very large number"
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(name: str) -> str:
    return _short(name)[1:-1]
