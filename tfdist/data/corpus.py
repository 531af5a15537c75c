"""Where text comes from: a plan of pieces that processes read independently, in bounded memory, to the same documents.

A piece is a group of small files, or a part of a large one; how a source is cut depends on its files alone. Each document
is training or validation text by its name, whoever reads it.
"""

import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tfdist.cluster.link import supervisor
from tfdist.data import tfds_source, token_files
from tfdist.errors import DataError

TRAIN, VALIDATION = "train", "validation"
_FEW_DOCUMENTS = 20  # below this a split by document would be too coarse: each gives its tail
_SURE_OF_ONE = 20  # so many validation documents expected: no need to count, the share of each hash decides
_PIECE_BYTES, _MOST_PIECES = 1 << 24, 128  # pieces of 16 MiB, larger ones where there would be more than this
_CHUNK_BYTES = 1 << 20
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
TEXTS = "stdlib, files:GLOB, jsonl:GLOB#KEY, tfds:NAME or bin:GLOB"
_KINDS = f"{TEXTS}, shards:DIR or mix:WEIGHT*SOURCE;WEIGHT*SOURCE"


@dataclasses.dataclass(frozen=True)
class Part:
    """A document, or a part of a long one; consecutive parts of a document follow each other."""

    name: str
    split: str  # TRAIN or VALIDATION
    begins: bool  # whether this is the document's first part
    text: bytes = b""  # UTF-8
    replaced: bool = False  # what was no UTF-8 has become U+FFFD
    tokens: np.ndarray | None = None  # of a source that is tokenised already; without `text`


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that is none, where skipping them is allowed."""

    what: str


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file (of what a .gz unpacks to), or examples [start, end) of a dataset."""

    path: str
    name: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Piece:
    spans: tuple[Span, ...]
    split: str = ""  # of all its documents; "": by their names

    @property
    def size(self) -> int:
        return sum(span.end - span.start for span in self.spans)


@dataclasses.dataclass(frozen=True)
class Splitter:
    """Which documents are validation text. Exactly `names` of them, or the tail of each, or a share of all hashes."""

    fraction: float
    names: frozenset[str] | None = None
    tails: bool = False

    def of(self, name: str) -> str:
        if self.names is not None:
            return VALIDATION if name in self.names else TRAIN
        return VALIDATION if _hash(name)[:8] < (int(self.fraction * 2**64)).to_bytes(8, "big") else TRAIN

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

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def read(self, piece: Piece) -> Iterator[Part | BadRecord]:
        """The documents of one piece, in order."""
        try:
            yield from _READERS[self.kind](self, piece)
        except OSError as error:
            raise DataError(f"data.source: cannot read {error.filename}: {error.strerror}") from error

    def documents(self) -> Iterator[Part | BadRecord]:
        """All of them, in order."""
        for piece in self.pieces:
            for part in self.read(piece):
                supervisor().tick()
                yield part


def plan(source: str, text_key: str, validation_fraction: float, on_bad_record: str = "refuse") -> Plan:
    """How a source is read. Raises `DataError` for one that is missing, empty or not text.

    `stdlib`: the source code of the running Python's standard library. `files:GLOB[,GLOB...]`: text files, a document each.
    `jsonl:GLOB#KEY`: a JSON object with the text at KEY on each line. Both also gzipped (`.gz`). `tfds:NAME`: a TensorFlow
    dataset, with its own validation (else test) split where it has one. `bin:GLOB`: token files of nanoGPT or llm.c; those
    with "val" in their names are validation. Otherwise documents are split by a hash of their name; fewer than 20 documents
    each give their last part to validation.
    """
    kind, _, rest = source.partition(":")
    if kind not in _PLANNERS or bool(rest) == (kind == "stdlib"):
        raise DataError(f"data.source: expected {_KINDS}, found {source!r}")
    if kind == "jsonl":
        rest, hash_sign, key = rest.rpartition("#") if "#" in rest else (rest, "", "")
        text_key = key or text_key
    try:
        pieces = _PLANNERS[kind](rest, text_key)
    except OSError as error:
        raise DataError(f"data.source: cannot read {error.filename}: {error.strerror}") from error
    found = Plan(kind, pieces, Splitter(validation_fraction), text_key, on_bad_record == "skip", _CHUNK_BYTES)
    if not pieces:
        raise DataError(f"data.source: expected text, found an empty source: {source}")
    if any(piece.split for piece in pieces):
        return found
    return dataclasses.replace(found, splitter=_splitter(found))


