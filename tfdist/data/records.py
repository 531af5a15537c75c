"""TFRecord files with an index: how many records each holds.

TensorFlow reads a file that was cut at the edge of a record as a shorter file, without an error. The index, written once
when the files are known to be whole, tells; with it a start in the middle passes over whole files.
"""

import concurrent.futures
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tfdist.data import sharding
from tfdist.data.order import Order
from tfdist.errors import DataError
from tfdist.files import whole_file, write
from tfdist.strategies.base import DatasetFn, InputContext

_FRAME = 16  # bytes of a record besides its data: length, checksum of the length, checksum of the data
_plain = tf.autograph.experimental.do_not_convert
Parse = Callable[[tf.Tensor], Any]  # of a vector of serialised records, [n] strings, to (x, y) or (x, y, weight)


@dataclasses.dataclass(frozen=True)
class RecordFile:
    path: str
    bytes: int
    records: int


def index_files(pattern: str, index: str | Path, *, on_bad_record: str = "refuse", max_bad_records: int = 100) -> int:
    """Reads all files of a glob, with their checksums, and writes the index. Returns the number of records.

    Raises `DataError` for a file that ends in the middle of a record, and for bad records, or more than `max_bad_records`
    of them with `on_bad_record="skip"`.
    """
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise DataError(f"records: expected files at {pattern!r}, found none")
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        scanned = dict(zip(paths, pool.map(_scan, paths), strict=True))
    bad = [(path, int(offsets[i])) for path, (offsets, numbers) in scanned.items() for i in numbers]
    if bad and (on_bad_record != "skip" or len(bad) > max_bad_records):
        at_most = max_bad_records if on_bad_record == "skip" else 0
        raise DataError(
            f"records: expected at most {at_most} bad records, found {len(bad)}: the first in {bad[0][0]} at byte "
            f"{bad[0][1]} (its checksum is wrong); write the file again, or on_bad_record='skip' with a budget"
        )
    if bad:
        logging.warning("records: %d bad records are left out, the first in %s at byte %d", len(bad), *bad[0])
    try:
        files = [
            _without(Path(path), offsets, numbers, Path(f"{index}.cleaned"))
            if numbers
            else RecordFile(os.path.abspath(path), int(offsets[-1]), len(offsets) - 1)
            for path, (offsets, numbers) in scanned.items()
        ]
        text = json.dumps({"format": 1, "files": [dataclasses.asdict(file) for file in files]}, indent=1)
        write(Path(index), text.encode())
    except OSError as error:
        raise DataError(f"records: cannot write {error.filename or index}: {error.strerror}") from error
    return sum(file.records for file in files)


def _without(path: Path, offsets: np.ndarray, bad: list[int], folder: Path) -> RecordFile:
    """A copy without the bad records: TensorFlow cannot pass over them."""
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    cleaned = folder / f"{name}-{path.name}"
    with open(path, "rb") as source, whole_file(cleaned) as copy:
        for i, (start, end) in enumerate(itertools.pairwise(offsets)):
            record = source.read(end - start)
            if i not in bad:
                copy.write(record)
    return RecordFile(str(cleaned.absolute()), cleaned.stat().st_size, len(offsets) - 1 - len(bad))


