"""From a config or the environment to a strategy."""

import tensorflow as tf

from tfdist.cluster.resolve import resolve
from tfdist.config import StrategyConfig
from tfdist.errors import UserError
from tfdist.strategies.base import Strategy
from tfdist.strategies.sync import Mirrored, OneDevice


class _NotThereYet:
    """Foreseen in the interface of `base.Strategy`, and refused until it comes."""

    def __init__(self, *args, **kwargs):
        raise UserError(f"{type(self).__name__}: not there yet; use OneDevice or Mirrored")


class MultiWorkerMirrored(_NotThereYet):
    """Several processes, each with its devices, configured through TF_CONFIG."""


class ParameterServer(_NotThereYet):
    """Asynchronous training: a coordinator, workers, and servers that hold the variables."""


class TPU(_NotThereYet):
    """All cores of a TPU."""


def make(config: StrategyConfig) -> Strategy:
    """The strategy of a config. `auto`: all GPUs if there are several, else one device."""
    several = len(tf.config.list_physical_devices("GPU")) > 1 or config.num_devices > 1
    kind = config.kind if config.kind != "auto" else ("mirrored" if several else "one_device")
    if kind == "one_device":
        if config.num_devices > 1:
            raise UserError(
                f"strategy.num_devices: expected 0 or 1 with strategy.kind=one_device, found {config.num_devices}"
            )
        return OneDevice()
    if kind == "mirrored":
        return Mirrored(config.num_devices)
    return {"multi_worker": MultiWorkerMirrored, "parameter_server": ParameterServer, "tpu": TPU}[kind]()


def from_environment() -> Strategy:
    """The strategy for where this program runs: TF_CONFIG first, then the devices of this machine."""
    resolve()
    return make(StrategyConfig())
