"""What is in a tokenised dataset. No TensorFlow."""

from pathlib import Path

import numpy as np

from tfdist.data.shards import Split, TokenDataset

_SAMPLE_TOKENS = 120


def document_lengths(split: Split) -> np.ndarray:
    """Tokens of each document, int64 [documents]."""
    return np.diff(np.append(split.starts_and_keys()[:, 0], split.tokens))


def describe(dataset: TokenDataset, num_samples: int) -> str:
    """Sizes, lengths and the beginnings of some documents, evenly from each split."""
    lines = [
        f"{dataset.path}: tokenizer {dataset.tokenizer}, {dataset.vocab_size} tokens, data hash {dataset.data_hash[:16]}"
    ]
    for name, split in dataset.splits.items():
        lengths = document_lengths(split)
        per_token = f", {split.bytes_per_token:.2f} bytes a token" if split.text_bytes else ""
        lines.append(
            f"{name}: {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards{per_token}"
        )
        if len(lengths):
            shares = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(int)
            lines.append("  tokens of a document: " + " / ".join(f"{n:,}" for n in shares) + " (least, quartiles, most)")
            lines += _histogram(lengths)
    text = dataset.make_tokenizer()
    for name, split in dataset.splits.items():
        starts = split.starts_and_keys()[:, 0]
        for i in np.unique(np.linspace(0, len(starts) - 1, num_samples).astype(int)) if len(starts) else []:
            end = int(starts[i + 1]) if i + 1 < len(starts) else split.tokens
            lines.append(f"--- {name}, document {i} ---\n{text.decode(_tokens(split, int(starts[i]), end))}")
    return "\n".join(lines)


def _histogram(lengths: np.ndarray) -> list[str]:
    counts, edges = _bins(lengths)
    return [f"  {edges[i]:>9,} to {edges[i + 1] - 1:>9,} {'#' * -(-40 * int(n) // int(counts.max()))} {n:,}"
            for i, n in enumerate(counts) if n]  # fmt: skip


def _bins(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Powers of two."""
    edges = 2 ** np.arange(0, int(lengths.max()).bit_length() + 1)
    return np.histogram(lengths, edges)[0], edges


def _tokens(split: Split, start: int, end: int) -> np.ndarray:
    """The first tokens of a document, as far as they are in one shard."""
    for shard in split.shards:
        if start < shard.tokens:
            return shard.read()[start : min(start + _SAMPLE_TOKENS, end)]
        start, end = start - shard.tokens, end - shard.tokens
    return np.zeros(0, np.int64)


def plot(dataset: TokenDataset, path: Path) -> None:
    """The lengths of documents as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, split in dataset.splits.items():
        lengths = document_lengths(split)
        if len(lengths):
            counts, edges = _bins(lengths)
            axes.stairs(counts, edges, label=f"{name} ({split.documents:,} documents)", fill=name == "train", alpha=0.7)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title=f"{dataset.path}")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
