"""Making TensorFlow's MultiWorkerMirroredStrategy: after the preflight, before any other TensorFlow work."""

import signal
import threading

import tensorflow as tf

from tfdist import patches
from tfdist.cluster import preflight, resolve
from tfdist.cluster.link import supervisor
from tfdist.cluster.spec import Cluster, check_strategy
from tfdist.errors import UserError
from tfdist.strategies import devices

_NEVER_S = 86400.0


def connect(
    cluster: Cluster, *, num_devices: int, communication: str, bytes_per_pack: int, timeout_s: float, start_timeout_s: float
) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Blocks until all members are there. The arguments are those of `sync.MultiWorkerMirrored`."""
    check_strategy(cluster, "multi_worker")
    if cluster.task.type == "evaluator":
        raise UserError("MultiWorkerMirrored: expected a chief or a worker, found an evaluator, which trains with nobody")
    if not supervisor().is_there and len(cluster.tasks) > 1:
        preflight.meet(cluster, resolve.job_token(cluster), start_timeout_s)
    members = {job: addresses for job, addresses in cluster.jobs().items() if job in ("chief", "worker")}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        num_gpus, num_cpus = devices.worker_devices(num_devices or resolve.devices_per_worker())
        if len(cluster.collective) > 1:
            patches.coordination_timeouts(members, start_timeout_s, heartbeat_s=_NEVER_S if supervisor().is_there else 0.0)
        supervisor().phase("connect")
        with patches.worker_on_logical_cpus(num_cpus):
            strategy = tf.distribute.MultiWorkerMirroredStrategy(
                _resolver(cluster, members, num_gpus), _options(communication, bytes_per_pack, timeout_s)
            )
    except RuntimeError as error:
        if "startup" not in str(error) and "initialized" not in str(error):
            raise
        raise UserError(
            "expected tfdist.MultiWorkerMirrored before any other TensorFlow work, found that TensorFlow has already "
            "started (a tensor, a variable or another strategy was made); make the strategy first"
        ) from error
    supervisor().phase("build")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # TensorFlow has put a C handler there that swallows the signal
    return strategy


def _resolver(cluster: Cluster, members: dict[str, list[str]], num_gpus: int):
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(members),
        task_type=cluster.task.type,
        task_id=cluster.task.index,
        rpc_layer="grpc",
        num_accelerators={"GPU": num_gpus},
    )


def _options(communication: str, bytes_per_pack: int, timeout_s: float):
    return tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=bytes_per_pack,
        timeout_seconds=timeout_s or None,
        implementation=tf.distribute.experimental.CommunicationImplementation[communication.upper()],
    )
