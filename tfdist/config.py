"""Every config dataclass and its validation. No TensorFlow here: `tfdist --help` must stay instant.

A config file is Python (`tfdist/configs/lm_tiny.py`) with a `get_config()` that returns a `Config`. Every field says what a
resumed run may do with it: `match` fields must be equal to those that the workdir was started with, `free` fields may
change. The config hash covers the `match` fields and nothing else.
"""

import dataclasses
import hashlib
import json
from typing import Any

from tfdist.errors import one_line


def match(default: Any) -> Any:
    """A field that a resumed run must not change."""
    return dataclasses.field(default=default, metadata={"resume": "match"})


def free(default: Any) -> Any:
    """A field that a resumed run may change."""
    return dataclasses.field(default=default, metadata={"resume": "free"})


@dataclasses.dataclass
class ModelConfig:
    """A decoder-only Transformer language model."""

    vocab_size: int = match(258)
    num_layers: int = match(4)
    num_heads: int = match(4)
    num_kv_heads: int = match(0)  # 0: as many as num_heads; fewer is grouped-query attention
    model_dim: int = match(256)
    mlp_dim: int = match(0)  # 0: 4 * model_dim
    positions: str = match("learned")  # learned | rotary
    norm: str = match("layer")  # layer | rms
    norm_epsilon: float = match(1e-5)
    activation: str = match("gelu")  # gelu | swiglu
    use_bias: bool = match(True)
    tie_embeddings: bool = match(True)
    dropout: float = match(0.0)
    rope_theta: float = match(10000.0)
    recompute: bool = free(False)  # recompute each block's activations in the backward pass: less memory, more time
    dtype: str = match("float32")  # float32 | mixed_bfloat16 | mixed_float16 | bfloat16 | float64


