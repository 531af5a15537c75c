"""One short function per command; `flags` are the parsed command-line flags."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from absl import logging

from tfdist import files
from tfdist.checkpoint import store
from tfdist.checkpoint.workdir import Workdir
from tfdist.cli import job
from tfdist.cli.processes import workdir_of
from tfdist.cluster.link import supervisor
from tfdist.cluster.resolve import launch_token, resolve
from tfdist.config import to_json, worker_weights
from tfdist.data import audit as data_audit
from tfdist.errors import CheckpointError, UserError, printable
from tfdist.infer import export as export_model
from tfdist.infer.generate import Sampling, generate_text
from tfdist.metrics import meters, report
from tfdist.metrics.writers import JsonLines, Terminal
from tfdist.models import count
from tfdist.models.transformer import next_token_loss
from tfdist.strategies import select, support
from tfdist.strategies.serve import serve
from tfdist.train import actions, evaluate
from tfdist.verification import run as verification

_POLL_S = 1.0  # how often an evaluator looks for a new checkpoint


def train(flags) -> None:
    """Trains, or goes on where the run in the workdir stopped."""
    config, cluster = flags.config, resolve()
    path = flags.workdir or workdir_of([f"--config={flags['config'].config_filename}"])
    if cluster.task.type == "evaluator":
        evaluate_checkpoints(config, Workdir(path), flags.fresh)
        return
    if cluster.ps and cluster.task.type in ("worker", "ps"):
        if cluster.task.type == "worker":
            job.open_data(config)  # the chief's input graphs read this machine's copy
        serve(cluster, config.cluster.start_timeout_s)
    strategy = select.make(config.strategy, cluster, config.cluster, worker_weights(config))
    dataset = job.open_data(config)
    job.agree_on_data(strategy, dataset.data_hash)
    eval_data = job.eval_data(config, dataset)
    workdir = job.take_workdir(path, config, flags.fresh) if strategy.is_chief else Workdir(path)
    if strategy.is_chief:
        job.keep_tokenizer(dataset, workdir)
    trainer = job.build_trainer(config, strategy, dataset, workdir)
    if not trainer.restore(workdir.path) and config.train.init_from:
        if strategy.is_chief:
            job.load_weights(trainer.model, config.train.init_from)
        trainer.share_state()

    flops = count.flops_per_token(config.model, config.data.sequence_length)
    peak = job.peak_flops(config, strategy) if not strategy.num_servers else meters.NO_PEAK
    if strategy.is_chief:
        tokens = dataset.splits["train"].tokens
        print(f"{trainer.model.count_params():,} parameters on {strategy}; {tokens:,} tokens of text")
        print(meters.memory(trainer.state.bytes_per_replica(trainer.accumulate_steps)))
        print(meters.formula(flops, peak), flush=True)
    bytes_per_token = dataset.splits["validation"].bytes_per_token
    keep = config.checkpoint
    with contextlib.closing(trainer):
        todo = [
            actions.Log(config.log.every_steps, flops, peak.flops_per_s),
            actions.StopIfNotFinite(config.train.max_skipped_steps),
            actions.Evaluate(eval_data, config.eval.every_steps, bytes_per_token, config.eval.max_steps),
            actions.Checkpoint(keep.every_steps, keep.keep_last, keep.keep_every_steps),
        ]
        for train_data, last_step in job.train_phases(config, dataset, trainer.step):
            trainer.train(train_data, last_step, todo, config.train.num_steps)
        actions.write_evaluation(trainer, eval_data, bytes_per_token)
    trainer.phase("finish")
    if not strategy.is_chief:
        return
    try:
        _conclude(config, trainer, workdir)
    except OSError as error:  # of a disk that became full, a folder that went away: what was trained is saved
        where = error.filename or workdir.path
        logging.warning(
            "all steps are done and saved, but the sample or the report cannot be written to %s: %s",
            where,
            error.strerror or error,
        )


def _conclude(config, trainer, workdir: Workdir) -> None:
    """What a run leaves besides its checkpoints: a sample, the report, and what to do next."""
    with trainer.averaged_weights():
        text = _sample(config, trainer.model, workdir, trainer.step)
    report.plot(workdir.metrics, workdir.report)
    print(f"\nsample:\n{printable(text)}\n\nloss curves: {workdir.report}")
    print(f"next: {_program()} generate --workdir={shlex.quote(str(workdir.path))} --prompt='def main('", flush=True)


def _program() -> str:
    """What calls this tfdist from the user's shell."""
    own = Path(sys.executable).parent / "tfdist"
    path = os.environ.get("PATH", os.defpath)
    if launch_token():  # the launcher has put this folder in front
        path = path.removeprefix(f"{own.parent}{os.pathsep}")
    found = shutil.which("tfdist", path=path)
    if found and Path(found).resolve() == own.resolve():
        return "tfdist"
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


