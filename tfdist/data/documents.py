"""The documents of a piece, in order and in bounded memory: UTF-8 text, in parts where it is long, or tokens."""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import numpy as np

from tfdist.data import tfds_source, token_files
from tfdist.data.pieces import TRAIN, VALIDATION, Piece, Span
from tfdist.errors import DataError, one_line

if TYPE_CHECKING:
    from tfdist.data.corpus import Plan

CHUNK_BYTES = 1 << 20  # longer documents come in parts
_TOO_LONG = "expected a line of at most {} MB (data.max_record_mb), found a longer one"


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


def name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def key_of(name: str) -> int:
    """A document's key, 63 bits: the same wherever and in whatever company it is read."""
    return int.from_bytes(name_hash(name)[:8], "big") >> 1


def _read_text(found: "Plan", piece: Piece) -> Iterator[Part]:
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


def _parts(found: "Plan", span: Span, start: int, end: int | None, split: str, begins_at: int = 0) -> Iterator[Part]:
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
    decoded, replaced = _decoded(text)
    return (decoded.encode() if replaced else text), replaced


def _decoded(text: bytes) -> tuple[str, bool]:
    try:
        return text.decode(), False
    except UnicodeDecodeError:
        return text.decode(errors="replace"), True


def _unpacked_size(path: str) -> int:
    if not path.endswith(".gz"):
        return os.stat(path).st_size
    with _opened(path) as file:
        return sum(map(len, iter(lambda: file.read(CHUNK_BYTES), b"")))


def _character_at(path: str, place: int) -> int:
    """`place`, or the next one where a character begins."""
    with _opened(path) as file:
        file.seek(place)
        return place + next((i for i, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)


def _read_json_lines(found: "Plan", piece: Piece) -> Iterator[Part | BadRecord]:
    for span in piece.spans:
        with _opened(span.path) as file:
            place = file.seek(span.start)
            is_gzip = span.path.endswith(".gz")
            while (is_gzip or place < span.end) and (line := file.readline(found.max_record_bytes + 1)):
                where, place = place, place + len(line)
                if len(line) > found.max_record_bytes and not line.endswith(b"\n"):
                    place += _rest_of_line(file)
                    yield _bad(found, f"{span.path} at byte {where}", _TOO_LONG.format(found.max_record_bytes >> 20))
                elif line.strip():
                    yield from _record(found, f"{span.name}@{where}", line, f"{span.path} at byte {where}")


def _rest_of_line(file: IO[bytes]) -> int:
    """Passes over it; its bytes."""
    passed = 0
    while part := file.readline(CHUNK_BYTES):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _record(found: "Plan", name: str, line: bytes, where: str) -> Iterator[Part | BadRecord]:
    whole, replaced = _decoded(line)
    try:
        record = json.loads(whole)
        text = record[found.text_key] if isinstance(record, dict) else None
        problem = "" if isinstance(text, str) else f"expected an object with text at {found.text_key!r}"
    except KeyError:
        problem = f"expected the key {found.text_key!r}, found {one_line(', '.join(list(record)[:8]), 100)}"
    except (ValueError, RecursionError) as error:
        problem = f"expected a JSON object, {one_line(error, 100)}"
    if problem:
        yield _bad(found, where, problem)
        return
    characters = re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of pairs, which JSON can name
    yield from _document(found, name, characters.encode(), replaced or characters != text)


def _bad(found: "Plan", where: str, problem: str) -> BadRecord:
    if found.skip_bad_records:
        return BadRecord(f"{where}: {problem}")
    raise DataError(f"data.source: bad record in {where}: {problem}; data.on_bad_record=skip leaves such records out")


def _read_tfds(found: "Plan", piece: Piece) -> Iterator[Part]:
    for span in piece.spans:
        examples = tfds_source.read(span.path, span.name, found.text_key, span.start, span.end)
        for i, text in enumerate(examples, span.start):
            yield from _document(found, f"{span.name}/{i}", *_utf8(text), piece.split)


def _document(found: "Plan", name: str, text: bytes, replaced: bool, split: str = "") -> Iterator[Part]:
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


def _read_tokens(found: "Plan", piece: Piece) -> Iterator[Part]:
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


READ = {
    "stdlib": _read_text, "files": _read_text, "jsonl": _read_json_lines, "tfds": _read_tfds, "bin": _read_tokens,
}  # fmt: skip