@dataclasses.dataclass
class DataConfig:
    """Where the text comes from and how it is cut into samples."""

    # stdlib | files:GLOB[,GLOB...] | jsonl:GLOB#KEY | tfds:NAME | bin:GLOB | shards:DIR | mix:WEIGHT*SOURCE;WEIGHT*SOURCE
    source: str = free("stdlib")  # the data's own hash must match, not its name
    text_key: str = match("text")  # the feature of a tfds: source, or the key of a jsonl: one, that holds the text
    tokenizer: str = match("bytes")  # bytes | bpe:SIZE | file:tokenizer.json | ids:SIZE (of a bin: source)
    sequence_length: int = match(128)
    validation_fraction: float = match(0.02)
    packing: str = match("joined")  # joined | separated (no attention over document borders) | padded (a document a row)
    border_loss: bool = match(True)  # False: the first token of a document is no target
    shuffle: bool = match(True)
    shuffle_buffer_mb: int = match(1024)  # a larger corpus is read, and shuffled, in blocks, within this much memory
    sharding: str = match("batch")  # batch | file | hash | random | replicate: which worker reads what
    worker_weights: str = free("")  # "2,1": worker 0 computes twice the rows of worker 1; "": as many each
    service: bool = match(False)  # read through the data service of `tfdist launch --data_workers`: no fixed order
    on_bad_record: str = free("refuse")  # refuse | skip
    max_bad_records: int = free(100)  # to skip; more of them end the build
    max_record_mb: int = free(64)  # a longer line of a jsonl: source is a bad record
    cache_dir: str = free("")  # default: $TFDIST_CACHE, else the user's cache folder


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay, linear warm-up and cosine decay (arXiv:1711.05101, arXiv:1608.03983)."""

    learning_rate: float = match(1e-3)
    warmup_steps: int = match(50)
    final_learning_rate_fraction: float = match(0.1)
    beta_1: float = match(0.9)
    beta_2: float = match(0.95)
    epsilon: float = match(1e-8)
    weight_decay: float = match(0.1)  # on matrices only: not on norms, biases and embeddings
    ema_momentum: float = match(0.0)  # evaluate, sample and export with this moving average of the weights; 0: without


@dataclasses.dataclass
class TrainConfig:
    num_steps: int = free(500)  # changing it re-plans the learning-rate schedule
    global_batch_size: int = match(32)  # sequences per optimizer step, over all replicas and micro-batches
    batch_ramp: str = free("")  # "100:64,500:128": other global batches from these steps on; past steps must match
    accumulate_steps: int = match(1)  # micro-batches per optimizer step
    steps_per_loop: int = free(20)  # at most this many steps in one compiled loop
    seed: int = match(0)
    clip_norm: float = match(1.0)  # global norm; 0 turns clipping off
    label_smoothing: float = match(0.0)  # in training only: validation is the plain cross-entropy
    z_loss: float = match(0.0)  # weight of log(Z)^2 of the softmax; in training only
    jit_compile: str = free("auto")  # auto | on | off
    init_from: str = free("")  # start from the weights of another workdir or a .keras file
    max_skipped_steps: int = free(20)  # this many non-finite steps in a row end the run


@dataclasses.dataclass
class StrategyConfig:
    kind: str = free("auto")  # auto | one_device | mirrored | multi_worker | parameter_server | tpu
    num_devices: int = free(0)  # per worker; 0: all GPUs, else one
    reduce_dtype: str = free("float32")  # float32 | bfloat16: gradients between replicas in half the bytes, less exact
    communication: str = free("auto")  # auto | ring | nccl: between workers
    bytes_per_pack: int = free(0)  # gradients are reduced in packs of at least this size; 0: in one
    communication_timeout_s: float = free(0.0)  # of one collective; 0: none, cluster.step_timeout_s watches
    # of parameter servers: how large variables are cut over them
    partitioner: str = free("min_size")  # min_size | max_size | fixed | none
    min_shard_bytes: int = free(256 << 10)  # min_size: a part for each server, none smaller
    max_shard_bytes: int = free(16 << 20)  # max_size: parts no larger
    num_shards: int = free(0)  # fixed: so many parts; min_size and max_size: at most; 0: as many as servers
    max_staleness: int = free(-1)  # so many updates at most between a step's reading and its writing; -1: no bound
    gradients_per_update: int = free(1)  # so many workers share each global batch and make one update; 1: asynchronous


@dataclasses.dataclass
class ClusterConfig:
    """How long the tasks of a cluster wait for each other. Timeouts are of the monotonic clock."""

    start_timeout_s: float = free(300.0)  # to come to the preflight; and for import, building, compiling, saving
    step_timeout_s: float = free(300.0)  # without a step, of training or evaluation: stuck
    heartbeat_timeout_s: float = free(30.0)  # without a sign of life: frozen, or the network is cut


@dataclasses.dataclass
class CheckpointConfig:
    every_steps: int = free(100)
    keep_last: int = free(3)
    keep_every_steps: int = free(0)  # besides the last ones, keep every checkpoint at a multiple of this; 0: none


@dataclasses.dataclass
class EvalConfig:
    every_steps: int = free(250)
    batch_size: int = free(0)  # 0: train.global_batch_size
    max_steps: int = free(0)  # batches per evaluation during training; 0: the whole split. The last one is always whole


@dataclasses.dataclass
class LogConfig:
    every_steps: int = free(1)
    tensorboard: bool = free(True)
    sample_tokens: int = free(200)  # length of the sample at the end of a run


@dataclasses.dataclass
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    strategy: StrategyConfig = dataclasses.field(default_factory=StrategyConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


_CHOICES = {
    "model.positions": ("learned", "rotary"),
    "model.norm": ("layer", "rms"),
    "model.activation": ("gelu", "swiglu"),
    "model.dtype": ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float64"),
    "data.packing": ("joined", "separated", "padded"),
    "data.sharding": ("batch", "file", "hash", "random", "replicate"),
    "data.on_bad_record": ("refuse", "skip"),
    "train.jit_compile": ("auto", "on", "off"),
    "strategy.kind": ("auto", "one_device", "mirrored", "multi_worker", "parameter_server", "tpu"),
    "strategy.reduce_dtype": ("float32", "bfloat16"),
    "strategy.communication": ("auto", "ring", "nccl"),
    "strategy.partitioner": ("min_size", "max_size", "fixed", "none"),
}
_AT_LEAST_ONE = (
    "model.vocab_size", "model.num_layers", "model.num_heads", "model.model_dim", "data.sequence_length",
    "train.num_steps", "train.global_batch_size", "train.accumulate_steps", "train.steps_per_loop",
    "train.max_skipped_steps", "strategy.gradients_per_update", "strategy.min_shard_bytes", "strategy.max_shard_bytes",
    "checkpoint.keep_last", "log.every_steps", "data.shuffle_buffer_mb", "data.max_record_mb",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "model.num_kv_heads", "model.mlp_dim", "optimizer.learning_rate", "optimizer.warmup_steps",
    "optimizer.weight_decay", "train.clip_norm", "train.z_loss", "train.seed", "strategy.num_devices",
    "checkpoint.every_steps",
    "checkpoint.keep_every_steps", "eval.every_steps", "eval.batch_size", "eval.max_steps", "log.sample_tokens",
    "strategy.bytes_per_pack", "strategy.num_shards", "strategy.communication_timeout_s", "data.max_bad_records",
)  # fmt: skip
# at their defaults these do not enter the config hash: runs that were started without them go on
_ADDED_LATER = (
    "optimizer.ema_momentum", "train.label_smoothing", "train.z_loss", "data.packing", "data.border_loss",
    "data.shuffle_buffer_mb", "data.sharding", "data.service",
)  # fmt: skip
_BELOW_ONE = ("model.dropout", "data.validation_fraction", "optimizer.ema_momentum", "train.label_smoothing")


def flatten(config: Config) -> dict[str, Any]:
    """`{"train.num_steps": 500, ...}`."""
    return {
        f"{section.name}.{field.name}": getattr(getattr(config, section.name), field.name)
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(section.type)
    }


def field_names() -> list[str]:
    return list(flatten(Config()))


def validate(config: Config) -> Config:
    """Returns the config, or raises `ValueError` with one line: what was expected, what was found."""
    values = flatten(config)
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {values[name]!r}")
    for names, smallest in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for name in names:
            if not values[name] >= smallest:
                raise ValueError(f"{name}: expected at least {smallest}, found {values[name]}")
    for name in _BELOW_ONE:
        if not 0 <= values[name] < 1:
            raise ValueError(f"{name}: expected 0 <= x < 1, found {values[name]}")
    for name in ("start_timeout_s", "step_timeout_s", "heartbeat_timeout_s"):
        if not 1 <= values[f"cluster.{name}"] < float("inf"):
            raise ValueError(f"cluster.{name}: expected at least 1 s, found {values[f'cluster.{name}']}")
    model, train = config.model, config.train
    if train.seed >= 2**32:
        raise ValueError(f"train.seed: expected less than 2**32, found {train.seed}")
    if config.data.validation_fraction == 0:
        raise ValueError("data.validation_fraction: expected more than 0 (every run validates), found 0")
    if model.model_dim % model.num_heads:
        raise ValueError(
            f"model.model_dim: expected a multiple of model.num_heads={model.num_heads}, found {model.model_dim}"
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise ValueError(
            f"model.num_kv_heads: expected a divisor of model.num_heads={model.num_heads}, found {model.num_kv_heads}"
        )
    if model.positions == "rotary" and (model.model_dim // model.num_heads) % 2:
        raise ValueError(
            "model.positions: rotary needs an even head size (model_dim / num_heads), found "
            f"{model.model_dim // model.num_heads}"
        )
    smallest = min(size for _, size in batch_sizes(config))
    if train.accumulate_steps > smallest:
        raise ValueError(
            f"train.accumulate_steps: expected at most train.global_batch_size={smallest}, found {train.accumulate_steps}"
        )
    worker_weights(config)
    if config.data.service and config.data.packing == "padded":
        raise ValueError("data.service: expected data.packing=joined or separated, found padded")
    if config.data.service and config.data.sharding != "batch":
        raise ValueError(f"data.service: expected data.sharding=batch (the service shards), found {config.data.sharding}")
    return config


def batch_sizes(config: Config) -> list[tuple[int, int]]:
    """(first step, global batch size) of each phase of the run, from `train.batch_ramp`."""
    phases = [(0, config.train.global_batch_size)]
    for item in filter(None, config.train.batch_ramp.split(",")):
        step, colon, size = item.partition(":")
        if not (colon and step.isdecimal() and size.isdecimal() and int(size) > 0 and int(step) > phases[-1][0]):
            raise ValueError(
                f"train.batch_ramp: expected STEP:SIZE,STEP:SIZE with rising steps, found {config.train.batch_ramp!r}"
            )
        phases.append((int(step), int(size)))
    return phases


def worker_weights(config: Config) -> tuple[float, ...]:
    """Of `data.worker_weights`; empty when none are given."""
    try:
        weights = tuple(float(item) for item in filter(None, config.data.worker_weights.split(",")))
    except ValueError:
        weights = (-1.0,)
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"data.worker_weights: expected numbers above 0, like 2,1, found {config.data.worker_weights!r}")
    return weights


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`. Unknown keys raise `ValueError`; missing ones take their default."""
    try:
        tree, config = json.loads(text), Config()
    except RecursionError:
        raise ValueError("config.json: nested too deep") from None
    kinds = {f"{s.name}.{f.name}": f.type for s in dataclasses.fields(Config) for f in dataclasses.fields(s.type)}
    if not isinstance(tree, dict) or not all(isinstance(fields, dict) for fields in tree.values()):
        raise ValueError("config.json: expected an object of sections")
    for section, fields in tree.items():
        for name, value in fields.items():
            kind = kinds.get(f"{section}.{name}")
            if kind is None:
                raise ValueError(f"config.json: unknown key {one_line(f'{section}.{name}', 60)}")
            if not _is_of_kind(value, kind):
                shown = one_line(repr(value), 60)
                raise ValueError(f"config.json: {section}.{name}: expected a value of {kind.__name__}, found {shown}")
            setattr(getattr(config, section), name, value)
    return config


