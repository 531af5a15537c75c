"""Where text comes from: documents in a fixed order, split into train and validation."""

import dataclasses
import glob
import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tfdist.data import tfds_source
from tfdist.errors import DataError

TRAIN, VALIDATION = "train", "validation"
_FEW_DOCUMENTS = 20  # below this a split by document would be too coarse
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    split: str  # TRAIN or VALIDATION
    text: bytes


def documents(source: str, text_key: str, validation_fraction: float) -> Iterator[Document]:
    """All documents of a source. Raises `DataError` for one that is missing, empty or not text.

    `stdlib`: the source code of the running Python's standard library. `files:GLOB[,GLOB...]`: text files. `tfds:NAME`:
    a TensorFlow dataset, with its own validation (else test) split where it has one. Otherwise documents are split by
    a hash of their name; fewer than 20 documents each give their last part to validation.
    """
    kind, _, rest = source.partition(":")
    if kind == "stdlib" and not rest:
        root = Path(sysconfig.get_paths()["stdlib"])
        return _split(_read(_library_files(root), skip_binary=True), validation_fraction)
    if kind == "files" and rest:
        return _split(_read(_matching_files(rest)), validation_fraction)
    if kind == "tfds" and rest:
        train, validation = tfds_source.read(rest, text_key)
        if validation is None:
            return _split(train, validation_fraction)
        return _labelled(train, validation)
    raise DataError(f"data.source: expected stdlib, files:GLOB, tfds:NAME or shards:DIR, found {source!r}")


def _library_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if not _NOT_LIBRARY.intersection(p.relative_to(root).parts))


def _matching_files(patterns: str) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns.split(","):
        matches = {Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
        if not matches:
            raise DataError(f"data.source: expected files at {pattern!r}, found none; the path is relative to {Path.cwd()}")
        found |= matches
    return sorted(found)


def _read(paths: list[Path], skip_binary: bool = False) -> list[tuple[str, bytes]]:
    """(name, text) of each file; names are relative to the deepest common folder, so a corpus can move."""
    root = os.path.commonpath([path.absolute().parent for path in paths])
    named = []
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"data.source: cannot read {path}: {error.strerror}") from error
        if b"\0" in text:
            if skip_binary:
                continue
            raise DataError(f"data.source: expected text, found a binary file (it holds NUL bytes): {path}")
        named.append((path.absolute().relative_to(root).as_posix(), text))
    return named


def _split(named: list[tuple[str, bytes]], fraction: float) -> Iterator[Document]:
    named = [(name, text) for name, text in named if text]
    if not named:
        raise DataError("data.source: expected text, found an empty source")
    if len(named) < _FEW_DOCUMENTS:
        return _split_tails(named, fraction)
    by_hash = sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).digest())
    validation = {name for name, _ in by_hash[: math.ceil(fraction * len(named))]}
    return (Document(name, VALIDATION if name in validation else TRAIN, text) for name, text in named)


def _split_tails(named: list[tuple[str, bytes]], fraction: float) -> Iterator[Document]:
    for name, text in named:
        cut = len(text) - math.floor(fraction * len(text))
        yield Document(name, TRAIN, text[:cut])
        if text[cut:]:
            yield Document(name, VALIDATION, text[cut:])


def _labelled(train: list[tuple[str, bytes]], validation: list[tuple[str, bytes]]) -> Iterator[Document]:
    if not any(text for _, text in train):
        raise DataError("data.source: expected text, found an empty source")
    for split, named in ((TRAIN, train), (VALIDATION, validation)):
        yield from (Document(name, split, text) for name, text in named if text)