def evaluate_checkpoints(config, workdir: Workdir, fresh: bool) -> None:
    """The evaluator of a cluster: the exact validation loss of the newest checkpoint, again and again, up to that of the
    last step. Of a `fresh` run it waits for the beginning."""
    strategy = local_strategy(config)
    dataset = job.open_data(config)
    model = job.build_model(config, strategy, dataset.document_start)
    eval_data, steps = job.eval_data(config, dataset), evaluation(config, strategy, model)
    writers, done = [Terminal()], -1
    while done < config.train.num_steps:
        supervisor().phase("wait", max(done, 0))
        if max(store.steps(workdir.checkpoints), default=-1) <= done or (fresh and not workdir.is_of_launch(launch_token())):
            time.sleep(_POLL_S)
            continue
        supervisor().phase("evaluate" if done >= 0 else "compile")
        try:
            found = store.latest(workdir.checkpoints)
            if found is None or found.step <= done:  # the newest one is damaged
                time.sleep(_POLL_S)
                continue
            done = job.load_checkpoint(model, found, dataset.data_hash)
        except (CheckpointError, OSError) as error:  # the chief may have deleted it meanwhile
            logging.warning("%s; looking again", error)
            time.sleep(_POLL_S)
            continue
        result = evaluate.run(steps, strategy.distribute(eval_data))
        row = actions.evaluation_row(done, result, dataset.splits["validation"].bytes_per_token)
        if len(writers) == 1:
            writers.append(JsonLines(workdir.metrics))
        for writer in writers:
            writer.write(row)


def evaluation(config, strategy, model):
    """The compiled evaluation loop of a language model."""
    jit_compile = support.jit_compile(config.train.jit_compile, model)
    return strategy.make_steps(evaluate.make_eval_step(strategy, model, next_token_loss, jit_compile))


def _sample(config, model, workdir: Workdir, step: int) -> str:
    """A text that the model starts by itself, also kept in the workdir."""
    num_tokens = min(config.log.sample_tokens, config.data.sequence_length - 1)
    sampling, tokenizer = Sampling(temperature=0.8, seed=config.train.seed), job.text_tokenizer(config, workdir)
    text = generate_text(model, "", num_tokens, sampling, tokenizer) if num_tokens and tokenizer.document_start >= 0 else ""
    workdir.samples.mkdir(parents=True, exist_ok=True)
    files.write(workdir.samples / f"step-{step:08d}.txt", text.encode())
    return text


def verify(flags) -> None:
    """The same training on several strategies, on this machine; exit code 7 if they differ."""
    config = flags.config
    if flags.dtype != "own":
        config.model.dtype = flags.dtype
    report = verification.verify_subject(
        "tfdist.cli.job:verification_subject",
        to_json(config),
        strategies=flags.strategies,
        num_steps=flags.steps,
        dtype=flags.dtype,
        tell=lambda line: print(line, flush=True),
    )
    print(f"\n{report}")
    sys.exit(report.exit_code)


def audit(flags) -> None:
    """Which worker reads what, without a cluster; exit code 7 where a sample is missing or read twice."""
    report = data_audit.audit(job.open_data(flags.config), flags.config, flags.workers, flags.steps)
    print(json.dumps(report.as_dict()) if flags.json else report)
    sys.exit(report.exit_code)


def local_strategy(config):
    """For what runs on this machine alone, whatever the run was trained on."""
    kind = config.strategy.kind if config.strategy.kind in ("one_device", "mirrored") else "auto"
    return select.make(dataclasses.replace(config.strategy, kind=kind))


def eval(flags) -> None:
    """The loss over a whole split, each token counted once."""
    config, workdir = flags.config, Workdir(flags.workdir)
    strategy = local_strategy(config)
    dataset = job.open_data(config)
    model, step = job.restored_model(config, strategy, workdir)
    iterator = strategy.distribute(job.eval_data(config, dataset, flags.split))
    result = evaluate.run(evaluation(config, strategy, model), iterator)
    bytes_per_token = dataset.splits[flags.split].bytes_per_token
    bits = f"{result.bits_per_byte(bytes_per_token):.6f} bits per byte, " if bytes_per_token else ""
    print(
        f"step {step}: {flags.split} loss {result.loss:.6f}, perplexity {result.perplexity:.4f}, {bits}"
        f"{result.tokens:,} tokens"
    )


def generate(flags) -> None:
    """Text that goes on from a prompt."""
    workdir = Workdir(flags.workdir)
    model, _ = job.restored_model(flags.config, local_strategy(flags.config), workdir)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    num_tokens = flags.num_tokens or min(200, flags.config.data.sequence_length - 1)
    tokenizer = job.text_tokenizer(flags.config, workdir)
    print(printable(generate_text(model, flags.prompt, num_tokens, sampling, tokenizer)))


def export(flags) -> None:
    """The newest checkpoint's model as a `.keras` file."""
    if not flags.out.endswith(".keras"):
        raise UserError(f"--out: expected a file name ending in .keras, found {flags.out!r}")
    model, step = job.restored_model(flags.config, local_strategy(flags.config), Workdir(flags.workdir))
    export_model.to_keras(model, Path(flags.out))
    print(f"step {step}: {flags.out} ({model.count_params():,} parameters)")
    print(f"next: python -c \"import keras, tfdist.models.transformer; keras.saving.load_model('{flags.out}').summary()\"")
