"""Making TensorFlow's MultiWorkerMirroredStrategy: after the preflight, before any other TensorFlow work."""

import tensorflow as tf

from tfdist.cluster import preflight, resolve
from tfdist.cluster.link import supervisor
from tfdist.cluster.spec import Cluster, check_strategy
from tfdist.errors import UserError
from tfdist.patches.runtime import coordination_timeouts, worker_on_logical_cpus
from tfdist.strategies import devices, joined

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
    with devices.joining("tfdist.MultiWorkerMirrored"):
        num_gpus, num_cpus = devices.worker_devices(num_devices or resolve.devices_per_worker())
        if len(cluster.collective) > 1:
            coordination_timeouts(members, start_timeout_s, heartbeat_s=_NEVER_S if supervisor().is_there else 0.0)
        with worker_on_logical_cpus(num_cpus):
            joined.begin()
            return tf.distribute.MultiWorkerMirroredStrategy(
                _resolver(cluster, members, num_gpus), _options(communication, bytes_per_pack, timeout_s)
            )


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
