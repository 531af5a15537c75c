"""Tokenising a corpus once: pieces in parallel, each into shards of its own, so that the result is the same whatever the
number of processes, and a build that was killed goes on with the pieces that are missing.

Everything is written to `OUT.building`, under temporary names, and renamed when it is whole; at the end that folder becomes
OUT. A file in it says that it is a build's, and is its lock: what else lies beside OUT, whatever its name, is left alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tfdist import files, programs
from tfdist.cluster.link import supervisor
from tfdist.data import build_folder, corpus, index, tokenizer
from tfdist.data.documents import BadRecord, Part
from tfdist.data.index import FORMAT, INDEX, TOTALS, data_hash
from tfdist.data.pieces import TRAIN, VALIDATION
from tfdist.data.shard_writer import ShardWriter
from tfdist.errors import DataError

SHARD_TOKENS = 1 << 30  # at most: 2 GiB of uint16
_TRAINING_BYTES_PER_TOKEN = 1 << 12  # of a BPE vocabulary: so much text trains it, in parts from all over the corpus

Progress = Callable[[int], None]  # told how many more bytes of the source are done


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to build pieces."""

    plan: corpus.Plan
    tokenizer: str
    folder: Path
    shard_tokens: int
    max_bad_records: int


def build(
    plan: corpus.Plan, spec: str, source: str, out: Path, *, processes: int = 1, max_bad_records: int = 0,
    progress: Progress = lambda size: None, in_process: Callable[[], object] = dict,
) -> None:  # fmt: skip
    """Writes the dataset `out`. `in_process` is called first in every process that is started; with one there is none.

    Raises `DataError`; what has been built is kept, and the same call goes on with it.
    """
    folder = out.with_name(out.name + ".building")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with build_folder.held(folder, out / INDEX) as is_mine:
            if not is_mine:
                return
            build_folder.start(folder, facts_of(plan, spec))
            if not (folder / INDEX).exists():
                job = Job(plan, _tokenizer(folder, plan, spec), folder, SHARD_TOKENS, max_bad_records)
                _build_pieces(job, processes, progress, in_process)
                _write_index(job, source, spec)
            build_folder.finish(folder, out)
    except OSError as error:
        raise DataError(
            f"data: cannot write {error.filename or out}: {error.strerror}; what is finished is kept in {folder}: the same "
            "command goes on there"
        ) from error


def facts_of(plan: corpus.Plan, spec: str) -> str:
    """What decides the result, as far as it can be told without reading: sizes and times of the files stand for them."""
    kind, _ = tokenizer.kind_and_value(spec)
    of_file = tokenizer.fingerprint(tokenizer.make(spec, ())) if kind == "file" else ""
    facts = {"format": FORMAT, "tokenizer": [spec, of_file], "shard_tokens": SHARD_TOKENS, "plan": _facts(plan)}
    return json.dumps(facts, default=list)


