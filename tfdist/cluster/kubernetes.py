"""A cluster from the environment of a Kubernetes indexed Job. Pure functions."""

import re
from collections.abc import Mapping

from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import UserError


def cluster(environ: Mapping[str, str], port: int) -> Cluster | None:
    """One worker per completion index; None outside of an indexed Job, or without TFDIST_NUM_WORKERS.

    Kubernetes gives each pod JOB_COMPLETION_INDEX and the host name `<job>-<index>`, reachable as `<job>-<index>.<service>`
    through a headless service that the Job names as its subdomain. The manifest adds TFDIST_NUM_WORKERS and
    TFDIST_SERVICE (docs/clusters.md has one).
    https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode
    """
    if "TFDIST_NUM_WORKERS" not in environ:
        return None
    if "JOB_COMPLETION_INDEX" not in environ:
        raise UserError(
            "Kubernetes: expected JOB_COMPLETION_INDEX beside TFDIST_NUM_WORKERS, found none; the Job needs "
            "completionMode: Indexed"
        )
    index, count = environ["JOB_COMPLETION_INDEX"], environ["TFDIST_NUM_WORKERS"]
    if not all(re.fullmatch("[0-9]{1,6}", text) for text in (index, count)) or not int(index) < int(count) <= 1 << 16:
        raise UserError(
            f"Kubernetes: expected JOB_COMPLETION_INDEX below TFDIST_NUM_WORKERS, found {index!r:.40} and {count!r:.40}"
        )
    hostname, service = environ.get("HOSTNAME", ""), environ.get("TFDIST_SERVICE", "")
    if not hostname.endswith(f"-{index}") or hostname == f"-{index}":
        raise UserError(f"Kubernetes: expected HOSTNAME=<job>-{index}, found {hostname!r:.80}; is the Job indexed?")
    job, suffix = hostname.removesuffix(f"-{index}"), f".{service}" if service else ""
    workers = tuple(f"{job}-{i}{suffix}:{port}" for i in range(int(count)))
    return Cluster(worker=workers, task=Task("worker", int(index)), source="Kubernetes")
