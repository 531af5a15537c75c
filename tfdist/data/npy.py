"""`.npy` files of tokens and of documents' beginnings. Their headers have one form, which is matched and never evaluated, so
that a damaged one is found as such."""

import math
import os
import re
from pathlib import Path

import numpy as np

from tfdist import files
from tfdist.errors import DataError

HEADER_BYTES = 128
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00\{'descr': '([<|][a-z]\d{1,2})', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}),(?: (\d{1,18}))?\), \} *\n"
)
_NAMES = {np.dtype(code).str: np.dtype(code).name for code in "bBhHiIlLefd"}


def header(dtype: type, shape: tuple[int, ...]) -> bytes:
    """As NumPy writes it."""
    start = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + start.encode().ljust(HEADER_BYTES - 11) + b"\n"


def read(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Its array, mapped. Raises `DataError` for a file that is not there, no regular one, or holds something else."""
    try:
        with files.open_inside(path.parent, path.name) as file:
            found, size = _HEADER.fullmatch(file.read(HEADER_BYTES)), os.fstat(file.fileno()).st_size
            what = "another header"
            if found is not None:
                there = tuple(int(number) for number in found.groups()[1:] if number is not None)
                what = f"{_NAMES.get(found[1].decode(), 'another type')} {list(there)} in {size} bytes"
                expected_size = HEADER_BYTES + math.prod(shape) * np.dtype(dtype).itemsize
                if (_NAMES.get(found[1].decode()), there, size) == (dtype, shape, expected_size):
                    return np.memmap(file, dtype, "r", HEADER_BYTES, shape)
    except FileNotFoundError:
        raise DataError(f"data: expected the shard {path}, found no such file; build the dataset again") from None
    except OSError as error:
        raise DataError(f"data: cannot read shard {path}: {error.strerror}; build the dataset again") from error
    kind = "tokens" if len(shape) == 1 else "documents"
    raise DataError(f"data: expected {shape[0]} {kind} of {dtype} in {path}, found {what}; build the dataset again")
