"""From a config to the pieces of a run."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import keras
from absl import logging

from tfdist import files
from tfdist.checkpoint import keys, store
from tfdist.checkpoint.workdir import Workdir
from tfdist.cluster.link import supervisor
from tfdist.cluster.resolve import launch_token
from tfdist.config import Config, batch_sizes, config_hash, differing_fields, from_json, to_json, validate
from tfdist.data import shards, tokenizer
from tfdist.data.input import eval_dataset_fn, train_dataset_fn
from tfdist.errors import CheckpointError, DataError, UserError, one_line
from tfdist.metrics import meters
from tfdist.metrics.writers import TensorBoard, Terminal
from tfdist.models import count
from tfdist.models.transformer import TransformerLM, next_token_loss, training_loss
from tfdist.optim.adamw import adamw
from tfdist.strategies.base import DatasetFn, Strategy
from tfdist.train import beginning
from tfdist.train.state import MODEL, averaged, load
from tfdist.train.trainer import Trainer
from tfdist.verification.subject import Subject


def open_data(config: Config) -> shards.TokenDataset:
    """Builds the token cache if needed, and checks that the model can read it."""
    supervisor().phase("data")
    default = os.environ.get("TFDIST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tfdist"
    cache_dir = Path(config.data.cache_dir or default).expanduser()
    dataset = shards.open_source(config.data, cache_dir)
    if dataset.vocab_size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size: expected at least {dataset.vocab_size} (the tokenizer of {dataset.path}), found "
            f"{config.model.vocab_size}"
        )
    return dataset


def train_phases(config: Config, dataset: shards.TokenDataset, step: int) -> Iterator[tuple[DatasetFn, int]]:
    """(data, last step) of what is left after `step`: one, or one for each batch size of `train.batch_ramp`."""
    starts = [start for start, _ in batch_sizes(config)]
    for phase, end in enumerate([*starts[1:], config.train.num_steps]):
        end = min(end, config.train.num_steps)
        if end > max(step, starts[phase]):
            yield train_dataset_fn(dataset, config, phase), end


def eval_data(config: Config, dataset: shards.TokenDataset, split: str = "validation") -> DatasetFn:
    return eval_dataset_fn(dataset, config, split)


def build_model(config: Config, strategy: Strategy, document_start: int) -> TransformerLM:
    """On every replica, with initial weights that depend on the seed alone. `document_start`: of the tokenizer."""
    keras.utils.set_random_seed(config.train.seed)
    with strategy.scope():
        return _model(config, document_start)


def _model(config: Config, document_start: int) -> TransformerLM:
    separated = config.data.packing == "separated"
    return TransformerLM(config.model, config.data.sequence_length, document_start if separated else -1)


def agree_on_data(strategy: Strategy, data_hash: str) -> None:
    """Every worker reads its own copy of the data; training on different ones must not begin. Every worker calls it."""
    hashes = [message.decode() for message in strategy.exchange(data_hash.encode())]
    for task, found in zip(strategy.cluster.collective, hashes, strict=False):
        if found != hashes[0]:
            raise UserError(
                f"data: differs between the workers: {hashes[0][:16]} at {strategy.cluster.leader}, {found[:16]} at {task}; "
                "give all of them the same files (data.source) and the same validation_fraction"
            )


def peak_flops(config: Config, strategy: Strategy) -> meters.Peak:
    """Of all workers together; they measure at the same time, so that those who share a machine share its rate. Every
    worker calls it."""
    strategy.barrier()
    mine = meters.peak_flops(strategy.local_replicas(), config.model.dtype)
    rates = [float.fromhex(message.decode()) for message in strategy.exchange(mine.flops_per_s.hex().encode())]
    return meters.Peak(sum(rates), mine.source + (f", of {len(rates)} workers" if len(rates) > 1 else ""))


def build_trainer(config: Config, strategy: Strategy, dataset: shards.TokenDataset, workdir: Workdir) -> Trainer:
    model, data_hash = build_model(config, strategy, dataset.document_start), dataset.data_hash
    with strategy.scope():
        optimizer = adamw(config.optimizer, config.train.num_steps, model)
    writers = [Terminal(config.train.num_steps)] if strategy.is_chief else []
    if config.log.tensorboard and strategy.is_chief:
        writers.append(TensorBoard(workdir.tensorboard))
    return Trainer(
        strategy,
        model,
        optimizer,
        training_loss(config.train.label_smoothing, config.train.z_loss),
        eval_loss=next_token_loss,
        clip_norm=config.train.clip_norm,
        accumulate_steps=config.train.accumulate_steps,
        steps_per_loop=config.train.steps_per_loop,
        seed=config.train.seed,
        jit_compile=config.train.jit_compile,
        reduce_dtype=config.strategy.reduce_dtype,
        facts={"data_hash": data_hash, "config_hash": config_hash(config, data_hash)},
        writers=writers,
    )


def verification_subject(config_json: str) -> Subject:
    """What `tfdist verify` trains on each strategy: the pieces of the config's run."""
    config = from_json(config_json)
    dataset = open_data(config)
    return Subject(
        model_fn=lambda: _model(config, dataset.document_start),
        optimizer_fn=lambda model: adamw(config.optimizer, config.train.num_steps, model),
        loss=training_loss(config.train.label_smoothing, config.train.z_loss),
        dataset_fn=train_dataset_fn(dataset, config),
        options={
            "clip_norm": config.train.clip_norm,
            "accumulate_steps": config.train.accumulate_steps,
            "seed": config.train.seed,
            "jit_compile": config.train.jit_compile,
        },
    )


