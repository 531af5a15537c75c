"""Tokenised text on disk: `.npy` shards and a `dataset.json`, opened and checked, or built into a cache first.

The cache is addressed by content: a hash of everything that determines the tokens.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from absl import logging

from tfdist import files
from tfdist.config import DataConfig
from tfdist.data import build, corpus, tokenizer
from tfdist.data.documents import Part
from tfdist.data.shard_writer import DOCUMENTS
from tfdist.errors import DataError

_VERIFIED = ".verified.json"  # sizes and times of the files whose checksums were found right


@dataclasses.dataclass(frozen=True)
class Shard:
    path: Path
    tokens: int
    header_bytes: int
    dtype: str
    documents: int  # how many begin in it

    def starts_and_keys(self) -> np.ndarray:
        """int64 [documents, 2]: the first token of each document that begins here, and its key."""
        return np.load(self.path.with_name(self.path.stem + DOCUMENTS), mmap_mode="r")

    def read(self) -> np.ndarray:
        """Its tokens, mapped from the file."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


@dataclasses.dataclass(frozen=True)
class Split:
    shards: tuple[Shard, ...]
    tokens: int
    documents: int
    text_bytes: int  # 0: unknown

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into bits per byte; 0 where the text is not known."""
        return self.text_bytes / max(self.tokens, 1)

    def starts_and_keys(self) -> np.ndarray:
        """int64 [documents, 2]: the first token of each document in the split, and its key."""
        found, before = [np.zeros((0, 2), np.int64)], 0
        for shard in self.shards:
            found.append(shard.starts_and_keys() + np.array([before, 0]))
            before += shard.tokens
        return np.concatenate(found)


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """One dataset, or a mixture of several: then `splits` holds the shards of all, one dataset after another."""

    path: Path
    data_hash: str
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    document_start: int  # the token that stands before every document; -1: there is none
    splits: dict[str, Split]
    mixture: tuple[tuple[float, "TokenDataset"], ...] = ()  # (weight, dataset)

    def parts(self) -> tuple[tuple[float, "TokenDataset"], ...]:
        return self.mixture or ((1.0, self),)

    def make_tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.restore(self.tokenizer, self.path)


def open_source(config: DataConfig, cache_dir: Path) -> TokenDataset:
    """The token dataset of `data.source`, built into the cache if it is not there yet. Raises `DataError`."""
    if config.source.startswith("mix:"):
        return _mixture(config, cache_dir)
    if config.source.startswith("shards:"):
        found = read(Path(config.source.removeprefix("shards:")))
        _check_tokenizer(found, config.tokenizer)
        return found
    plan = corpus.plan(config.source, config.text_key, config.validation_fraction, config.on_bad_record)
    final = cache_dir / _known_content_hash(plan, config.tokenizer, cache_dir)
    if not (final / build.INDEX).exists():
        _make_writable(cache_dir)
        build.build(plan, config.tokenizer, config.source, final, max_bad_records=config.max_bad_records)
    index = _read_index(final)
    if index["bad_records"] > config.max_bad_records:
        raise DataError(
            f"data.source: expected at most {config.max_bad_records} bad records (data.max_bad_records), found "
            f"{index['bad_records']} in {config.source}"
        )
    not_utf8 = sum(split["not_utf8"] for split in index["splits"].values())
    for number, what in ((index["bad_records"], "bad records were left out"), (not_utf8, "parts were not UTF-8: replaced")):
        if number:
            logging.warning("data.source=%s: %d %s", config.source, number, what)
    return read(final)


def _known_content_hash(plan: corpus.Plan, spec: str, cache_dir: Path) -> str:
    """`content_hash`; of files of the same size and time as before without reading them."""
    memo = cache_dir / "sources" / hashlib.sha256(build.facts_of(plan, spec).encode()).hexdigest()[:32]
    try:
        return memo.read_text()
    except OSError:
        found = content_hash(plan, spec)
    _make_writable(memo.parent)
    files.write(memo, found.encode())
    return found


def _mixture(config: DataConfig, cache_dir: Path) -> TokenDataset:
    parts = []
    for part in config.source.removeprefix("mix:").split(";"):
        weight, star, source = part.partition("*")
        try:
            number = float(weight)
        except ValueError:
            number = -1.0
        if not star or not 0 < number < float("inf"):
            raise DataError(f"data.source: expected mix:WEIGHT*SOURCE;WEIGHT*SOURCE with weights above 0, found {part!r}")
        parts.append((number, open_source(dataclasses.replace(config, source=source), cache_dir)))
    _, first = parts[0]
    for _, other in parts:
        if other.tokenizer_hash != first.tokenizer_hash:
            raise DataError(f"data.source: expected one tokenizer in a mixture, found {first.tokenizer} in {first.path} and "
                            f"{other.tokenizer} in {other.path}; build them with the same file:tokenizer.json")  # fmt: skip
    splits = {
        name: Split(
            tuple(shard for _, part in parts for shard in part.splits[name].shards),
            *(
                sum(getattr(part.splits[name], field) for _, part in parts)
                for field in ("tokens", "documents", "text_bytes")
            ),
        )
        for name in first.splits
    }
    whole = "/".join(f"{weight!r}*{part.data_hash}" for weight, part in parts)
    data_hash = hashlib.sha256(whole.encode()).hexdigest()[:32]
    return dataclasses.replace(first, data_hash=data_hash, splits=splits, mixture=tuple(parts))


def _check_tokenizer(found: TokenDataset, spec: str) -> None:
    kind, value = tokenizer.kind_and_value(spec)
    same = found.tokenizer == spec
    if kind == "file":
        same = tokenizer.fingerprint(tokenizer.make(spec, ())) == found.tokenizer_hash
    if not same:
        raise DataError(
            f"data.tokenizer: expected {found.tokenizer} (of {found.path}), found {spec}; "
            f"--config.data.tokenizer={found.tokenizer}"
        )


def content_hash(plan: corpus.Plan, spec: str) -> str:
    """Of the texts, their names, order and split, and the tokenizer: not of where the files lie or when they changed."""
    kind, _ = tokenizer.kind_and_value(spec)
    name = tokenizer.fingerprint(tokenizer.make(spec, ())) if kind == "file" else spec
    digest = hashlib.sha256(f"{build.FORMAT}/{name}/{build.SHARD_TOKENS}".encode())
    for part in plan.documents():
        if isinstance(part, Part):
            text = part.text if part.tokens is None else part.tokens.tobytes()
            digest.update(f"/{part.split}/{part.name}/{part.begins}/{len(text)}/".encode(errors="surrogateescape"))
            digest.update(text)
    return digest.hexdigest()[:32]


def read(path: Path) -> TokenDataset:
    """Opens a built dataset. Checks that all shards are there, no others, and that none has changed: sizes and types each
    time, SHA-256 and token ids once (a file of the same size and time is not read again)."""
    index = _read_index(path)
    try:
        splits = {
            name: Split(
                tuple(_open_shard(path / s["file"], s, index["dtype"]) for s in split["shards"]),
                *(split[field] for field in ("tokens", "documents", "text_bytes")),
            )
            for name, split in index["splits"].items()
        }
        shards = [shard for split in index["splits"].values() for shard in split["shards"]]
        known = {name for s in shards for name in (s["file"], Path(s["file"]).stem + DOCUMENTS)}
        extra = sorted({p.name for p in path.glob("*.npy")} - known)
        if extra:
            raise DataError(f"data: expected the shards of {path / build.INDEX}, found another: {extra[0]}; move it away")
        _check_index(path, index)
        _verify(path, shards, index["vocab_size"])
        return TokenDataset(
            path, index["data_hash"], index["tokenizer"], index["tokenizer_hash"], index["vocab_size"],
            index["document_start"], splits,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"data: {path / build.INDEX} is damaged ({type(error).__name__}: {error}); build it again"
        ) from error


def _read_index(path: Path) -> dict:
    file = path / build.INDEX
    try:
        index = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(f"data: expected a token dataset ({build.INDEX}) in {path}, found none") from None
    except (OSError, ValueError) as error:
        raise DataError(f"data: cannot read {file}: {error}") from error
    if not isinstance(index, dict) or index.get("format") != build.FORMAT:
        found = index.get("format") if isinstance(index, dict) else index
        raise DataError(f"data: expected format {build.FORMAT} in {file}, found {found!r}; build it again")
    return index


def _check_index(path: Path, index: dict) -> None:
    """What follows from the rest must be so: totals, the data's hash, and the tokenizer beside the shards."""
    made = tokenizer.fingerprint(tokenizer.restore(index["tokenizer"], path))
    if made != index["tokenizer_hash"]:
        raise DataError(
            f"data.tokenizer: expected the tokenizer {index['tokenizer_hash']} that {path} was built with, found {made} "
            f"({tokenizer.FILE} has changed); build the dataset again"
        )
    totals = {name: sum(shard["tokens"] for shard in split["shards"]) for name, split in index["splits"].items()}
    if index["data_hash"] != build.data_hash(index["splits"], index["tokenizer_hash"]) or any(
        split["tokens"] != totals[name] for name, split in index["splits"].items()
    ):
        raise DataError(f"data: {path / build.INDEX} has been edited (its numbers do not fit each other); build it again")


