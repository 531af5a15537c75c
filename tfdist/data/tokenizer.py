"""Bytes as tokens: 256 values and the specials. Nothing to train, nothing to download, every text round-trips."""

import numpy as np


class ByteTokenizer:
    name = "bytes"
    document_start = 256  # stands before every document, and before a prompt
    padding = 257
    vocab_size = 258

    def encode_document(self, text: bytes) -> np.ndarray:
        """uint16 [1 + len(text)]: the start mark and the bytes."""
        tokens = np.empty(len(text) + 1, np.uint16)
        tokens[0] = self.document_start
        tokens[1:] = np.frombuffer(text, np.uint8)
        return tokens

    def encode_prompt(self, text: str) -> list[int]:
        return [self.document_start, *text.encode()]

    def decode(self, tokens) -> str:
        """Specials are dropped; bytes that are no UTF-8 become U+FFFD."""
        return bytes(int(token) for token in tokens if token < 256).decode(errors="replace")