# ---- plans ----


def _library(_, __) -> tuple[Piece, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not _NOT_LIBRARY.intersection(p.relative_to(root).parts))
    text = [path for path in paths if b"\0" not in path.read_bytes()]
    return _pieces(_whole(text), _cut_anywhere)


def _text_files(patterns: str, _) -> tuple[Piece, ...]:
    return _pieces(_whole(_matching_files(patterns)), _cut_anywhere)


def _json_lines(patterns: str, _) -> tuple[Piece, ...]:
    return _pieces(_whole(_matching_files(patterns)), _cut_at_line)


def _tfds(name: str, text_key: str) -> tuple[Piece, ...]:
    folder, sizes = tfds_source.prepare(name, text_key)
    pieces = []
    for split, tfds_split in zip((TRAIN, VALIDATION), sizes, strict=False):
        number = sizes[tfds_split]
        step = max(10_000, -(-number // _MOST_PIECES))
        given = split if len(sizes) > 1 else ""
        pieces += [Piece((Span(str(folder), tfds_split, i, min(i + step, number)),), given) for i in range(0, number, step)]
    return tuple(pieces)


def _token_files(patterns: str, _) -> tuple[Piece, ...]:
    spans = _whole(_matching_files(patterns))
    held_out = [span for span in spans if "val" in Path(span.path).name]
    pieces = []
    for span in spans:
        split = "" if not held_out or len(held_out) == len(spans) else VALIDATION if span in held_out else TRAIN
        tokens = token_files.header(span.path)
        step = max(_PIECE_BYTES, -(-tokens.number // _MOST_PIECES))
        starts = range(0, tokens.number, step)
        parts = [dataclasses.replace(span, start=i, end=min(i + step, tokens.number)) for i in starts]
        pieces += [Piece((part,), split) for part in parts]
    return tuple(pieces)


def _matching_files(patterns: str) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns.split(","):
        matches = {Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
        if not matches:
            raise DataError(f"data.source: expected files at {pattern!r}, found none; the path is relative to {Path.cwd()}")
        found |= matches
    return sorted(found)


def _whole(paths: list[Path]) -> list[Span]:
    """Names are relative to the deepest common folder, so a corpus can move. Empty files are no documents."""
    root = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    spans = []
    for path in paths:
        size = path.stat().st_size
        if size:
            spans.append(Span(str(path), path.absolute().relative_to(root).as_posix(), 0, size))
    return spans


def _pieces(spans: list[Span], cut: Callable[[Span, int], list[int]]) -> tuple[Piece, ...]:
    """Groups of small files, parts of large ones. A gzipped file can only be read from its beginning."""
    target = max(_PIECE_BYTES, -(-sum(span.end for span in spans) // _MOST_PIECES))
    pieces, group, size = [], [], 0
    for span in spans:
        if span.end > 2 * target and not span.path.endswith(".gz"):
            places = [0, *cut(span, target), span.end]
            parts = [dataclasses.replace(span, start=a, end=b) for a, b in itertools.pairwise(places) if b > a]
        else:
            parts = [span]
        for part in parts:
            group.append(part)
            size += part.end - part.start
            if size >= target:
                pieces.append(Piece(tuple(group)))
                group, size = [], 0
    return (*pieces, *([Piece(tuple(group))] if group else []))


def _cut_at_line(span: Span, target: int) -> list[int]:
    """The ends of lines next to multiples of `target`."""
    places = []
    with open(span.path, "rb") as file:
        for place in range(target, span.end, target):
            file.seek(place - 1)  # a line that ends right there is whole
            file.readline()
            places.append(file.tell())
    return sorted(set(places))


def _cut_anywhere(span: Span, target: int) -> list[int]:
    """The same for text, which may have no lines: then between two characters."""
    places = []
    with open(span.path, "rb") as file:
        for place in range(target, span.end, target):
            file.seek(place)
            places.append(place + _first_cut(file.read(_CHUNK_BYTES)))
    return places


def _first_cut(text: bytes) -> int:
    """After the first line's end, else before the first byte that begins a character."""
    line = text.find(b"\n")
    if line >= 0:
        return line + 1
    return next((i for i in range(min(4, len(text))) if text[i] & 0xC0 != 0x80), 0)


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
    by_hash = sorted(names, key=_hash)
    return Splitter(fraction, frozenset(by_hash[: math.ceil(fraction * len(names))]))


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def key_of(name: str) -> int:
    """A document's key, 63 bits: the same wherever and in whatever company it is read."""
    return int.from_bytes(_hash(name)[:8], "big") >> 1


# ---- readers ----


def _read_text(found: Plan, piece: Piece) -> Iterator[Part]:
    for span in piece.spans:
        is_gzip = span.path.endswith(".gz")
        if not found.splitter.tails:
            yield from _parts(found, span, span.start, None if is_gzip else span.end, found.splitter.of(span.name))
            continue
        size = _unpacked_size(span.path)
        cut = _character_at(span.path, found.splitter.cut(size))
        end = size if is_gzip else span.end
        yield from _parts(found, span, span.start, min(end, cut), TRAIN)
        yield from _parts(found, span, max(span.start, cut), end, VALIDATION, begins_at=cut)


def _parts(found: Plan, span: Span, start: int, end: int | None, split: str, begins_at: int = 0) -> Iterator[Part]:
    """Bytes [start, end) of a text file, in parts; `end` None: all that follows."""
    with _opened(span.path) as file:
        file.seek(start)
        place, rest, at_end = start, b"", False
        while not at_end:
            left = found.chunk_bytes if end is None else max(0, min(found.chunk_bytes, end - place - len(rest)))
            text = rest + file.read(left)
            at_end = len(text) < len(rest) + left or (end is not None and place + len(text) >= end)
            cut = len(text) if at_end else _last_cut(text)
            text, rest = text[:cut], text[cut:]
            if b"\0" in text:
                raise DataError(f"data.source: expected text, found a binary file (it holds NUL bytes): {span.path}")
            if text:
                yield Part(span.name, split, place == begins_at, *_utf8(text))
            place += cut


def _last_cut(text: bytes) -> int:
    """After the last line's end, else before a last character that may not be whole."""
    line = text.rfind(b"\n")
    if line >= 0:
        return line + 1
    return next((i for i in range(len(text) - 1, max(len(text) - 4, 0), -1) if text[i] & 0xC0 != 0x80), len(text))


def _utf8(text: bytes) -> tuple[bytes, bool]:
    """Valid UTF-8, and whether something had to be replaced."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode(errors="replace").encode(), True
    return text, False


def _unpacked_size(path: str) -> int:
    if not path.endswith(".gz"):
        return os.stat(path).st_size
    with _opened(path) as file:
        return sum(map(len, iter(lambda: file.read(_CHUNK_BYTES), b"")))


def _character_at(path: str, place: int) -> int:
    """`place`, or the next one where a character begins."""
    with _opened(path) as file:
        file.seek(place)
        return place + next((i for i, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)


def _read_json_lines(found: Plan, piece: Piece) -> Iterator[Part | BadRecord]:
    for span in piece.spans:
        with _opened(span.path) as file:
            place = file.seek(span.start)
            is_gzip = span.path.endswith(".gz")
            while (is_gzip or place < span.end) and (line := file.readline()):
                where, place = place, place + len(line)
                if line.strip():
                    yield from _record(found, f"{span.name}@{where}", line, f"{span.path} at byte {where}")


def _record(found: Plan, name: str, line: bytes, where: str) -> Iterator[Part | BadRecord]:
    whole = line.decode(errors="replace")
    try:
        record = json.loads(whole)
        text = record[found.text_key] if isinstance(record, dict) else None
        problem = "" if isinstance(text, str) else f"expected an object with text at {found.text_key!r}"
    except KeyError:
        problem = f"expected the key {found.text_key!r}, found {', '.join(list(record)[:8])}"
    except (ValueError, RecursionError) as error:
        problem = f"expected a JSON object, {error}"
    if not problem:
        characters = re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of pairs, which JSON can name
        yield from _document(found, name, characters.encode(), characters != text or len(whole.encode()) != len(line))
    elif found.skip_bad_records:
        yield BadRecord(f"{where}: {problem}")
    else:
        raise DataError(f"data.source: bad record in {where}: {problem}; data.on_bad_record=skip leaves such records out")


def _read_tfds(found: Plan, piece: Piece) -> Iterator[Part]:
    for span in piece.spans:
        examples = tfds_source.read(span.path, span.name, found.text_key, span.start, span.end)
        for i, text in enumerate(examples, span.start):
            yield from _document(found, f"{span.name}/{i}", *_utf8(text), piece.split)


def _document(found: Plan, name: str, text: bytes, replaced: bool, split: str = "") -> Iterator[Part]:
    """Of a whole document in memory: its parts, its tail apart where the splitter says so."""
    ranges = [(0, len(text), split or ("" if found.splitter.tails else found.splitter.of(name)))]
    if not ranges[0][2]:
        cut = found.splitter.cut(len(text))
        while cut < len(text) and text[cut] & 0xC0 == 0x80:
            cut += 1
        ranges = [(0, cut, TRAIN), (cut, len(text), VALIDATION)]
    for first, end, split in ranges:
        start = first
        while start < end:
            chunk = text[start : min(start + found.chunk_bytes, end)]
            cut = len(chunk) if start + len(chunk) == end else _last_cut(chunk)
            yield Part(name, split, start == first, chunk[:cut], replaced and start == first)
            start += cut


def _read_tokens(found: Plan, piece: Piece) -> Iterator[Part]:
    for span in piece.spans:
        tokens = token_files.header(span.path)
        cut = found.splitter.cut(tokens.number) if not piece.split else tokens.number
        for start in range(span.start, span.end, found.chunk_bytes):
            end = min(start + found.chunk_bytes, span.end)
            numbers = tokens.read(start, end)
            head = max(min(cut, end) - start, 0)
            if head:
                yield Part(span.name, piece.split or TRAIN, start == 0, tokens=numbers[:head])
            if head < end - start:
                yield Part(span.name, VALIDATION, start + head == cut, tokens=numbers[head:])


class _opened:  # noqa: N801 - reads like `open`
    """A file, unpacked if it is gzipped; what goes wrong while reading it is a `DataError` with its name."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self):
        try:
            self.file = gzip.open(self.path, "rb") if self.path.endswith(".gz") else open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"data.source: cannot read {self.path}: {error.strerror}") from error
        return self.file

    def __exit__(self, kind, error, _):
        self.file.close()
        if isinstance(error, (OSError, EOFError, zlib.error)):
            raise DataError(f"data.source: cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from error


_PLANNERS = {"stdlib": _library, "files": _text_files, "jsonl": _json_lines, "tfds": _tfds, "bin": _token_files}
_READERS = {
    "stdlib": _read_text, "files": _read_text, "jsonl": _read_json_lines, "tfds": _read_tfds, "bin": _read_tokens,
}  # fmt: skip
