"""Preprocessing on processes of its own, with TensorFlow's data service: for pipelines that are too heavy for the processes
that train.

    python -m tfdist.data.service PARENT_PID PORT [DISPATCHER]

is the dispatcher, or a worker of one; `tfdist launch --data_workers=N` starts them. Who works on what is decided as they go
(dynamic sharding): each element is read once while nothing fails, fast workers do more, **and the order of samples is given
up**: it is another one in each run, and a run that goes on reads some samples again and others not at all.
"""

import os
import sys
import threading
import time

import tensorflow as tf

from tfdist.cluster.resolve import data_service_address
from tfdist.errors import UserError


def through(dataset: tf.data.Dataset, job: str) -> tf.data.Dataset:
    """`dataset`, computed by the data service. All pipelines that give the same `job` and the same dataset share its
    elements: each gets those that it asks for first. Raises `UserError` where there is no service."""
    address = data_service_address()
    if not address:
        raise UserError(
            "data.service: expected a data service, found none; tfdist launch --workers=N --data_workers=M -- ... starts one"
        )
    return dataset.apply(
        tf.data.experimental.service.distribute(
            processing_mode=tf.data.experimental.service.ShardingPolicy.DYNAMIC,
            service=f"grpc://{address}",
            job_name=job,
        )
    )


def main(parent: str, port: str, dispatcher: str = "") -> None:
    """Serves until the parent process is gone."""
    service = tf.data.experimental.service
    if dispatcher:
        config = service.WorkerConfig(dispatcher, worker_address=f"localhost:{port}", port=int(port))
        server = service.WorkerServer(config)
    else:
        server = service.DispatchServer(service.DispatcherConfig(port=int(port)))
    threading.Thread(target=server.join, daemon=True).start()
    while os.getppid() == int(parent):
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
