"""Which devices a strategy uses."""

import contextlib
import signal
import threading

import tensorflow as tf

from tfdist.cluster.link import supervisor
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
    _logical_cpus(num_devices or 1, "tfdist.Mirrored")
    return [f"CPU:{i}" for i in range(num_devices or 1)]


def worker_devices(num_devices: int) -> tuple[int, int]:
    """(GPUs, logical CPU devices) of one worker; one of the two is 0. `num_devices` 0: all GPUs, else one CPU device.

    Raises `ValueError` like `mirrored_devices`.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        _logical_cpus(num_devices or 1, "tfdist.MultiWorkerMirrored")
        return 0, num_devices or 1
    if num_devices > len(gpus):
        raise UserError(f"strategy.num_devices: expected at most {len(gpus)} (the GPUs here), found {num_devices}")
    if num_devices:
        tf.config.set_visible_devices(gpus[:num_devices], "GPU")
    return num_devices or len(gpus), 0


@contextlib.contextmanager
def joining(strategy: str):
    """Around the making of a strategy that joins a cluster, which TensorFlow allows before all other work only; `strategy`:
    its name. Afterwards SIGTERM does again what it did: TensorFlow puts a C handler there that swallows the signal."""
    handler = signal.getsignal(signal.SIGTERM)
    supervisor().phase("connect")
    try:
        yield
    except RuntimeError as error:
        if "startup" not in str(error) and "initialized" not in str(error):
            raise
        raise UserError(
            f"expected {strategy} before any other TensorFlow work, found that TensorFlow has already started (a tensor, a "
            "variable or another strategy was made); make the strategy first"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    supervisor().phase("build")


def _logical_cpus(num_devices: int, strategy: str) -> None:
    """Asks TensorFlow for that many CPU devices, which it grants only before it has started."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = len(tf.config.get_logical_device_configuration(cpu) or [None])
    if configured < num_devices:
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_devices)
        except RuntimeError:
            raise UserError(
                f"expected {num_devices} logical CPU devices, found {configured}, and TensorFlow has already started; "
                f"make {strategy} before any other TensorFlow work"
            ) from None