def _facts(plan: corpus.Plan) -> dict:
    paths = sorted({span.path for piece in plan.pieces for span in piece.spans})
    try:
        states = {path: [os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths}
    except OSError as error:
        raise DataError(f"data.source: cannot read {error.filename}: {error.strerror}") from error
    splitter = dataclasses.replace(plan.splitter, names=sorted(plan.splitter.names) if plan.splitter.names else None)
    return dataclasses.asdict(dataclasses.replace(plan, splitter=splitter)) | {"files": states}


def _tokenizer(folder: Path, plan: corpus.Plan, spec: str) -> str:
    """Its name; trains and keeps it if that has not been done."""
    path = folder / tokenizer.FILE
    kind, value = tokenizer.kind_and_value(spec)
    if kind in ("bpe", "file") and not path.exists():
        texts = training_texts(plan, int(value) * _TRAINING_BYTES_PER_TOKEN) if kind == "bpe" else ()
        files.write(path, tokenizer.make(spec, texts).json.encode())
    return spec


def training_texts(plan: corpus.Plan, num_bytes: int) -> Iterator[bytes]:
    """Training text for a vocabulary, the same amount from each of some pieces that lie evenly in the corpus."""
    number = max(1, min(len(plan.pieces), num_bytes // (1 << 20)))
    for i in range(number):
        left = num_bytes // number
        for part in plan.read(plan.pieces[i * len(plan.pieces) // number]):
            if left <= 0:
                break
            if isinstance(part, Part) and part.split == TRAIN:
                left -= len(part.text)
                yield part.text
            supervisor().tick()


# ---- pieces ----


def _build_pieces(job: Job, processes: int, progress: Progress, in_process) -> None:
    missing, bad = [], 0
    for i, piece in enumerate(job.plan.pieces):
        done = build_folder.piece_record(job.folder, i)
        if done.exists():
            progress(piece.size)
            bad += _checked(json.loads(done.read_text())["bad_records"], bad, job.max_bad_records)
        else:
            missing.append(i)
    if processes == 1 or len(missing) < 2:
        for i in missing:
            bad += _checked(build_piece(job, i), bad, job.max_bad_records)
            progress(job.plan.pieces[i].size)
        return
    context = multiprocessing.get_context("spawn")  # a copy of a process with threads may hang
    with programs.imports_nothing_from_here():  # of its processes, and of the one that watches its semaphores
        pool = concurrent.futures.ProcessPoolExecutor(
            min(processes, len(missing)), context, _begin, (os.getpid(), in_process, job)
        )
        futures = {pool.submit(_build_piece_of_pool, i): i for i in missing}
    try:
        for future in concurrent.futures.as_completed(futures):
            bad += _checked(future.result(), bad, job.max_bad_records)
            progress(job.plan.pieces[futures[future]].size)
            supervisor().tick()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError("data: a process of the build was killed (out of memory?); the same command goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _checked(records: list[str], before: int, at_most: int) -> int:
    if records and before + len(records) > at_most:
        raise DataError(
            f"data.source: expected at most {at_most} bad records (data.max_bad_records), found more: {records[-1]}"
        )
    return len(records)


_job: Job | None = None  # of a process of the pool


def _build_piece_of_pool(number: int) -> list[str]:
    return build_piece(_job, number)


def _begin(parent: int, in_process: Callable[[], object], job: Job) -> None:
    """A process of the pool: it ends with the one that started it, also when that one is killed."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    in_process()

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build_piece(job: Job, number: int) -> list[str]:
    """Writes the shards of a piece, then its record; returns the bad records that were left out."""
    encoder = tokenizer.restore(job.tokenizer, job.folder)
    bad = []
    with contextlib.ExitStack() as open_ones:
        writers = {
            split: open_ones.enter_context(ShardWriter(job.folder, f"{split}-{number:05d}", encoder, job.shard_tokens))
            for split in (TRAIN, VALIDATION)
        }
        for part in job.plan.read(job.plan.pieces[number]):
            if isinstance(part, BadRecord):
                bad.append(part.what)
                _checked(bad, 0, job.max_bad_records)  # soon: there may be millions
            else:
                writers[part.split].add(part)
                supervisor().tick()
    record = {"bad_records": bad, "splits": {split: writer.shards for split, writer in writers.items()}}
    files.write(build_folder.piece_record(job.folder, number), json.dumps(record).encode())
    return bad


# ---- the end ----


def _write_index(job: Job, source: str, spec: str) -> None:
    records = [json.loads(build_folder.piece_record(job.folder, i).read_text()) for i in range(len(job.plan.pieces))]
    made = tokenizer.restore(job.tokenizer, job.folder)
    splits = {}
    for split in (TRAIN, VALIDATION):
        shards = [shard for record in records for shard in record["splits"][split]]
        totals = {name: sum(shard[name] for shard in shards) for name in TOTALS}
        splits[split] = {**totals, "shards": shards}
    if not splits[TRAIN]["tokens"]:
        raise DataError(f"data.source: expected text, found an empty source: {source}")
    content = {
        "data_hash": data_hash(splits, tokenizer.fingerprint(made)),
        "source": source,
        "command": _command(job.plan, source, spec),
        "tokenizer": spec,
        "tokenizer_hash": tokenizer.fingerprint(made),
        "vocab_size": made.vocab_size,
        "document_start": made.document_start,
        "dtype": np.dtype(tokenizer.token_dtype(made.vocab_size)).name,
        "bad_records": sum(len(record["bad_records"]) for record in records),
        "splits": splits,
    }
    index.write(job.folder, content)


def _command(plan: corpus.Plan, source: str, spec: str) -> str:
    """What builds the same again, from the same files."""
    options = {
        "source": source, "tokenizer": spec, "text_key": plan.text_key, "validation_fraction": str(plan.splitter.fraction),
        "on_bad_record": "skip" if plan.skip_bad_records else "refuse",
    }  # fmt: skip
    if plan.kind == "jsonl":
        options["max_record_mb"] = str(plan.max_record_bytes >> 20)
    return " ".join(["tfdist data build", *(f"--{name}={shlex.quote(value)}" for name, value in options.items())])
