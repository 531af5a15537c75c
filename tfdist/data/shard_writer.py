"""Documents into shards: encoded in batches, written as they come, so that a process needs little memory."""

import contextlib
from pathlib import Path
from typing import IO

import numpy as np

from tfdist import files
from tfdist.data import documents, npy, tokenizer
from tfdist.data.index import documents_of
from tfdist.errors import DataError

_BATCH_BYTES = 1 << 22  # of text that is encoded in one call, and then written: what a process keeps in memory


class ShardWriter:
    """The shards NAME-000.npy, NAME-001.npy, ... of one split of one piece, and what the index says of each."""

    def __init__(self, folder: Path, name: str, encoder: tokenizer.Tokenizer, shard_tokens: int):
        self.folder, self.name, self.encoder, self.shard_tokens = folder, name, encoder, shard_tokens
        self.dtype = tokenizer.token_dtype(encoder.vocab_size)
        self.waiting: list[documents.Part] = []  # not yet encoded
        self.waiting_bytes = 0
        self.shards: list[dict] = []
        self._new_shard()

    def _new_shard(self) -> None:
        self.path = self.folder / f"{self.name}-{len(self.shards):03d}.npy"
        self.open = contextlib.ExitStack()
        self.file: IO[bytes] | None = None  # begins with room for the header
        self.tokens = self.text_bytes = self.replaced = 0
        self.documents: list[tuple[int, int]] = []  # (first token, key)

    def add(self, part: documents.Part) -> None:
        self.waiting.append(part)
        self.waiting_bytes += len(part.text) if part.tokens is None else 2 * len(part.tokens)
        if self.waiting_bytes >= _BATCH_BYTES:
            self._encode()

    def _encode(self) -> None:
        texts = [part.text for part in self.waiting if part.tokens is None]
        encoded = iter(self.encoder.encode(texts)) if texts else iter(())
        for part in self.waiting:
            tokens = next(encoded) if part.tokens is None else self._known(part)
            self._append(part, tokens)
        self.waiting, self.waiting_bytes = [], 0

    def _known(self, part: documents.Part) -> np.ndarray:
        if len(part.tokens) and part.tokens.max() >= self.encoder.vocab_size:
            raise DataError(
                f"data.tokenizer: expected token ids below the {self.encoder.vocab_size} of {self.encoder.name}, found "
                f"{part.tokens.max()} in {part.name}"
            )
        return part.tokens.astype(self.dtype)

    def _append(self, part: documents.Part, tokens: np.ndarray) -> None:
        marked = part.begins and part.tokens is None and self.encoder.document_start >= 0
        if self.tokens and self.tokens + len(tokens) + marked > self.shard_tokens:
            self._close_shard()
        if part.begins:
            self.documents.append((self.tokens, documents.key_of(part.name)))
        if marked:
            tokens = np.concatenate([np.array([self.encoder.document_start], self.dtype), tokens])
        if self.file is None:
            self.file = self.open.enter_context(files.whole_file(self.path))
            self.file.write(bytes(npy.HEADER_BYTES))
        self.file.write(tokens.tobytes())
        self.tokens += len(tokens)
        self.text_bytes += len(part.text)
        self.replaced += part.replaced

    def _close_shard(self) -> None:
        self.file.seek(0)
        self.file.write(npy.header(self.dtype, (self.tokens,)))
        self.open.close()  # now it has its name
        starts = np.array(self.documents, np.int64).reshape(-1, 2)
        starts_path = self.path.with_name(documents_of(self.path.name))
        files.write(starts_path, npy.header(np.int64, starts.shape) + starts.tobytes())
        self.shards.append({
            "file": self.path.name,
            "tokens": self.tokens,
            "documents": len(self.documents),
            "text_bytes": self.text_bytes,
            "not_utf8": self.replaced,
            "sha256": files.sha256(self.path),
            "documents_sha256": files.sha256(starts_path),
        })  # fmt: skip
        self._new_shard()

    def _finish(self) -> None:
        if self.waiting:
            self._encode()
        if self.file:
            self._close_shard()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Finishes the last shard; after an error what is not whole goes away."""
        if error is None:
            self._finish()
        else:
            self.open.__exit__(kind, error, trace)
