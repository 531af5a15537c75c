"""Tokenised text on disk: `.npy` shards and a `dataset.json`, in a cache that is addressed by content.

A dataset is built once, under a temporary name, by one builder at a time, and renamed into place; readers never see half
of one. Its address and `data_hash` is a hash of everything that determines the tokens.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tfdist.cluster.link import supervisor
from tfdist.data import corpus
from tfdist.data.tokenizer import ByteTokenizer
from tfdist.errors import DataError

_FORMAT = 1
_SHARD_TOKENS = 1 << 25  # 64 MiB of uint16
_INDEX = "dataset.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    path: Path
    tokens: int
    header_bytes: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Split:
    shards: tuple[Shard, ...]
    tokens: int
    documents: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into bits per byte."""
        return self.text_bytes / self.tokens


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    path: Path
    data_hash: str
    tokenizer: str
    vocab_size: int
    splits: dict[str, Split]


def open_source(source: str, text_key: str, validation_fraction: float, cache_dir: Path) -> TokenDataset:
    """The token dataset of a source, built into the cache if it is not there yet. Raises `DataError`."""
    if source.startswith("shards:"):
        return read(Path(source.removeprefix("shards:")))

    def documents() -> Iterator[corpus.Document]:
        for document in corpus.documents(source, text_key, validation_fraction):
            supervisor().tick()
            yield document

    tokenizer = ByteTokenizer()
    data_hash = content_hash(documents(), tokenizer)
    final = cache_dir / data_hash
    if not (final / _INDEX).exists():
        _make_writable(cache_dir)
        with _one_builder(cache_dir / f"{data_hash}.lock"):
            if not (final / _INDEX).exists():
                build(documents, tokenizer, source, data_hash, final)
    return read(final)


def content_hash(documents: Iterable[corpus.Document], tokenizer: ByteTokenizer) -> str:
    """Of the texts, their names, order and split, and the tokenizer: not of where the files lie or when they changed."""
    digest = hashlib.sha256(f"{_FORMAT}/{tokenizer.name}/{tokenizer.vocab_size}".encode())
    for document in documents:
        digest.update(f"/{document.split}/{document.name}/{len(document.text)}/".encode())
        digest.update(hashlib.sha256(document.text).digest())
    return digest.hexdigest()[:32]


def build(
    documents: Callable[[], Iterable[corpus.Document]],
    tokenizer: ByteTokenizer,
    source: str,
    data_hash: str,
    final: Path,
) -> None:
    """Writes the dataset at `final`, atomically."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=final.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's are for the owner alone; a cache may be shared
        writers = {split: _SplitWriter(temporary, split) for split in (corpus.TRAIN, corpus.VALIDATION)}
        for document in documents():
            writers[document.split].add(tokenizer.encode_document(document.text), len(document.text))
        index = {
            "format": _FORMAT,
            "data_hash": data_hash,
            "source": source,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "splits": {split: writer.finish() for split, writer in writers.items()},
        }
        with open(temporary / _INDEX, "w") as file:
            json.dump(index, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # a directory without an index: left by hand
            shutil.rmtree(final)
        os.rename(temporary, final)
    except OSError as error:
        raise DataError(f"data: cannot build the token cache in {final.parent}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(path: Path) -> TokenDataset:
    """Opens a built dataset; checks that every shard is there, as long as the index says, and within the vocabulary."""
    try:
        index = json.loads((path / _INDEX).read_text())
    except FileNotFoundError:
        raise DataError(f"data: expected a token dataset ({_INDEX}) in {path}, found none") from None
    except (OSError, ValueError) as error:
        raise DataError(f"data: cannot read {path / _INDEX}: {error}") from error
    if index.get("format") != _FORMAT:
        raise DataError(f"data: expected format {_FORMAT} in {path / _INDEX}, found {index.get('format')!r}")
    splits = {
        name: Split(
            tuple(_open_shard(path / s["file"], s["tokens"], index["vocab_size"]) for s in split["shards"]),
            tokens=sum(shard["tokens"] for shard in split["shards"]),
            documents=split["documents"],
            text_bytes=split["text_bytes"],
        )
        for name, split in index["splits"].items()
    }
    return TokenDataset(path, index["data_hash"], index["tokenizer"], index["vocab_size"], splits)


def _open_shard(path: Path, tokens: int, vocab_size: int) -> Shard:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"data: cannot read shard {path}: {error}") from error
    if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32) or len(array) != tokens:
        raise DataError(
            f"data: expected {tokens} tokens of uint16 or uint32 in {path}, found {array.dtype} {list(array.shape)}"
        )
    if tokens and array.max() >= vocab_size:
        raise DataError(f"data: expected token ids below its vocabulary of {vocab_size}, found {array.max()} in {path}")
    return Shard(path, tokens, header_bytes=path.stat().st_size - array.nbytes, dtype=array.dtype.name)


class _SplitWriter:
    """Collects documents into shards of at most about `_SHARD_TOKENS` tokens; a document is never cut."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.pending: list[np.ndarray] = []
        self.pending_tokens = self.pending_documents = self.documents = self.text_bytes = 0
        self.shards: list[dict] = []

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        if self.pending and self.pending_tokens + len(tokens) > _SHARD_TOKENS:
            self.flush()
        self.pending.append(tokens)
        self.pending_tokens += len(tokens)
        self.pending_documents += 1
        self.text_bytes += text_bytes

    def flush(self) -> None:
        path = self.folder / f"{self.split}-{len(self.shards):05d}.npy"
        with open(path, "wb") as file:
            np.save(file, np.concatenate(self.pending))
            file.flush()
            os.fsync(file.fileno())
        self.shards.append({
            "file": path.name,
            "tokens": self.pending_tokens,
            "documents": self.pending_documents,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        })  # fmt: skip
        self.documents += self.pending_documents
        self.pending, self.pending_tokens, self.pending_documents = [], 0, 0

    def finish(self) -> dict:
        if self.pending:
            self.flush()
        return {"shards": self.shards, "documents": self.documents, "text_bytes": self.text_bytes}


def _make_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise DataError(
            f"data: cannot create the cache {cache_dir}: {error.strerror}; set TFDIST_CACHE or data.cache_dir"
        ) from error


@contextlib.contextmanager
def _one_builder(path: Path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