def read_index(index: str | Path) -> list[RecordFile]:
    """The files of an index. Raises `DataError` for one that is missing or has another size than when it was indexed."""
    try:
        content = json.loads(Path(index).read_text())
        files = [RecordFile(**file) for file in content["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"records: cannot read the index {index}: {error}") from error
    for file in files:
        size = os.stat(file.path).st_size if os.path.exists(file.path) else -1
        if size != file.bytes:
            found = f"{size} bytes (cut short, or written again)" if size >= 0 else "no such file"
            raise DataError(f"records: expected {file.bytes} bytes of {file.path}, as in {index}, found {found}")
    return files


def dataset_fn(
    index: str | Path, parse: Parse, *, global_batch_size: int, accumulate_steps: int = 1, policy: str = "batch",
    repeat: bool = True, seed: int | None = None,
) -> DatasetFn:  # fmt: skip
    """For `Trainer.train` and `evaluate`: each element is this pipeline's rows of a global batch, in the order of the files.

    `policy`: "batch", every pipeline reads all files and parses its own rows, the same batches on any number of workers; or
    "file", each reads its own files. `seed` shuffles the files, not the records in them, anew in each epoch. A start at any
    step reads nothing of what comes before. Without `repeat` the last batch may be smaller.
    """
    files = read_index(index)
    if policy not in ("batch", "file"):
        raise DataError(f"records: expected policy batch or file, found {policy!r}")
    sharding.say_what_is_given_up(policy)

    def make(context: InputContext) -> tf.data.Dataset:
        rows = context.rows(global_batch_size, accumulate_steps)
        own = files
        if policy == "file":
            owners = sharding.owner_of_files(len(files), context.pipelines)
            own = [file for file, owner in zip(files, owners, strict=True) if owner == context.pipeline]
        size = global_batch_size if policy == "batch" else len(rows)
        own = [file for file in own if file.records]
        total = sum(file.records for file in own)
        if not total or not len(rows):
            raise DataError(f"records: expected records for worker {context.pipeline} of {context.pipelines}, found none")
        first = context.start_step * size
        epochs = tf.data.Dataset.range(first // total, np.iinfo(np.int64).max if repeat else 1)
        one_epoch = _plain(lambda epoch: _epoch(own, epoch, seed, first - epoch * total))
        stream = epochs.flat_map(one_epoch).batch(size)
        if policy == "batch" and len(rows) < size:
            mine = tf.constant(rows, tf.int32)
            stream = stream.map(_plain(lambda batch: tf.gather(batch, tf.boolean_mask(mine, mine < tf.size(batch)))))
        return stream.map(parse, num_parallel_calls=2, deterministic=True)

    return make


def _epoch(files: list[RecordFile], epoch: tf.Tensor, seed: int | None, skip: tf.Tensor) -> tf.data.Dataset:
    """The records of one epoch but the first `skip`: whole files are passed over, of one a part is read and dropped."""
    order = tf.range(len(files), dtype=tf.int64)
    if seed is not None:
        order = Order(len(files), seed).sample(epoch * len(files) + order)
    paths = tf.gather(tf.constant([file.path for file in files]), order)
    numbers = tf.gather(tf.constant([file.records for file in files], tf.int64), order)
    left_out = tf.maximum(skip - tf.cumsum(numbers, exclusive=True), 0)
    opened = left_out < numbers
    parts = tf.data.Dataset.from_tensor_slices((tf.boolean_mask(paths, opened), tf.boolean_mask(left_out, opened)))
    return parts.flat_map(_plain(lambda path, left_out: tf.data.TFRecordDataset(path).skip(left_out)))


def _offsets(path: str) -> np.ndarray:
    """Where each record begins, and where the last one ends, from the lengths that stand before them."""
    size, offsets = os.stat(path).st_size, [0]
    with open(path, "rb") as file:
        while offsets[-1] < size:
            file.seek(offsets[-1])
            head = file.read(8)
            end = offsets[-1] + _FRAME + struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
            if end > size:
                raise DataError(
                    f"records: expected whole records in {path}, found {size - offsets[-1]} bytes of one at {offsets[-1]}: "
                    "the file is cut short or damaged; write it again"
                )
            offsets.append(end)
    return np.array(offsets)


def _scan(path: str) -> tuple[np.ndarray, list[int]]:
    """(where records begin, which are bad): reads a file with TensorFlow's own checksums; that gives a file up at the first
    bad record, so it starts again behind each."""
    try:
        offsets = _offsets(path)
    except OSError as error:
        raise DataError(f"records: cannot read {path}: {error.strerror}") from error
    as_it_is = tf.data.Options()  # a rewritten graph loses `byte_offsets`
    as_it_is.experimental_optimization.apply_default_optimizations = False
    as_it_is.experimental_optimization.inject_prefetch = False
    as_it_is.autotune.enabled = False
    bad, record = [], 0
    while record < len(offsets) - 1:
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[path], compression_type="", buffer_size=tf.constant(1 << 20, tf.int64),
            byte_offsets=tf.constant([offsets[record]], tf.int64),
        )  # fmt: skip
        try:
            for _ in tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).with_options(as_it_is):
                record += 1
        except tf.errors.DataLossError:
            bad.append(record)
            record += 1
    return offsets, bad
