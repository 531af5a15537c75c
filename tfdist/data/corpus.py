"""Where text comes from: a plan of pieces, and which documents are validation text, by their names alone, whoever reads
them."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from tfdist.cluster.link import supervisor
from tfdist.data import documents, pieces
from tfdist.data.documents import BadRecord, Part, name_hash
from tfdist.data.pieces import TRAIN, VALIDATION, Piece
from tfdist.errors import DataError

_FEW_DOCUMENTS = 20  # below this a split by document would be too coarse: each gives its tail
_SURE_OF_ONE = 20  # so many validation documents expected: no need to count, the share of each hash decides
TEXTS = "stdlib, files:GLOB, jsonl:GLOB#KEY, tfds:NAME or bin:GLOB"
_KINDS = f"{TEXTS}, shards:DIR or mix:WEIGHT*SOURCE;WEIGHT*SOURCE"


@dataclasses.dataclass(frozen=True)
class Splitter:
    """Which documents are validation text. Exactly `names` of them, or the tail of each, or a share of all hashes."""

    fraction: float
    names: frozenset[str] | None = None
    tails: bool = False

    def of(self, name: str) -> str:
        if self.names is not None:
            return VALIDATION if name in self.names else TRAIN
        return VALIDATION if name_hash(name)[:8] < (int(self.fraction * 2**64)).to_bytes(8, "big") else TRAIN

    def cut(self, size: int) -> int:
        """Of a document of that many bytes, the first one of its tail."""
        return size - math.floor(self.fraction * size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides what is read, and in which order: equal plans of equal files give equal documents."""

    kind: str
    pieces: tuple[Piece, ...]
    splitter: Splitter
    text_key: str = ""
    skip_bad_records: bool = False
    chunk_bytes: int = 0  # longer documents are read, and encoded, in parts that end at a line
    max_record_bytes: int = 0  # a longer line of JSON is a bad record

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def read(self, piece: Piece) -> Iterator[Part | BadRecord]:
        """The documents of one piece, in order."""
        try:
            yield from documents.READ[self.kind](self, piece)
        except OSError as error:
            raise DataError(f"data.source: cannot read {error.filename}: {error.strerror}") from error

    def documents(self) -> Iterator[Part | BadRecord]:
        """All of them, in order."""
        for piece in self.pieces:
            for part in self.read(piece):
                supervisor().tick()
                yield part


def plan(
    source: str, text_key: str, validation_fraction: float, on_bad_record: str = "refuse", max_record_mb: int = 64
) -> Plan:  # fmt: skip
    """How a source is read. Raises `DataError` for one that is missing, empty or not text.

    `stdlib`: the source code of the running Python's standard library. `files:GLOB[,GLOB...]`: text files, a document each.
    `jsonl:GLOB#KEY`: a JSON object with the text at KEY on each line. Both also gzipped (`.gz`). `tfds:NAME`: a TensorFlow
    dataset, with its own validation (else test) split where it has one. `bin:GLOB`: token files of nanoGPT or llm.c; those
    with "val" in their names are validation. Otherwise documents are split by a hash of their name; fewer than 20 documents
    each give their last part to validation.
    """
    kind, _, rest = source.partition(":")
    if kind not in pieces.CUT or bool(rest) == (kind == "stdlib"):
        raise DataError(f"data.source: expected {_KINDS}, found {source!r}")
    if kind == "jsonl":
        rest, _, key = rest.rpartition("#") if "#" in rest else (rest, "", "")
        text_key = key or text_key
    try:
        cut = pieces.CUT[kind](rest, text_key)
    except OSError as error:
        raise DataError(f"data.source: cannot read {error.filename}: {error.strerror}") from error
    found = Plan(
        kind, cut, Splitter(validation_fraction), text_key, on_bad_record == "skip", documents.CHUNK_BYTES,
        max_record_mb << 20,
    )  # fmt: skip
    if not cut:
        raise DataError(f"data.source: expected text, found an empty source: {source}")
    if any(piece.split for piece in cut):
        return found
    return dataclasses.replace(found, splitter=_splitter(found))


def _splitter(found: Plan) -> Splitter:
    """Reads as many documents as it takes to know that there are enough."""
    fraction = found.splitter.fraction
    if found.kind == "bin":  # a stream without documents
        return Splitter(fraction, tails=True)
    if found.kind in ("files", "stdlib"):
        names = dict.fromkeys(span.name for piece in found.pieces for span in piece.spans)
    else:
        parts = (part.name for part in found.documents() if isinstance(part, Part) and part.begins)
        names = dict.fromkeys(itertools.islice(parts, math.ceil(_SURE_OF_ONE / fraction)))
    if len(names) < _FEW_DOCUMENTS:
        return Splitter(fraction, tails=True)
    if len(names) >= _SURE_OF_ONE / fraction:
        return Splitter(fraction)
    by_hash = sorted(names, key=name_hash)
    return Splitter(fraction, frozenset(by_hash[: math.ceil(fraction * len(names))]))
