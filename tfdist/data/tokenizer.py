"""Tokenizers: bytes, byte-level BPE (arXiv:1508.07909) trained here or read from a `tokenizer.json`, and plain ids.

Each has a `name`, a `vocab_size`, a `document_start` that stands before every document and every prompt (-1: none), and a
`json` that restores it ("" where the name is enough).
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tfdist import files
from tfdist.errors import DataError, one_line

FILE = "tokenizer.json"
_MOST_BYTES = 256 << 20
_START, _PADDING = "<|document|>", "<|padding|>"
_KNOWN_STARTS = (_START, "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")


class ByteTokenizer:
    """256 values and the specials. Nothing to train, nothing to download, every text round-trips."""

    name, json = "bytes", ""
    document_start, padding, vocab_size = 256, 257, 258

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """uint16 [len(text)] each, without the start mark."""
        return [np.frombuffer(text, np.uint8).astype(np.uint16) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        return [self.document_start, *text.encode()]

    def decode(self, tokens) -> str:
        """Specials are dropped; bytes that are no UTF-8 become U+FFFD."""
        return bytes(int(token) for token in tokens if token < 256).decode(errors="replace")

    def is_text(self) -> np.ndarray:
        """bool [vocab_size]: which tokens a text may have; not the specials."""
        return np.arange(self.vocab_size) < 256


class SubwordTokenizer:
    """A `tokenizers.Tokenizer` of Hugging Face. What looks like a special token in a text is text."""

    def __init__(self, name: str, json: str):
        import tokenizers

        self.name, self.json = name, json
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception, and panics of Rust, which are none
            raise DataError(f"data.tokenizer: cannot read the tokenizer {_named(name)}: {one_line(error, 200)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        starts = [token for token in _KNOWN_STARTS if self._tokenizer.token_to_id(token) is not None]
        if not starts:
            raise DataError(f"data.tokenizer: expected a token that starts a document ({', '.join(_KNOWN_STARTS)}), found "
                            f"none in {_named(name)}")  # fmt: skip
        self.document_start = self._tokenizer.token_to_id(starts[0])

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """uint16 (uint32 where the vocabulary needs it) [tokens] each, without the start mark. The texts are UTF-8."""
        dtype = token_dtype(self.vocab_size)
        encoded = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(one.ids, dtype) for one in encoded]

    def encode_prompt(self, text: str) -> list[int]:
        return [self.document_start, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens) -> str:
        """Specials, and ids that the tokenizer does not have, are dropped."""
        return self._tokenizer.decode([int(t) for t in tokens if t < self.vocab_size], skip_special_tokens=True)

    def is_text(self) -> np.ndarray:
        """bool [vocab_size]: which tokens a text may have; not the specials."""
        allowed = np.ones(self.vocab_size, bool)
        added = self._tokenizer.get_added_tokens_decoder()
        allowed[[number for number, token in added.items() if token.special]] = False
        return allowed


class Ids:
    """Tokens of somebody else's tokenizer: numbers below `vocab_size`, which no text can be made of here."""

    json, document_start = "", -1

    def __init__(self, vocab_size: int):
        self.name, self.vocab_size = f"ids:{vocab_size}", vocab_size

    def encode(self, texts):
        raise DataError(f"data.tokenizer: expected bytes, bpe:SIZE or file:PATH to encode text, found {self.name}")

    encode_prompt = encode

    def decode(self, tokens) -> str:
        return " ".join(str(int(token)) for token in tokens)

    def is_text(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)


Tokenizer = ByteTokenizer | SubwordTokenizer | Ids


def token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def kind_and_value(spec: str) -> tuple[str, str]:
    """Splits bytes, bpe:SIZE, file:PATH or ids:SIZE. Raises `DataError` for anything else."""
    kind, _, value = spec.partition(":")
    number = int(value) if value.isdecimal() and len(value) < 12 else 0
    good = {"bytes": spec == "bytes", "bpe": 258 < number <= 1 << 20, "file": value, "ids": 0 < number <= 1 << 31}
    if not good.get(kind):
        raise DataError(
            "data.tokenizer: expected bytes, bpe:SIZE (259 to 1048576), file:tokenizer.json or ids:SIZE, found "
            f"{_named(repr(spec))}"
        )
    return kind, value


def make(spec: str, texts: Iterable[bytes]) -> Tokenizer:
    """The tokenizer of a spec; `texts` are read if it has to be trained."""
    kind, value = kind_and_value(spec)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "ids":
        return Ids(int(value))
    if kind == "bpe":
        return SubwordTokenizer(spec, _train(texts, int(value)))
    return SubwordTokenizer(spec, _read(Path(value)))


def restore(name: str, folder: Path) -> Tokenizer:
    """The tokenizer of that name whose `tokenizer.json`, if it has one, was kept in `folder`."""
    kind, value = kind_and_value(name)
    if kind == "bytes":
        return ByteTokenizer()
    return Ids(int(value)) if kind == "ids" else SubwordTokenizer(name, _read(folder / FILE, plain=True))


def fingerprint(tokenizer: Tokenizer) -> str:
    """Tells tokenizers apart by what they do: a file's name or place does not count."""
    what = tokenizer.json or tokenizer.name
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _named(name: str) -> str:
    """A dataset or a workdir from elsewhere may say anything."""
    return one_line(name, 100)


def _read(path: Path, plain: bool = False) -> str:
    """`plain`: of a folder from elsewhere, where links and pipes are refused."""
    try:
        return files.read_inside(path.parent, path.name, _MOST_BYTES).decode() if plain else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.tokenizer: cannot read {path}: {getattr(error, 'strerror', error)}") from error


def _train(texts: Iterable[bytes], vocab_size: int) -> str:
    """Byte-level BPE: every text can be encoded, and decodes to itself. The same texts give the same merges."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[_START, _PADDING], show_progress=False
    )
    bpe.train_from_iterator((text.decode() for text in texts), trainer)
    return bpe.to_str()
