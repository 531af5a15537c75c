"""Who we all are, from the environment. With `cli/` and `launch/` the only place that reads it. No TensorFlow."""

import os
import re
from collections.abc import Mapping

from absl import logging

from tfdist.cluster import kubernetes, slurm
from tfdist.cluster.spec import Cluster, Task, TFConfigError
from tfdist.cluster.tf_config import from_tf_config

DEFAULT_PORT = 2222
DATA_SERVICE = "TFDIST_DATA_SERVICE"  # names the dispatcher of the data service to the training processes


def resolve(environ: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that this process belongs to; `.source` says where that was found, `.is_local` that it is alone.

    TF_CONFIG decides if it is set. Else a Slurm step of several tasks (srun), else a Kubernetes indexed Job. Raises
    `TFConfigError` or `UserError`, one line.
    """
    if "TF_CONFIG" in environ:
        cluster, warnings = from_tf_config(environ["TF_CONFIG"])
        for warning in warnings:
            logging.warning("%s", warning)
        return cluster
    port = number_of(environ, "TFDIST_PORT", DEFAULT_PORT, 1, 65535, "; it is the first port of a node's tasks")
    for found in (slurm.cluster(environ, port), kubernetes.cluster(environ, port)):
        if found is not None:
            return found
    return Cluster(task=Task("worker", 0))


def job_token(cluster: Cluster, environ: Mapping[str, str] = os.environ) -> str:
    """Tells this job's processes from another's: TFDIST_JOB_TOKEN, else a hash of the cluster (a name, not a secret)."""
    return environ.get("TFDIST_JOB_TOKEN") or cluster.identity()


def launch_token(environ: Mapping[str, str] = os.environ) -> str:
    """The same for all starts of one `tfdist launch`, restarts included; empty without one."""
    return environ.get("TFDIST_JOB_TOKEN", "")


def supervisor_fd(environ: Mapping[str, str] = os.environ) -> int | None:
    """The file descriptor of the socket to this process' supervisor; None when it has none.

    TFDIST_SUPERVISOR is "fd:pid": a process that this one starts inherits the text, but is not the one that is meant.
    """
    fd, _, pid = environ.get("TFDIST_SUPERVISOR", "").partition(":")
    return int(fd) if re.fullmatch("[0-9]{1,7}", fd) and pid == str(os.getpid()) else None


def wants_legacy_keras(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `tf.keras` would be tf_keras, which is Keras 2."""
    return environ.get("TF_USE_LEGACY_KERAS", "") in ("1", "true", "True")


def devices_per_worker(environ: Mapping[str, str] = os.environ) -> int:
    """What `tfdist launch --devices-per-worker` asked for; 0: nothing."""
    return number_of(environ, "TFDIST_DEVICES_PER_WORKER", 0)


def data_service_address(environ: Mapping[str, str] = os.environ) -> str:
    """Where `tfdist launch --data_workers` has its data service; empty: there is none."""
    return environ.get(DATA_SERVICE, "")


def number_of(
    environ: Mapping[str, str], name: str, default: int, at_least: int = 0, at_most: int = 10**9, hint: str = ""
) -> int:  # fmt: skip
    """What the environment says, or the default. Raises `TFConfigError` for what is no number between the two."""
    given = environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", given) or not at_least <= int(given) <= at_most:
        raise TFConfigError(f"{name}: must be a number of {at_least} to {at_most}, got {given!r:.80}{hint}")
    return int(given)