def take_workdir(path: str, config: Config, fresh: bool) -> Workdir:
    """Locks the workdir and refuses a config that does not fit the run in it."""
    workdir = Workdir(path)
    workdir.lock()
    if fresh and not workdir.is_of_launch(launch_token()):  # a restart of a fresh run goes on with it
        with beginning.cannot_write(workdir):
            workdir.set_aside()
            workdir.belongs_to_launch(launch_token())
    beginning.check_nothing_lost(workdir)  # before a new config hides which run it was
    if store.steps(workdir.checkpoints) and workdir.config.exists():
        try:
            old = validate(from_json(files.read_inside(workdir.path, workdir.config.name).decode()))
        except (OSError, ValueError) as error:
            raise UserError(f"workdir: {workdir.config} is damaged ({error}); --fresh starts anew") from error
        differing = differing_fields(old, config)
        if differing:
            fields = "; ".join(f"{name} was {before!r}, now {now!r}" for name, (before, now) in differing.items())
            raise UserError(
                f"workdir: {path} holds a run with another config: {fields}. Use these values, another --workdir, or --fresh"
            )
        reached = max(store.steps(workdir.checkpoints))
        if sizes_up_to(reached, old) != sizes_up_to(reached, config):
            raise UserError(
                f"train.batch_ramp: expected {old.train.batch_ramp!r} up to step {reached} (the run in {path}), found "
                f"{config.train.batch_ramp!r}; only later steps may change"
            )
        if old.train.num_steps != config.train.num_steps:
            logging.warning(
                "train.num_steps was %d, now %d: the learning-rate schedule is planned anew",
                old.train.num_steps, config.train.num_steps,
            )  # fmt: skip
    beginning.check_writable(workdir, workdir.samples)
    with beginning.cannot_write(workdir):
        files.write(workdir.config, to_json(config).encode())
    return workdir


def sizes_up_to(step: int, config: Config) -> list[tuple[int, int]]:
    return [(start, size) for start, size in batch_sizes(config) if start < step]


def restored_model(config: Config, strategy: Strategy, workdir: Workdir) -> tuple[TransformerLM, int]:
    """The model of the newest good checkpoint, and its step."""
    found = _latest(workdir)
    shapes = [entry["shape"] for key, entry in found.manifest["arrays"].items() if key.startswith(MODEL)]
    there = sum(math.prod(shape) for shape in shapes)
    asked = count.num_parameters(config.model, config.data.sequence_length)
    if there != asked:  # before memory is taken for what a config asks for
        raise CheckpointError(
            f"checkpoint: expected the {asked} parameters of {workdir.config} in {found.path}, found {there}"
        )
    model = build_model(config, strategy, text_tokenizer(config, workdir).document_start)
    return model, load_checkpoint(model, found)


def _latest(workdir: Workdir) -> store.Checkpoint:
    found = store.latest(workdir.checkpoints)
    if found is None:
        raise CheckpointError(f"checkpoint: expected a checkpoint in {workdir.checkpoints}, found none")
    return found


def keep_tokenizer(dataset: shards.TokenDataset, workdir: Workdir) -> None:
    """A run can be sampled from without its data."""
    json = dataset.make_tokenizer().json
    if json:
        with beginning.cannot_write(workdir):
            files.write(workdir.tokenizer, json.encode())


def text_tokenizer(config: Config, workdir: Workdir) -> tokenizer.Tokenizer:
    """The one that a run was trained with."""
    made = tokenizer.restore(config.data.tokenizer, workdir.path)
    if made.vocab_size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size: expected at least the {made.vocab_size} of the tokenizer in {workdir.path}, found "
            f"{config.model.vocab_size}"
        )
    return made


def load_weights(model: TransformerLM, origin: str) -> int:
    """Weights only, from another workdir or a `.keras` file; the step they are from, 0 for a file."""
    if origin.endswith(".keras"):
        values = {MODEL + key: variable for key, variable in keys.model_keys(model).items()}
        load(values, _keras_file_arrays(origin), origin, exact=False)
        return 0
    return load_checkpoint(model, _latest(Workdir(origin)))


def load_checkpoint(model: TransformerLM, found: store.Checkpoint, data_hash: str = "") -> int:
    """A checkpoint's weights; its step. With `data_hash` it must be of a run on that data."""
    if data_hash and found.manifest.get("data_hash") != data_hash:
        there = one_line(repr(found.manifest.get("data_hash")), 60)
        raise UserError(
            f"data: expected {there} (of {found.path}), found {data_hash!r}; give every task the same files (data.source)"
        )
    values = {MODEL + key: variable for key, variable in keys.model_keys(model).items()}
    load(values, averaged(found.arrays(), str(found.path)), str(found.path), exact=False)
    return found.step


def _keras_file_arrays(path: str) -> dict:
    try:
        source = keras.saving.load_model(path, compile=False)
    except Exception as error:  # of a file from elsewhere: whatever Keras raises
        raise CheckpointError(f"train.init_from: cannot read {path}: {one_line(error, 200)}") from error
    return {MODEL + key: variable.numpy() for key, variable in keys.model_keys(source).items()}
