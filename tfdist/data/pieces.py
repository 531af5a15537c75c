"""How a source is cut into pieces that processes read independently: groups of small files, parts of large ones. It depends
on the files alone."""

import dataclasses
import itertools
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

from tfdist.cluster.link import supervisor
from tfdist.data import globs, tfds_source, token_files
from tfdist.errors import DataError

TRAIN, VALIDATION = "train", "validation"
_PIECE_BYTES, _MOST_PIECES = 1 << 24, 128  # pieces of 16 MiB, larger ones where there would be more than this
_LINE_BYTES = 1 << 20  # a longer line is cut between two characters
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


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
    found, empty = globs.files_of(patterns.split(","))
    if empty:
        raise DataError(f"data.source: expected files at {empty[0]!r}, found none; the path is relative to {Path.cwd()}")
    return sorted(map(Path, found))


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
            if places and place <= places[-1]:  # a long line goes on
                continue
            file.seek(place - 1)  # a line that ends right there is whole
            while (part := file.readline(_LINE_BYTES)) and not part.endswith(b"\n"):
                supervisor().tick()
            places.append(file.tell())
    return sorted(set(places))


def _cut_anywhere(span: Span, target: int) -> list[int]:
    """The same for text, which may have no lines: then between two characters."""
    places = []
    with open(span.path, "rb") as file:
        for place in range(target, span.end, target):
            file.seek(place)
            places.append(place + _first_cut(file.read(_LINE_BYTES)))
    return places


def _first_cut(text: bytes) -> int:
    """After the first line's end, else before the first byte that begins a character."""
    line = text.find(b"\n")
    if line >= 0:
        return line + 1
    return next((i for i in range(min(4, len(text))) if text[i] & 0xC0 != 0x80), 0)


CUT = {"stdlib": _library, "files": _text_files, "jsonl": _json_lines, "tfds": _tfds, "bin": _token_files}
