"""What a worker and a server of a parameter-server cluster do: TensorFlow's server, until the chief is done."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import tensorflow as tf
from absl import logging

from tfdist.cluster import preflight, resolve
from tfdist.cluster.link import supervisor
from tfdist.cluster.spec import Cluster, check_strategy, split_address
from tfdist.errors import DONE, PEER_LOST, UserError

_THREADS = 8  # that steps, reads and updates of others share
_LOOK_EVERY_S, _GONE_AFTER_S = 1.0, 4.0


def serve(cluster: Cluster, start_timeout_s: float = 300.0) -> None:
    """Never returns: the process ends with the chief. Under a supervisor that one ends it; alone it looks at the chief's
    address."""
    check_strategy(cluster, "parameter_server")
    if not supervisor().is_there:
        preflight.meet(cluster, resolve.job_token(cluster), start_timeout_s)
    tf.config.set_soft_device_placement(True)
    try:
        server = tf.distribute.Server(
            tf.train.ClusterSpec({job: addresses for job, addresses in cluster.jobs().items() if job != "evaluator"}),
            job_name=cluster.task.type,
            task_index=cluster.task.index,
            protocol="grpc",
            # on one core TensorFlow would take one thread, and a step that waits for its input waits for ever
            config=tf.compat.v1.ConfigProto(inter_op_parallelism_threads=max(_THREADS, os.cpu_count() or 1)),
        )
    except tf.errors.OpError as error:
        raise UserError(
            f"{cluster.task}: cannot serve at {cluster.address(cluster.task)}: {error.message}; is the port in use?"
        ) from error
    if supervisor().is_there and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the chief still saves; the supervisor ends this process after it
    supervisor().phase("serve")
    logging.info("%s serves at %s", cluster.task, cluster.address(cluster.task))
    if not supervisor().is_there:
        threading.Thread(target=_end_with, args=(cluster, start_timeout_s), daemon=True).start()
    server.join()


def _end_with(cluster: Cluster, start_timeout_s: float) -> None:
    """TensorFlow's servers stay for ever when their coordinator is gone."""
    address = split_address(cluster.address(cluster.leader))
    heard_s, was_there = time.monotonic(), False
    while time.monotonic() - heard_s < (_GONE_AFTER_S if was_there else start_timeout_s):
        try:
            socket.create_connection(address, _LOOK_EVERY_S).close()
            heard_s, was_there = time.monotonic(), True
        except OSError:
            pass
        time.sleep(_LOOK_EVERY_S)
    with contextlib.suppress(OSError):  # nobody can read it
        print(f"tfdist: {cluster.task}: the chief is gone", file=sys.stderr, flush=True)
    os._exit(DONE if was_there else PEER_LOST)
