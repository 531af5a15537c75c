"""`manifest.json` of a checkpoint: what is read from it has the types, and says the things, that the rest relies on.

An array is a list of slices (offset, shape, file, byte_offset), which cover it exactly once; each byte of a file is one
slice's. So what an array takes of memory is on the disk too.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy
import numpy as np

from tfdist import files
from tfdist.errors import one_line

FORMAT = 1
NAME = "manifest.json"
_MOST_DIMENSIONS = 32
_MOST_CELLS = 1 << 16  # of the grid that the borders of an array's slices make

_OTHER_TYPES = (kind for kind in vars(ml_dtypes).values() if isinstance(kind, type) and issubclass(kind, np.generic))
# numbers and truth values: everything else (objects, texts, dates, records) is no value of a model
DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in (*"?bBhHiIqQefdFD", *_OTHER_TYPES)}


def read(folder: Path) -> dict[str, Any]:
    """Raises `OSError`, or `ValueError` with what is wrong."""
    try:
        manifest = files.read_json(folder, NAME)
    except ValueError as error:
        raise ValueError(f"not a manifest ({error})") from error
    if not isinstance(manifest, dict):
        raise ValueError("not a manifest (an object was expected)")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, found {_shown(manifest.get('format'))}")
    if not files.is_sealed(manifest):
        raise ValueError("does not match its own SHA-256")
    _check(manifest)
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    _expect(files.is_count(manifest.get("step")), "step", manifest.get("step"))
    found = manifest.get("files")
    _expect(isinstance(found, dict), "files", found)
    for name, facts in found.items():
        is_file = files.is_plain_name(name) and isinstance(facts, dict)
        _expect(is_file and files.is_count(facts.get("size")) and files.is_digest(facts.get("sha256")), name, facts)
    _expect(isinstance(manifest.get("arrays"), dict), "arrays", manifest.get("arrays"))
    sizes = {name: facts["size"] for name, facts in found.items()}
    taken: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for key, entry in manifest["arrays"].items():
        _check_array(key, entry, sizes, taken)
    for name, ranges in taken.items():
        for (_, end), (start, _) in itertools.pairwise(sorted(ranges)):
            if start < end:
                raise ValueError(f"two values share the bytes from {start} of {name}")
        if sum(end - start for start, end in ranges) != sizes[name]:  # or a hole of a terabyte would be read
            raise ValueError(f"{name} is larger than the values in it")


def _check_array(key: str, entry: Any, sizes: Mapping[str, int], taken: dict[str, list[tuple[int, int]]]) -> None:
    """Notes in `taken` which bytes of which files it takes."""
    _expect(isinstance(entry, dict), key, entry)
    shape, dtype = entry.get("shape"), DTYPES.get(entry.get("dtype") if isinstance(entry.get("dtype"), str) else "")
    _expect(dtype is not None, f"{key}, dtype", entry.get("dtype"))
    _expect(_is_shape(shape, dtype.itemsize), f"{key}, shape", shape)
    _expect(isinstance(entry.get("slices"), list), f"{key}, slices", entry.get("slices"))
    boxes = []
    for piece in entry["slices"]:
        _expect(isinstance(piece, dict) and isinstance(piece.get("file"), str) and piece["file"] in sizes, key, piece)
        offset, extent, start = piece.get("offset"), piece.get("shape"), piece.get("byte_offset")
        _expect(_is_inside(offset, extent, shape), f"{key}, a slice's place", [offset, extent])
        end = start + math.prod(extent) * dtype.itemsize if files.is_count(start) else -1
        _expect(0 <= end <= sizes[piece["file"]], f"{key}, a slice's bytes", start)
        if math.prod(extent):
            taken[piece["file"]].append((start, end))
            boxes.append((offset, extent))
    if not _cover(boxes, shape):
        raise ValueError(f"{one_line(key, 60)}: its slices do not cover it exactly once")


def _is_shape(shape: Any, itemsize: int) -> bool:
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(files.is_count, shape)):
        return False
    return math.prod(max(size, 1) for size in shape) * itemsize < 1 << 62


def _is_inside(offset: Any, extent: Any, shape: list[int]) -> bool:
    for numbers in (offset, extent):
        if not isinstance(numbers, list) or len(numbers) != len(shape) or not all(map(files.is_count, numbers)):
            return False
    return all(first + size <= whole for first, size, whole in zip(offset, extent, shape, strict=True))


def _cover(boxes: list[tuple[list[int], list[int]]], shape: list[int]) -> bool:
    """Whether boxes that lie inside of an array cover each of its elements once."""
    if sum(math.prod(extent) for _, extent in boxes) != math.prod(shape):
        return False
    if len(boxes) < 2:
        return True
    borders = [sorted({n for o, e in boxes for n in (o[i], o[i] + e[i])}) for i in range(len(shape))]
    cells = [len(found) - 1 for found in borders]
    if math.prod(cells) > _MOST_CELLS:
        return False
    place = [{border: i for i, border in enumerate(found)} for found in borders]
    covered = np.zeros(cells, bool)
    for offset, extent in boxes:
        box = tuple(slice(place[i][o], place[i][o + e]) for i, (o, e) in enumerate(zip(offset, extent, strict=True)))
        if covered[box].any():
            return False
        covered[box] = True
    return True  # without overlap, and as many elements


def _expect(is_so: bool, what: str, found: Any) -> None:
    if not is_so:
        raise ValueError(f"not a manifest ({one_line(what, 60)} is {_shown(found)})")


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)
