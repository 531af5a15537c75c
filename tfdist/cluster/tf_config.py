"""TF_CONFIG into a `Cluster`. Resolves no host name, opens no socket.

Strict by construction: every field has a type, a range and a place; what has none of them is refused with one line,
`TF_CONFIG: <field>: <what>, got <value>; <hint>`.
"""

import difflib
import itertools
import json
import re
import reprlib
import socket
from typing import Any

from tfdist.cluster.spec import JOBS, Cluster, Task, TFConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 8
MAX_TASKS = 4096
_MAX_BRACKETS, _MAX_STRINGS = 10_000, 20_000


def from_tf_config(text: str | bytes) -> tuple[Cluster, list[str]]:
    """The cluster, and warnings for a person. Raises `TFConfigError`."""
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
_REPR = reprlib.Repr()  # of a large tree only the beginning
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 60, 60
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
    if text.count(",") > 2 * _MAX_STRINGS:  # of anything: parsing would take long
        raise TFConfigError(f"TF_CONFIG: more than {2 * _MAX_STRINGS} values, got {_short(text)}; is it the right file?")
    if text.count('"') > 2 * _MAX_STRINGS:
        raise TFConfigError(f"TF_CONFIG: more than {_MAX_STRINGS} strings, got {_short(text)}; is it the right file?")
    brackets = re.sub(r"[^\[\]{}]+", "", _STRING.sub("", text))
    if len(brackets) > _MAX_BRACKETS:
        raise TFConfigError(
            f"TF_CONFIG: too deep or too long, got {_short(text)}; expected at most {_MAX_BRACKETS} brackets"
        )
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
        if len(addresses) > MAX_TASKS:
            raise TFConfigError(
                f"TF_CONFIG: cluster.{job}: at most {MAX_TASKS} tasks, got {len(addresses)}; is it the right file?"
            )
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
    else:
        _check_name(field, host, got)
    if not re.fullmatch("[0-9]+", port):
        raise TFConfigError(f"TF_CONFIG: {field}: port is not a number, {got}; for example '10.0.0.1:2222'")
    if len(port) > 5 or port.startswith("0") or not 1 <= int(port) <= 65535:
        raise TFConfigError(f"TF_CONFIG: {field}: needs host:port, {got}; a port is 1 to 65535")
    return f"{host.lower().removesuffix('.')}:{int(port)}"


def _normal_ipv6(field: str, address: str, host: str) -> str:
    if not (host.startswith("[") and host.endswith("]")):
        raise TFConfigError(
            f"TF_CONFIG: {field}: several colons, got {_short(address)}; write IPv6 as [::1]:2222, others as host:port"
        )
    try:
        packed = socket.inet_pton(socket.AF_INET6, host[1:-1])
    except (OSError, ValueError):
        raise TFConfigError(
            f"TF_CONFIG: {field}: not an IPv6 address in brackets, got {_short(address)}; write IPv6 as [::1]:2222"
        ) from None
    if packed == bytes(16) or packed[0] == 0xFF:
        raise TFConfigError(
            f"TF_CONFIG: {field}: not the address of one machine, got {_short(address)}; others must reach it"
        )
    return f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"


def _check_name(field: str, host: str, got: str) -> None:
    labels = host.removesuffix(".").split(".")
    if not _HOST.fullmatch(host) or any(not 0 < len(label) <= 63 for label in labels):
        raise TFConfigError(f"TF_CONFIG: {field}: not a host name, {got}; letters, digits, '.', '-' and '_' only")
    if all(label.isdigit() for label in labels):
        try:
            packed = socket.inet_pton(socket.AF_INET, host)
        except OSError:
            raise TFConfigError(f"TF_CONFIG: {field}: not an IPv4 address, {got}; four numbers of 0 to 255") from None
        if packed[0] == 0 or packed[0] >= 224:
            raise TFConfigError(f"TF_CONFIG: {field}: not the address of one machine, {got}; others must reach it")


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
    text = repr(value[:200]) if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(name: str) -> str:
    return _short(name)[1:-1]
