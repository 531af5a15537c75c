"""A cluster from the environment of a Slurm step. Pure functions."""

import itertools
import re
from collections.abc import Mapping

from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import UserError

MAX_HOSTS = 1 << 16


def cluster(environ: Mapping[str, str], port: int) -> Cluster | None:
    """One worker per task of this `srun` step; None outside of a step of several tasks.

    Ports count up from `port` on each node. The batch script itself also has SLURM_PROCID; only inside a step is
    SLURM_STEP_NUM_TASKS set, so a plain command in a batch script stays alone.
    https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
    """
    if environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    try:
        count, rank = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_PROCID"])
        hosts = expand_hosts(environ["SLURM_STEP_NODELIST"])
        per_node = expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
    except KeyError as error:
        raise UserError(
            f"Slurm: expected {error.args[0]} in the environment of a step, found none; start with srun"
        ) from None
    except ValueError as error:
        raise UserError(f"Slurm: cannot read the step's environment: {error}") from None
    if len(hosts) != len(per_node) or sum(per_node) != count or not 0 <= rank < count:
        raise UserError(
            f"Slurm: expected {count} tasks on {len(hosts)} nodes, found SLURM_STEP_TASKS_PER_NODE="
            f"{environ['SLURM_STEP_TASKS_PER_NODE']!r:.80}, SLURM_PROCID={rank}"
        )
    if environ.get("SLURM_DISTRIBUTION", "block").split(",")[0].split(":")[0] not in ("block", "unknown", ""):
        raise UserError(
            f"Slurm: expected --distribution=block, found {environ['SLURM_DISTRIBUTION']!r:.80}; "
            "ranks must be placed node after node"
        )
    workers = [f"{host}:{port + i}" for host, tasks in zip(hosts, per_node, strict=True) for i in range(tasks)]
    return Cluster(worker=tuple(workers), task=Task("worker", rank), source="Slurm")


def expand_hosts(text: str) -> list[str]:
    """`"gpu[01-03,7],login"` -> `["gpu01", "gpu02", "gpu03", "gpu7", "login"]`. Several brackets multiply."""
    hosts: list[str] = []
    for item in _split_outside_brackets(text):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if not item or any(c in part for part in parts[::2] for c in "[]"):
            raise ValueError(f"not a Slurm host list: {text!r:.80}")
        choices = [[part] if i % 2 == 0 else _expand_ranges(part) for i, part in enumerate(parts)]
        hosts += ["".join(chosen) for chosen in itertools.islice(itertools.product(*choices), MAX_HOSTS + 1)]
        if len(hosts) > MAX_HOSTS:
            raise ValueError(f"more than {MAX_HOSTS} hosts: {text!r:.80}")
    return hosts


def expand_counts(text: str) -> list[int]:
    """`"2(x3),1"` -> `[2, 2, 2, 1]`."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", item)
        if not match:
            raise ValueError(f"not a Slurm task count: {text!r:.80}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split_outside_brackets(text: str) -> list[str]:
    inside = re.sub(r"\[[^\[\]]*\]", lambda brackets: brackets[0].replace(",", "\0"), text)
    return [item.replace("\0", ",") for item in inside.split(",")]


def _expand_ranges(text: str) -> list[str]:
    names: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if not match:
            raise ValueError(f"not a Slurm range: {text!r:.80}")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) >= MAX_HOSTS:
            raise ValueError(f"not a Slurm range: {text!r:.80}")
        names += [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return names