def _is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value of JSON fits a field."""
    if type(value) is int and kind in (int, float):
        return abs(value) < 1 << 63
    return type(value) is kind


def cluster_facts(config: Config) -> dict[str, Any]:
    """What every task of a cluster must be started with alike; paths may differ between machines."""
    own = ("data.cache_dir", "data.source", "train.init_from")
    facts = {f"config.{name}": value for name, value in flatten(config).items() if name not in own}
    return facts | {"config.train.init_from is given": bool(config.train.init_from)}


def _match_fields(config: Config) -> dict[str, Any]:
    kinds = {
        f"{section.name}.{field.name}": field.metadata["resume"]
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(section.type)
    }
    return {name: value for name, value in flatten(config).items() if kinds[name] == "match"}


def differing_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that a resumed run must match and does not: name -> (value in the workdir, value now)."""
    before, now = _match_fields(old), _match_fields(new)
    return {name: (before[name], now[name]) for name in before if before[name] != now[name]}


def config_hash(config: Config, data_hash: str) -> str:
    """A hash of everything that determines the numbers of a run: the `match` fields and the data's own hash."""
    later = {name: default for name, default in _match_fields(Config()).items() if name in _ADDED_LATER}
    fields = {name: v for name, v in _match_fields(config).items() if name not in later or v != later[name]}
    text = json.dumps({"config": fields, "data": data_hash}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
