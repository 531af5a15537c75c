"""Who I am and who we all are: frozen values. No TensorFlow, no network. `tf_config.py` reads them from TF_CONFIG."""

import dataclasses
import hashlib
import json

from tfdist.errors import UserError

JOBS = ("chief", "worker", "ps", "evaluator")


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
        tree = {"cluster": self.jobs(), "task": {"type": self.task.type, "index": self.task.index}}
        return json.dumps(tree, separators=(",", ":"))

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
    """`"[::1]:2222"` -> `("::1", 2222)`. For addresses that `tf_config.py` accepts."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
