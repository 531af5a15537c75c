"""Who does what in a group on this machine: tasks, addresses, GPUs. Pure, but for asking which GPUs there are."""

import dataclasses
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from tfdist.cluster.spec import Cluster, Task


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
    data_workers: int = 0  # of a data service beside them; 0: none
    all_output: bool = False  # show what every process prints, not the chief and the evaluator alone


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
        logging.warning("%d GPUs for %d workers of %d: all run on the CPU", len(gpus), group.num_workers, share or 1)
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
