"""Which devices a strategy uses."""

import tensorflow as tf

from tfdist.errors import UserError


def default_device() -> str:
    return "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"


def mirrored_devices(num_devices: int) -> list[str]:
    """Device names for `num_devices` replicas (0: all GPUs, else one CPU device).

    Raises `ValueError` when the machine has fewer GPUs, or when logical CPU devices are asked for after TensorFlow
    has started.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        if num_devices > len(gpus):
            raise UserError(f"strategy.num_devices: expected at most {len(gpus)} (the GPUs here), found {num_devices}")
        return [f"GPU:{i}" for i in range(num_devices or len(gpus))]
    num_devices = num_devices or 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = len(tf.config.get_logical_device_configuration(cpu) or [None])
    if configured < num_devices:
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_devices)
        except RuntimeError:
            raise UserError(
                f"expected {num_devices} logical CPU devices, found {configured}, and TensorFlow has already started; "
                "make tfdist.Mirrored before any other TensorFlow work"
            ) from None
    return [f"CPU:{i}" for i in range(num_devices)]
