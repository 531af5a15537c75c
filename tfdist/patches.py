"""The only file that touches private names of Keras and TensorFlow. One small entry each: what, why, upstream, versions.

Nothing here runs at import; callers apply an entry where they need it.
"""

import contextlib
from typing import Any

import keras


@contextlib.contextmanager
def component_variables(tf_strategy, variables: list[Any], replica: int):
    """Inside, each Keras variable is its component on local replica `replica`: a plain, compilable resource variable.

    What: swaps `keras.Variable._value`.
    Why: assigning to a MirroredVariable in a replica calls `merge_call`, which XLA cannot compile; on components the
    whole optimizer update compiles and costs nothing over a one-device step. Traced per replica, one thread at a time.
    Upstream: Keras has no public way to bind a variable's value. Versions: Keras 3.10-3.15.
    """
    whole = [variable._value for variable in variables]
    try:
        for variable, value in zip(variables, whole, strict=True):
            variable._value = tf_strategy.experimental_local_results(value)[replica]
        yield
    finally:
        for variable, value in zip(variables, whole, strict=True):
            variable._value = value


def apply_gradients(optimizer: keras.optimizers.Optimizer, gradients, variables) -> None:
    """One optimizer update from gradients that are already reduced and clipped. Call it on component variables.

    What: `_apply_weight_decay`, `update_step`, moving averages, constraints and the iteration count, in Keras' order.
    Why: `Optimizer.apply` all-reduces the gradients again, clips before that reduce, and calls `merge_call`;
    `update_step` alone (public) leaves out decay, averages and the count.
    Upstream: https://github.com/keras-team/keras/issues/20582. Versions: Keras 3.10-3.15.
    """
    _apply_weight_decay(optimizer, variables)
    learning_rate = optimizer.learning_rate
    for gradient, variable in zip(gradients, variables, strict=True):
        optimizer.update_step(gradient, variable, learning_rate)
    if optimizer.use_ema:
        _update_moving_averages(optimizer)
    for variable in variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))
    optimizer.iterations.assign_add(1)


def _apply_weight_decay(optimizer, variables) -> None:
    """Keras' decay without its TensorFlow override, which calls `merge_call`; an optimizer's own one (Muon) is kept."""
    owners = [cls for cls in type(optimizer).__mro__ if "_apply_weight_decay" in vars(cls)]
    own = next(cls for cls in owners if not cls.__module__.startswith("keras.src.backend.tensorflow"))
    if own is not owners[-1] or optimizer.weight_decay is not None:
        own._apply_weight_decay(optimizer, variables)


def _update_moving_averages(optimizer) -> None:
    optimizer._update_model_variables_moving_average(optimizer._trainable_variables)
    if optimizer.ema_overwrite_frequency:
        due = keras.ops.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0)
        for variable, average in zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True):
            if average is not None:
                variable.assign(keras.ops.where(due, average, variable))


def all_layers(model: keras.Layer) -> list[keras.Layer]:
    """The model and every layer inside it, at any depth.

    What: `Layer._flatten_layers`. Why: public `Model.layers` lists the top level only. Versions: Keras 3.10-3.15.
    """
    return list(model._flatten_layers(include_self=True))


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
