"""From a config or the environment to a strategy."""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tfdist.cluster.resolve import devices_per_worker, resolve
from tfdist.cluster.spec import Cluster, check_strategy
from tfdist.config import ClusterConfig, StrategyConfig
from tfdist.errors import UserError, exit_with_codes
from tfdist.strategies.base import Strategy
from tfdist.strategies.parameter_server import ParameterServer
from tfdist.strategies.sync import Mirrored, MultiWorkerMirrored, OneDevice


class _NotThereYet:
    """Foreseen in the interface of `base.Strategy`, and refused until it comes."""

    def __init__(self, *args, **kwargs):
        raise UserError(
            f"{type(self).__name__}: not there yet; use OneDevice, Mirrored, MultiWorkerMirrored or ParameterServer"
        )


class TPU(_NotThereYet):
    """All cores of a TPU."""


def kind_for(config: StrategyConfig, cluster: Cluster) -> str:
    """Resolves `auto`: the cluster first, then the devices of this machine (one of them: one_device)."""
    if config.kind != "auto":
        return config.kind
    if cluster.task.type != "evaluator":
        if cluster.ps:
            return "parameter_server"
        if len(cluster.collective) > 1:
            return "multi_worker"
    several = config.num_devices > 1 or (config.num_devices == 0 and len(tf.config.list_physical_devices("GPU")) > 1)
    return "mirrored" if several else "one_device"


def make(
    config: StrategyConfig, cluster: Cluster | None = None, waiting: ClusterConfig | None = None,
    worker_weights: Sequence[float] = (),
) -> Strategy:  # fmt: skip
    """The strategy of a config. Without `cluster` this process is alone."""
    cluster, waiting = cluster or Cluster(), waiting or ClusterConfig()
    config = dataclasses.replace(config, num_devices=config.num_devices or devices_per_worker())
    kind = kind_for(config, cluster)
    check_strategy(cluster, kind)
    if worker_weights and kind != "multi_worker":
        raise UserError(f"data.worker_weights: expected several workers (strategy.kind=multi_worker), found {kind}")
    if kind == "one_device":
        if config.num_devices > 1:
            raise UserError(
                f"strategy.num_devices: expected 0 or 1 with strategy.kind=one_device, found {config.num_devices}"
            )
        return OneDevice()
    if kind == "mirrored":
        return Mirrored(config.num_devices)
    if kind == "multi_worker":
        return MultiWorkerMirrored(
            cluster,
            num_devices=config.num_devices,
            communication=config.communication,
            bytes_per_pack=config.bytes_per_pack,
            timeout_s=config.communication_timeout_s,
            start_timeout_s=waiting.start_timeout_s,
            worker_weights=worker_weights,
        )
    if kind == "parameter_server":
        return ParameterServer(
            cluster,
            partitioner=config.partitioner,
            min_shard_bytes=config.min_shard_bytes,
            max_shard_bytes=config.max_shard_bytes,
            num_shards=config.num_shards,
            max_staleness=None if config.max_staleness < 0 else config.max_staleness,
            gradients_per_update=config.gradients_per_update,
            start_timeout_s=waiting.start_timeout_s,
        )
    return TPU()


def from_environment() -> Strategy:
    """The strategy for where this program runs: the cluster first (TF_CONFIG, Slurm, Kubernetes), then the devices."""
    exit_with_codes()
    return make(StrategyConfig(), resolve())
