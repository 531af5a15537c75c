"""What a task says of itself before training, and how two of them differ. Pure, but for who this process is."""

import contextlib
import dataclasses
import hmac
import importlib.metadata
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

from tfdist.cluster.spec import JOBS, Cluster, Task
from tfdist.errors import one_line


def versions() -> dict[str, str]:
    """Versions that must be equal on every task; read from package metadata, nothing is imported."""
    found = {}
    for name in ("tfdist", "tensorflow", "keras"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"version of {name}"] = importlib.metadata.version(name)
    return found


@dataclasses.dataclass(frozen=True)
class Hello:
    token: str  # of the job
    nonce: str  # of this process: another one in its place is found
    task: Task
    who: str  # for people: process and host
    jobs: dict[str, list[str]]  # the addresses, without an evaluator's
    facts: dict[str, Any]  # what must be equal on every task

    @classmethod
    def of(cls, cluster: Cluster, token: str, facts: Mapping[str, Any]) -> "Hello":
        jobs = {job: addresses for job, addresses in cluster.jobs().items() if job != "evaluator"}
        who = f"process {os.getpid()} on {socket.gethostname()}"
        return cls(token, secrets.token_hex(8), cluster.task, who, jobs, dict(facts))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, message: dict[str, Any] | None) -> "Hello | None":
        """None for anything that is no hello."""
        try:
            task = Task(str(message["task"]["type"]), int(message["task"]["index"]))
            jobs = {str(job): [str(address) for address in addresses] for job, addresses in message["jobs"].items()}
            facts = {str(name): value for name, value in message["facts"].items()}
            hello = cls(str(message["token"]), str(message["nonce"]), task, one_line(message["who"], 100), jobs, facts)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            return None
        return hello if {task.type, *jobs} <= set(JOBS) else None

    @property
    def is_unnamed(self) -> bool:
        """No token was given: it is the hash of the cluster."""
        known = {job: tuple(addresses) for job, addresses in self.jobs.items()}
        return self.token == Cluster(**known).identity()

    def has_token_of(self, other: "Hello") -> bool:
        return hmac.compare_digest(self.token.encode("utf-8", "replace"), other.token.encode("utf-8", "replace"))

    def difference_of_clusters(self, other: "Hello") -> str:
        """The first place where they differ, seen from here; empty: equal."""
        for job in sorted(self.jobs.keys() | other.jobs.keys()):
            here, there = self.jobs.get(job, []), other.jobs.get(job, [])
            if len(here) != len(there):
                return f"cluster.{job} has {len(here)} here, {len(there)}"
            for i, (a, b) in enumerate(zip(here, there, strict=True)):
                if a != b:
                    return f"cluster.{job}[{i}] is {a!r:.80} here, {b!r:.80}"
        return ""

    def difference_of_facts(self, other: "Hello") -> str:
        for name in sorted(self.facts.keys() | other.facts.keys()):
            mine, theirs = self.facts.get(name, "missing"), other.facts.get(name, "missing")
            if mine != theirs:
                shown = name if name in self.facts else f"{name!r:.80}"
                return f"{shown} differs: {mine!r:.80} at {self.task}, {theirs!r:.80} at {other.task}"
        return ""
