"""TensorFlow under a parameter-server cluster: where variables go, and what runs on which worker."""

import contextlib

import tensorflow as tf

from tfdist.patches.servers import plain


def server_number(device: str) -> int:
    """Of a variable's device."""
    return int(device.partition("/task:")[2].partition("/")[0])


@contextlib.contextmanager
def placement(strategy: tf.distribute.Strategy, server_of):
    """Inside, a variable (and each part of one) goes where `server_of(shape, dtype)` says, and an optimizer's slots go where
    their variable is, part by part.

    What: `ParameterServerStrategyV2Extended._variable_count`, which chooses the server, and `colocate_with` of a
    ShardedVariable. Why: in turns, slots end up on other servers than their variables, and every update crosses the
    network; the slots of a ShardedVariable cannot be made at all. Versions: TensorFlow 2.19-2.21.
    """
    extended = strategy.extended

    def creator(next_creator, **kwargs):
        beside = kwargs.get("colocate_with")
        if beside is not None:
            parts = plain(beside)
            if len(parts) == 1:
                kwargs["colocate_with"] = parts[0]
                return next_creator(**kwargs)
            kwargs.pop("colocate_with")  # of equal shape, it is cut alike; its parts follow each other on the servers
            extended._variable_count = server_number(parts[0].device)
            return next_creator(**kwargs)
        extended._variable_count = server_of(kwargs)
        return next_creator(**kwargs)

    with tf.variable_creator_scope(creator):
        yield


class Remote:
    """What one worker executes, in order.

    What: an executor of its own. Why: with the one that all threads share, a worker that dies fails the calls of the others
    too. That is how ClusterCoordinator does it. Versions: TensorFlow 2.19-2.21.
    """

    def __init__(self, device: str):
        from tensorflow.python.eager import executor

        self.device, self._executor = device, executor.new_executor(enable_async=False)

    @contextlib.contextmanager
    def scope(self):
        from tensorflow.python.eager import context

        with context.executor_scope(self._executor), tf.device(self.device):
            yield


def connect_again(absent: set[int]) -> None:
    """Takes back workers that were restarted at the addresses of lost ones, but for those with an index among the `absent`.
    One thread at a time: two at once crash.

    What: `Context.update_server_def`, as ClusterCoordinator does. Versions: TensorFlow 2.19-2.21.
    """
    from tensorflow.python.eager import context

    eager = context.context()
    if not hasattr(eager, "tfdist_server_def"):  # of everybody
        eager.tfdist_server_def = type(eager._server_def)()
        eager.tfdist_server_def.CopyFrom(eager._server_def)
    present = type(eager._server_def)()
    present.CopyFrom(eager.tfdist_server_def)
    for job in present.cluster.job:
        for index in absent if job.name == "worker" else ():
            job.tasks.pop(index, None)
    eager.update_server_def(present)
