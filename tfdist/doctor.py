"""`tfdist doctor`: what this machine, cluster and installation can do, and what is wrong with them."""

import dataclasses
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tfdist import __version__
from tfdist.cluster import preflight, resolve
from tfdist.cluster.link import supervisor
from tfdist.cluster.spec import Cluster, split_address
from tfdist.config import StrategyConfig
from tfdist.errors import CHECK_FAILED, DONE, Failure
from tfdist.strategies import select, support
from tfdist.strategies.sync import MultiWorkerMirrored

OK, WARNING, PROBLEM = "ok", "warning", "problem"
# what is tested: lowest and highest (major, minor)
SUPPORTED = {"python": ((3, 10), (3, 13)), "tensorflow": ((2, 19), (2, 21)), "keras": ((3, 10), (3, 15))}
_DISK_BYTES = 64 << 20
_REDUCE_BYTES = 16 << 20
_REDUCE_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Check:
    section: str
    name: str
    found: str
    status: str = OK
    hint: str = ""


def run(cluster: Cluster, workdir: str, as_json: bool, cluster_problem: str = "", start_timeout_s: float = 60.0) -> int:
    """Prints the table; on a cluster the chief prints all of it and the others their problems.

    `cluster_problem`: why the environment gives no cluster; `cluster` is then this process alone. Returns the exit code:
    7 when a check failed.
    """
    checks: list[Check] = []
    strategy = None
    for part in (versions(), machine(), disk(Path(workdir))):
        checks += part
    members = [*cluster_facts(cluster, start_timeout_s)]
    if cluster_problem:
        members = [Check("cluster", "environment", "cannot be used", PROBLEM, cluster_problem)]
    checks += members
    trains_together = len(cluster.collective) > 1 and not cluster.ps and cluster.task in cluster.collective
    if trains_together and not any(check.status == PROBLEM for check in members):
        try:
            strategy = MultiWorkerMirrored(cluster)
            checks += [*all_reduce_speed(strategy)]
        except Failure as error:
            checks.append(Check("cluster", "strategy", "cannot be made", PROBLEM, str(error)))
    checks += features(cluster)
    failed = any(check.status == PROBLEM for check in checks)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}), flush=True)
    else:
        shown = checks if cluster.is_chief else [check for check in checks if check.status != OK]
        if shown:
            show(shown)
    if strategy is not None:
        strategy.barrier()
    return CHECK_FAILED if failed else DONE


def show(checks: list[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "found", "", "hint"):
        table.add_column(column, overflow="fold")
    section = ""
    marks = {OK: "ok", WARNING: "[yellow]warning[/]", PROBLEM: "[bold red]PROBLEM[/]"}
    for check in checks:
        table.add_row(
            check.section if check.section != section else "", check.name, check.found, marks[check.status], check.hint
        )
        section = check.section
    console = Console(highlight=False, width=None if os.isatty(1) else 140)
    console.print(table)
    problems = sum(check.status == PROBLEM for check in checks)
    console.print(f"{problems} problem{'s' * (problems != 1)}, {sum(c.status == WARNING for c in checks)} warnings")


# ---- this machine ----


def versions() -> Iterator[Check]:
    yield Check("versions", "tfdist", __version__)
    found = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    for name, version in found.items():
        yield version_check(name, version)
    tested = all(version_check(name, found[name]).status == OK for name in ("tensorflow", "keras"))
    pair = f"TensorFlow {found['tensorflow']} with Keras {found['keras']}"
    yield Check("versions", "pair", pair, *(() if tested else (WARNING, "tested: 2.19 with 3.10, up to 2.21 with 3.15")))
    yield Check("versions", "numpy", np.__version__)
    backend = keras.backend.backend()
    hint = "set KERAS_BACKEND=tensorflow, or unset it"
    yield Check("versions", "Keras backend", backend, *(() if backend == "tensorflow" else (PROBLEM, hint)))


def version_check(name: str, version: str) -> Check:
    low, high = SUPPORTED[name]
    number = tuple(int(part) for part in version.split(".")[:2])
    if low <= number <= high:
        return Check("versions", name, version)
    tested = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Check("versions", name, version, WARNING, f"not tested; tfdist is tested with {tested}")


def machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("machine", "CPU", f"{cores} cores for this process, {platform.machine()}")
    build = tf.sysconfig.get_build_info()
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        details = tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ())))
        yield Check("machine", gpu.name.rpartition("physical_device:")[2], f"{details.get('device_name')}, {capability}")
    cuda = f"CUDA {build.get('cuda_version', '?')}, cuDNN {build.get('cudnn_version', '?')}"
    yield Check("machine", "GPU libraries", cuda if build.get("is_cuda_build") else "a build without CUDA")
    listed = _nvidia_smi()
    if listed and not gpus:
        hint = "install TensorFlow with its CUDA libraries: pip install 'tfdist[gpu]'; look at CUDA_VISIBLE_DEVICES"
        yield Check("machine", "GPU", f"{len(listed)} seen by nvidia-smi, none by TensorFlow", PROBLEM, hint)
    elif not gpus:
        yield Check("machine", "GPU", "none")
    nccl = _installed_version("nvidia-nccl-cu12")
    if gpus:
        yield Check("machine", "NCCL", nccl or "built into TensorFlow")
    tpu = importlib.util.find_spec("libtpu") is not None
    yield Check("machine", "TPU library", "libtpu" if tpu else "none")


