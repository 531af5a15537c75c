"""Tokenised text on disk: `.npy` shards and a `dataset.json`, opened and checked, or built into a cache first.

The cache is addressed by content: a hash of everything that determines the tokens.
"""

import contextlib
import dataclasses
import hashlib
import re
import tempfile
from pathlib import Path

import numpy as np
from absl import logging

from tfdist import files
from tfdist.config import DataConfig
from tfdist.data import build, corpus, npy, tokenizer, verified
from tfdist.data.documents import Part
from tfdist.data.index import FORMAT, INDEX, data_hash, documents_of
from tfdist.data.index import read as read_index
from tfdist.errors import DataError, one_line


@dataclasses.dataclass(frozen=True)
class Shard:
    path: Path
    tokens: int
    header_bytes: int
    dtype: str
    documents: int  # how many begin in it

    def starts_and_keys(self) -> np.ndarray:
        """int64 [documents, 2]: the first token of each document that begins here, and its key."""
        return npy.read(self.path.with_name(documents_of(self.path.name)), "int64", (self.documents, 2))

    def read(self) -> np.ndarray:
        """Its tokens, mapped from the file."""
        return npy.read(self.path, self.dtype, (self.tokens,))


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
    plan = corpus.plan(
        config.source, config.text_key, config.validation_fraction, config.on_bad_record, config.max_record_mb
    )
    final = cache_dir / _known_content_hash(plan, config.tokenizer, cache_dir)
    if not (final / INDEX).exists():
        _make_writable(cache_dir)
        build.build(plan, config.tokenizer, config.source, final, max_bad_records=config.max_bad_records)
    index = read_index(final)
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
    sources, name = cache_dir / "sources", hashlib.sha256(build.facts_of(plan, spec).encode()).hexdigest()[:32]
    try:
        known = files.read_inside(sources, name, 32).decode()
    except (OSError, ValueError):
        known = ""
    if not re.fullmatch("[0-9a-f]{32}", known):  # there is none, or it is damaged
        known = content_hash(plan, spec)
        _make_writable(sources)
        with contextlib.suppress(OSError):  # it only saves time
            files.write(sources / name, known.encode())
    return known


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
        name = one_line(found.tokenizer, 100)
        raise DataError(f"data.tokenizer: expected {name} (of {found.path}), found {spec}; --config.data.tokenizer={name}")


def content_hash(plan: corpus.Plan, spec: str) -> str:
    """Of the texts, their names, order and split, and the tokenizer: not of where the files lie or when they changed."""
    kind, _ = tokenizer.kind_and_value(spec)
    name = tokenizer.fingerprint(tokenizer.make(spec, ())) if kind == "file" else spec
    digest = hashlib.sha256(f"{FORMAT}/{name}/{build.SHARD_TOKENS}".encode())
    for part in plan.documents():
        if isinstance(part, Part):
            text = part.text if part.tokens is None else part.tokens.tobytes()
            digest.update(f"/{part.split}/{part.name}/{part.begins}/{len(text)}/".encode(errors="surrogateescape"))
            digest.update(text)
    return digest.hexdigest()[:32]


def read(path: Path) -> TokenDataset:
    """Opens a built dataset. Checks that all shards are there, no others, and that none has changed: sizes and types each
    time, SHA-256 and token ids once (a file of the same size and time is not read again)."""
    index = read_index(path)
    splits = {
        name: Split(
            tuple(_open_shard(path / s["file"], s, index["dtype"]) for s in split["shards"]),
            *(split[field] for field in ("tokens", "documents", "text_bytes")),
        )
        for name, split in index["splits"].items()
    }
    shards = [shard for split in index["splits"].values() for shard in split["shards"]]
    known = {name for s in shards for name in (s["file"], documents_of(s["file"]))}
    extra = sorted({p.name for p in path.glob("*.npy")} - known)
    if extra:
        other = one_line(extra[0], 60)
        raise DataError(f"data: expected the shards of {path / INDEX}, found another: {other}; move it away")
    _check_tokenizer_and_hash(path, index)
    verified.check(path, shards, index["dtype"], index["vocab_size"])
    return TokenDataset(
        path, index["data_hash"], index["tokenizer"], index["tokenizer_hash"], index["vocab_size"],
        index["document_start"], splits,
    )  # fmt: skip


def _check_tokenizer_and_hash(path: Path, index: dict) -> None:
    """What follows from the rest must be so: the data's hash, and the tokenizer beside the shards."""
    made = tokenizer.restore(index["tokenizer"], path)
    found = tokenizer.fingerprint(made)
    if found != index["tokenizer_hash"]:
        raise DataError(
            f"data.tokenizer: expected the tokenizer {one_line(index['tokenizer_hash'], 40)} that {path} was built with, "
            f"found {found} ({tokenizer.FILE} has changed); build the dataset again"
        )
    numbers = made.vocab_size, made.document_start, data_hash(index["splits"], index["tokenizer_hash"])
    if numbers != (index["vocab_size"], index["document_start"], index["data_hash"]):
        raise DataError(f"data: {path / INDEX} has been edited (its numbers do not fit each other); build it again")


def _open_shard(path: Path, entry: dict, dtype: str) -> Shard:
    shard = Shard(path, entry["tokens"], npy.HEADER_BYTES, dtype, entry["documents"])
    shard.read()
    shard.starts_and_keys()
    return shard


def _make_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise DataError(
            f"data: cannot create the cache {cache_dir}: {error.strerror}; set TFDIST_CACHE or data.cache_dir"
        ) from error