def _open_shard(path: Path, entry: dict, dtype: str) -> Shard:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        size = path.stat().st_size
        documents = np.load(path.with_name(path.stem + DOCUMENTS), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"data: expected the shard {error.filename}, found no such file; build the dataset again") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"data: cannot read shard {path}: {error}; build the dataset again") from error
    if array.ndim != 1 or array.dtype.name != dtype or len(array) != entry["tokens"]:
        raise DataError(
            f"data: expected {entry['tokens']} tokens of {dtype} in {path}, found {array.dtype} {list(array.shape)}"
        )
    if documents.shape != (entry["documents"], 2):
        raise DataError(f"data: expected {entry['documents']} documents in {path}, found {list(documents.shape)}")
    return Shard(path, entry["tokens"], size - array.nbytes, dtype, entry["documents"])


def _verify(path: Path, shards: list[dict], vocab_size: int) -> None:
    """Reads what has not been read in this state before, and remembers it where the folder can be written."""
    expected = {}
    for entry in shards:
        expected[entry["file"]] = entry["sha256"]
        expected[Path(entry["file"]).stem + DOCUMENTS] = entry["documents_sha256"]
    states = {}
    for name, checksum in expected.items():
        stat = (path / name).stat()
        states[name] = [stat.st_size, stat.st_mtime_ns, checksum, vocab_size]
    try:
        verified = json.loads((path / _VERIFIED).read_text())
        new = [name for name, state in states.items() if verified.get(name) != state]
    except (OSError, ValueError, AttributeError):
        new = list(states)
    if not new:
        return
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing runs outside of Python's lock
        for name, checksum in zip(new, pool.map(lambda name: _checksum(path / name, vocab_size), new), strict=True):
            if checksum != expected[name]:
                raise DataError(
                    f"data: expected the SHA-256 {expected[name][:12]}... of {path / name}, found {checksum[:12]}...: the "
                    "file has changed since it was built; build the dataset again"
                )
    try:
        files.write(path / _VERIFIED, json.dumps(states).encode())
    except OSError:
        return  # a folder of somebody else's: read again the next time


def _checksum(path: Path, vocab_size: int) -> str:
    largest = -1
    array = None if path.name.endswith(DOCUMENTS) else np.load(path, mmap_mode="r")
    for start in range(0, 0 if array is None else len(array), 1 << 21):
        largest = max(largest, int(array[start : start + (1 << 21)].max()))
    if largest >= vocab_size:
        raise DataError(f"data: expected token ids below its vocabulary of {vocab_size}, found {largest} in {path}")
    return files.sha256(path)


def _make_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise DataError(
            f"data: cannot create the cache {cache_dir}: {error.strerror}; set TFDIST_CACHE or data.cache_dir"
        ) from error