def _nvidia_smi() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def disk(workdir: Path) -> Iterator[Check]:
    """How fast a checkpoint would be written there, and whether there is room."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=workdir, prefix=".doctor-") as file:
            block = os.urandom(1 << 20)
            started_s = time.perf_counter()
            for _ in range(_DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = _DISK_BYTES / (time.perf_counter() - started_s) / 1e6
        free = shutil.disk_usage(workdir).free / 1e9
    except OSError as error:
        yield Check("disk", str(workdir), "cannot be written", PROBLEM, f"{error.strerror}; give another --workdir")
        return
    yield Check("disk", str(workdir), f"{rate:,.0f} MB/s written and synced")
    low = (WARNING, "a checkpoint of 1 B parameters in float32 takes 12 GB") if free < 12 else ()
    yield Check("disk", "free", f"{free:,.0f} GB", *low)


# ---- the cluster ----


def cluster_facts(cluster: Cluster, start_timeout_s: float = 60.0) -> Iterator[Check]:
    if cluster.is_local:
        yield Check("cluster", "none", f"this process is alone ({cluster.source} set)")
        return
    counts = ", ".join(f"{len(addresses)} {job}" for job, addresses in cluster.jobs().items())
    yield Check("cluster", f"from {cluster.source}", f"{counts}; this is {cluster.task}")
    public = [address for task in cluster.tasks if _is_public(address := cluster.address(task))]
    if public:
        hint = "TensorFlow's gRPC has no authentication and no encryption: use a private network (SECURITY.md)"
        yield Check("cluster", "addresses", f"{len(public)} public, for example {public[0]}", WARNING, hint)
    if cluster.task not in cluster.tasks:
        yield Check("cluster", "reachability", "an evaluator meets nobody")
    elif supervisor().is_there:
        yield Check("cluster", "reachability", f"all {len(cluster.tasks)} tasks have met")
    else:
        try:
            preflight.meet(cluster, resolve.job_token(cluster), start_timeout_s)
            yield Check("cluster", "reachability", f"all {len(cluster.tasks)} tasks have met")
        except Failure as error:
            yield Check("cluster", "reachability", "not everyone", PROBLEM, str(error))
    yield Check("cluster", "exposure", "TensorFlow listens on all interfaces, without authentication", OK, "SECURITY.md")


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(split_address(address)[0]).is_global
    except ValueError:  # a name
        return False


def all_reduce_speed(strategy: MultiWorkerMirrored) -> Iterator[Check]:
    """Bytes of a tensor over the time of its all-reduce, the best of a few."""
    for dtype in (tf.float32, tf.bfloat16):
        count = _REDUCE_BYTES // dtype.size

        @tf.function(autograph=False)
        def reduce(dtype=dtype, count=count):
            def on_replica():
                return tf.distribute.get_replica_context().all_reduce("SUM", tf.ones([count], dtype))[0]

            return strategy.tf_strategy.run(on_replica)

        reduce()
        best_s = float("inf")
        for _ in range(_REDUCE_ROUNDS):
            started_s = time.perf_counter()
            float(tf.cast(strategy.tf_strategy.experimental_local_results(reduce())[0], tf.float32))
            best_s = min(best_s, time.perf_counter() - started_s)
        yield Check(
            "cluster", f"all-reduce {dtype.name}", f"{_REDUCE_BYTES / best_s / 1e9:.2f} GB/s ({_REDUCE_BYTES >> 20} MiB)"
        )


def features(cluster: Cluster) -> list[Check]:
    """What the support table refuses on the strategy that this environment gets."""
    kind = select.kind_for(StrategyConfig(), cluster)
    name = "".join(part.capitalize() for part in kind.split("_")) + ("Mirrored" if kind == "multi_worker" else "")
    refused = {feature: reasons[name] for feature, reasons in support.TABLE.items() if reasons[name] != support.YES}
    found = f"{len(support.TABLE) - len(refused)} of {len(support.TABLE)} features"
    return [Check("support", name, found, OK, "; ".join(f"{feature}: {reason}" for feature, reason in refused.items()))]
