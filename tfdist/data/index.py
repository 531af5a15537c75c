"""`dataset.json`: what a tokenised dataset is. It has a checksum of its own; what is read from it has the types, and the
numbers fit each other, that the rest of the package relies on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tfdist import files
from tfdist.data.pieces import TRAIN, VALIDATION
from tfdist.data.tokenizer import token_dtype
from tfdist.errors import DataError, one_line

FORMAT = 3
INDEX = "dataset.json"
DOCUMENTS = ".documents.npy"  # beside each shard: int64 [documents, 2], where each begins in the shard, and its key
TOTALS = ("tokens", "documents", "text_bytes", "not_utf8")  # of a shard, and summed over those of a split
_HASHED_AS = 2  # the format that data hashes name: tokens are what they were
_TEXTS = ("data_hash", "source", "command", "tokenizer", "tokenizer_hash")


def write(folder: Path, content: dict[str, Any]) -> None:
    """Adds the format and the checksum."""
    index = files.sealed({"format": FORMAT, **content})
    files.write(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """The index of the dataset in a folder. Raises `DataError`."""
    file = path / INDEX
    try:
        index = files.read_json(path, INDEX)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            found = index.get("format") if isinstance(index, dict) else index
            raise DataError(f"data: expected format {FORMAT} in {file}, found {one_line(repr(found), 60)}; build it again")
        if not files.is_sealed(index):
            raise DataError(f"data: {file} has been edited (it does not match its own SHA-256); build it again")
        _check(index)
    except FileNotFoundError:
        raise DataError(f"data: expected a token dataset ({INDEX}) in {path}, found none") from None
    except OSError as error:
        raise DataError(f"data: cannot read {file}: {error.strerror}") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {file} is damaged ({one_line(error, 200)}); build it again") from error
    return index


def data_hash(splits: dict, of_tokenizer: str) -> str:
    """Of the tokens, where documents begin, their keys, and the tokenizer: not of names and places of files."""
    digest = hashlib.sha256(f"{_HASHED_AS}/{of_tokenizer}".encode())
    for split, content in splits.items():
        digest.update(f"/{split}".encode())
        for shard in content["shards"]:
            digest.update(f"/{shard['sha256']}/{shard['documents_sha256']}".encode())
    return digest.hexdigest()[:32]


def documents_of(file: str) -> str:
    """The name of the file of a shard's documents."""
    return Path(file).stem + DOCUMENTS


# ---- what is in it ----


def _check(index: dict[str, Any]) -> None:
    """Raises `ValueError`."""
    for name in _TEXTS:
        _expect(isinstance(index.get(name), str), name, index.get(name), "text")
    vocab_size, start = index.get("vocab_size"), index.get("document_start")
    _expect(files.is_count(vocab_size) and 0 < vocab_size <= 1 << 32, "vocab_size", vocab_size, "a number")
    _expect(start == -1 or (files.is_count(start) and start < vocab_size), "document_start", start, "a token")
    dtype = np.dtype(token_dtype(vocab_size)).name
    _expect(index.get("dtype") == dtype, "dtype", index.get("dtype"), dtype)
    _expect(files.is_count(index.get("bad_records")), "bad_records", index.get("bad_records"), "a number")
    splits = index.get("splits")
    _expect(isinstance(splits, dict) and set(splits) == {TRAIN, VALIDATION}, "splits", splits, "train and validation")
    names = [name for split in splits.values() for name in _check_split(split)]
    _expect(len(set(names)) == len(names), "a shard", names, "files of its own")


def _check_split(split: Any) -> list[str]:
    """The names of its files."""
    _expect(isinstance(split, dict) and isinstance(split.get("shards"), list), "a split", split, "shards")
    for shard in split["shards"]:
        _expect(isinstance(shard, dict), "a shard", shard, "an object")
        name = shard.get("file")
        is_name = files.is_plain_name(name) and name.endswith(".npy") and not name.endswith(DOCUMENTS)
        _expect(is_name, "a shard's file", name, "the name of a .npy file")
        for key in ("sha256", "documents_sha256"):
            _expect(files.is_digest(shard.get(key)), key, shard.get(key), "a SHA-256")
        for key in TOTALS:
            _expect(files.is_count(shard.get(key)), key, shard.get(key), "a number")
        _expect(shard["tokens"] > 0, "tokens", 0, "more than 0")
    for key in TOTALS:
        total = sum(shard[key] for shard in split["shards"])
        _expect(files.is_count(split.get(key)) and split[key] == total, key, split.get(key), f"{total}, its shards'")
    return [name for shard in split["shards"] for name in (shard["file"], documents_of(shard["file"]))]


def _expect(is_so: bool, what: str, found: Any, expected: str) -> None:
    if not is_so:
        raise ValueError(f"{what}: expected {expected}, found {one_line(repr(found), 60)}")
