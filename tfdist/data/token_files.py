"""Token files of other projects: nanoGPT's `train.bin` (bare uint16) and llm.c's `.bin` (a header of 256 int32)."""

import dataclasses
import os

import numpy as np

from tfdist.errors import DataError

_LLM_C_HEADER_BYTES = 1024
_LLM_C = {20240520: np.uint16, 20240801: np.uint32}  # magic number (GPT-2, Llama 3) -> token type


@dataclasses.dataclass(frozen=True)
class TokenFile:
    path: str
    number: int
    dtype: type
    header_bytes: int

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end)."""
        offset = self.header_bytes + start * np.dtype(self.dtype).itemsize
        return np.fromfile(self.path, self.dtype, end - start, offset=offset)


def header(path: str) -> TokenFile:
    """What a file says of itself. Raises `DataError` for one that is cut short."""
    try:
        size = os.stat(path).st_size
        first = np.fromfile(path, "<i4", min(256, size // 4))
    except OSError as error:
        raise DataError(f"data.source: cannot read {path}: {error.strerror}") from error
    if len(first) == 256 and int(first[0]) in _LLM_C:
        dtype, number = _LLM_C[int(first[0])], int(first[2])
        found = (size - _LLM_C_HEADER_BYTES) // np.dtype(dtype).itemsize
        if found != number:
            raise DataError(f"data.source: expected {number} tokens in {path} (its header says so), found {found}")
        return TokenFile(path, number, dtype, _LLM_C_HEADER_BYTES)
    if size % 2 or not size:
        raise DataError(f"data.source: expected uint16 tokens in {path}, found {size} bytes")
    return TokenFile(path, size // 2, np.uint16, 0)
