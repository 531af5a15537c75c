"""TensorFlow's strategies and their coordination service."""

import contextlib


@contextlib.contextmanager
def worker_on_logical_cpus(num_devices: int):
    """Inside, a MultiWorkerMirroredStrategy without GPUs is made on `num_devices` logical CPU devices.

    What: `CollectiveAllReduceExtended._initialize_local_devices`. Why: on a CPU it takes one device whatever is there, so
    several replicas per worker could be tried on GPUs only. Nothing is changed for `num_devices` below 2.
    Versions: TensorFlow 2.19-2.21.
    """
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended as extended

    if num_devices < 2:
        yield
        return
    original = extended._initialize_local_devices
    try:
        extended._initialize_local_devices = lambda self, resolver, worker_device: (
            tuple(f"{worker_device}/device:CPU:{i}" for i in range(num_devices)),
            "CPU",
        )
        yield
    finally:
        extended._initialize_local_devices = original


def coordination_timeouts(members: dict[str, list[str]], register_s: float, heartbeat_s: float) -> None:
    """How long TensorFlow's coordination service waits for the members of a MultiWorkerMirroredStrategy made hereafter.

    What: `Context.configure_coordination_service`, which the strategy calls itself if nobody has. `heartbeat_s` 0: its own
    default, about 10 s. Why: it waits an hour for a member that does not register, and takes every process down 10 s
    after one froze, before a supervisor has said which. Versions: TensorFlow 2.19-2.21.
    """
    from tensorflow.python.distribute import multi_worker_util
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context
    from tensorflow.python.training.server_lib import ClusterSpec

    jobs = [coordination_config_pb2.CoordinatedJob(name=job, num_tasks=len(addresses)) for job, addresses in members.items()]
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=multi_worker_util.coordination_leader(ClusterSpec(members)),
        cluster_register_timeout_in_ms=int(register_s * 1000),
        heartbeat_timeout_in_ms=int(heartbeat_s * 1000),
        coordinated_jobs=jobs,
    )
