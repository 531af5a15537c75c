import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tfdist.data import corpus, shards, tfds_source
from tfdist.data.input import eval_dataset_fn, num_windows, train_dataset_fn
from tfdist.data.order import Order
from tfdist.data.tokenizer import ByteTokenizer
from tfdist.errors import DataError
from tfdist.strategies import layout
from tfdist.strategies.base import InputContext


def documents(source, **options):
    return list(corpus.documents(source, "text", options.get("validation_fraction", 0.1)))


def whole_split(dataset, split):
    return np.concatenate([np.load(shard.path) for shard in dataset.splits[split].shards])


@pytest.fixture(scope="module")
def dataset(text_files, cache_dir):
    return shards.open_source(f"files:{text_files}/*.txt", "text", 0.1, cache_dir)


# ---- corpus ----


def test_stdlib_is_split_by_file_in_a_fixed_order():
    found = documents("stdlib", validation_fraction=0.05)
    names = {split: [d.name for d in found if d.split == split] for split in ("train", "validation")}
    assert "argparse.py" in names["train"] + names["validation"]
    assert not set(names["train"]) & set(names["validation"])
    assert 0.03 < len(names["validation"]) / len(found) < 0.07
    assert [d.name for d in found] == sorted(d.name for d in found)
    assert found == documents("stdlib", validation_fraction=0.05)
    assert not any("site-packages" in d.name for d in found)


def test_few_documents_give_their_tails_to_validation(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    train, validation = documents(f"files:{tmp_path}/a.txt")
    assert (train.split, validation.split) == ("train", "validation")
    assert train.text + validation.text == bytes(range(1, 101)) and len(validation.text) == 10


@pytest.mark.parametrize(
    ("content", "pattern", "expected"),
    [
        (None, "none/*.txt", "expected files at"),
        (b"", "*.txt", "expected text, found an empty source"),
        (b"ab\0cd", "*.txt", "found a binary file"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, pattern, expected):
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=expected) as error:
        documents(f"files:{tmp_path}/{pattern}")
    assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_globs_reach_into_folders(tmp_path):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    for name in ("docs/a.txt", "docs/deep/b.txt"):
        (tmp_path / name).write_text("text " * 50)
    assert {d.name for d in documents(f"files:{tmp_path}/docs/**/*.txt")} == {
        "a.txt", "deep/b.txt",
    }  # fmt: skip


# ---- TensorFlow Datasets ----


class TinyPoems(tfds.core.GeneratorBasedBuilder):
    """A dataset that the test prepares on disk, with real `tfds` code."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"verse": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(5)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"verse": f"verse {i} of {n}"}


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_data_dir", lambda _: tmp_path)
    return tmp_path


def test_tfds_is_read_from_its_files(tfds_dir):
    TinyPoems(data_dir=tfds_dir).download_and_prepare()
    train, validation = tfds_source.read("tiny_poems", "verse")
    assert sorted(text for _, text in train) == sorted(f"verse {i} of 40".encode() for i in range(40))
    assert len(validation) == 5  # its own test split
    assert (train, validation) == tfds_source.read("tiny_poems:1.0.0", "verse")
    found = list(corpus.documents("tfds:tiny_poems", "verse", 0.5))
    assert sum(d.split == "validation" for d in found) == 5
    with pytest.raises(DataError, match="expected a feature of tfds:tiny_poems .verse., found 'text'"):
        tfds_source.read("tiny_poems", "text")


def test_an_unknown_tfds_name_is_one_line_with_near_names(tfds_dir):
    with pytest.raises(DataError, match="unknown TensorFlow dataset 'tiny_shakespear'; did you mean tiny_shakespeare"):
        tfds_source.read("tiny_shakespear", "text")


def test_a_download_that_stalls_is_given_up(tfds_dir, monkeypatch):
    """Here there is no network, or there is one and this downloads a megabyte: both end well within the limit."""
    monkeypatch.setattr(tfds_source, "_STALL_S", 2.0)
    monkeypatch.setattr(tfds_source, "_PREPARE", "import time; time.sleep(60)")
    with pytest.raises(DataError, match="cannot download tfds:tiny_shakespeare: nothing arrived for 2 s"):
        tfds_source.read("tiny_shakespeare", "text")


def test_a_download_that_fails_says_why(tfds_dir, monkeypatch):
    noise = "import sys; sys.stderr.write('x' * 200_000 + chr(10))"  # more than a pipe holds
    monkeypatch.setattr(tfds_source, "_PREPARE", f"{noise}; raise OSError('no route to host')")
    with pytest.raises(DataError, match="cannot download tfds:tiny_shakespeare: OSError: no route to host"):
        tfds_source.read("tiny_shakespeare", "text")


# ---- tokens and shards ----


def test_bytes_round_trip():
    tokenizer, text = ByteTokenizer(), "naïve Δx → 0\n"
    tokens = tokenizer.encode_document(text.encode())
    assert tokens[0] == tokenizer.document_start and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text
    assert list(tokens) == tokenizer.encode_prompt(text)


def test_the_cache_is_addressed_by_content_not_by_place(dataset, text_files, cache_dir, tmp_path):
    assert dataset.path == cache_dir / dataset.data_hash
    assert shards.open_source(f"files:{text_files}/*.txt", "text", 0.1, cache_dir) == dataset
    shutil.copytree(text_files, tmp_path / "moved")
    assert shards.open_source(f"files:{tmp_path}/moved/*.txt", "text", 0.1, cache_dir) == dataset
    (tmp_path / "a.txt").write_text("some text " * 100)
    first = shards.open_source(f"files:{tmp_path}/a.txt", "text", 0.1, cache_dir)
    (tmp_path / "a.txt").write_text("other text " * 100)
    assert shards.open_source(f"files:{tmp_path}/a.txt", "text", 0.1, cache_dir).data_hash != first.data_hash


def test_shards_hold_every_document_and_say_so(dataset, text_files):
    for split in ("train", "validation"):
        tokens = whole_split(dataset, split)
        found = [d for d in documents(f"files:{text_files}/*.txt") if d.split == split]
        expected = np.concatenate([ByteTokenizer().encode_document(d.text) for d in found])
        np.testing.assert_array_equal(tokens, expected)
        info = dataset.splits[split]
        assert (info.tokens, info.documents) == (len(expected), len(found))
        assert info.text_bytes == sum(len(d.text) for d in found)


def test_small_shards_read_like_one(text_files, tmp_path, monkeypatch, dataset):
    monkeypatch.setattr(shards, "_SHARD_TOKENS", 3000)
    many = shards.open_source(f"files:{text_files}/*.txt", "text", 0.1, tmp_path)
    assert len(many.splits["train"].shards) > 3
    options = dict(sequence_length=16, global_batch_size=8, accumulate_steps=1, seed=0, shuffle=True, vocab_size=258)
    for a, b in zip(
        train_dataset_fn(many, **options)(InputContext()).take(3),
        train_dataset_fn(dataset, **options)(InputContext()).take(3),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_built_dataset_is_a_source_and_damage_is_found(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    assert shards.read(copy).splits["train"].tokens == dataset.splits["train"].tokens
    shard = next(copy.glob("train-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot read shard"):
        shards.read(copy)
    shard.unlink()
    with pytest.raises(DataError, match="cannot read shard"):
        shards.read(copy)
    with pytest.raises(DataError, match="expected a token dataset"):
        shards.read(tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path):
    def broken():
        yield corpus.Document("a", "train", b"text")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        shards.build(broken, ByteTokenizer(), "x", "hash", tmp_path / "hash")
    assert list(tmp_path.iterdir()) == []


# ---- order ----


def test_each_epoch_is_a_permutation_and_epochs_differ():
    order = Order(num_samples=101, seed=7)
    samples = order.sample(tf.range(303)).numpy().reshape(3, 101)
    for epoch in samples:
        assert sorted(epoch) == list(range(101))
    assert (samples[0] != samples[1]).any() and (samples[1] != samples[2]).any()
    assert (Order(101, seed=8).sample(tf.range(101)).numpy() != samples[0]).any()


def test_a_sample_depends_on_its_index_alone():
    order = Order(num_samples=50, seed=1)
    together = order.sample(tf.range(120)).numpy()
    apart = [order.sample(tf.constant([i])).numpy()[0] for i in (0, 49, 50, 99, 119)]
    assert apart == [together[i] for i in (0, 49, 50, 99, 119)]


@pytest.mark.parametrize("pipelines", [1, 2, 3, 4])
@pytest.mark.parametrize("local", [1, 2])
@pytest.mark.parametrize(("batch", "micro"), [(8, 1), (8, 4), (12, 2), (5, 2), (3, 1)])
def test_pipeline_rows_are_disjoint_complete_and_laid_out_at_their_place(batch, micro, local, pipelines):
    """Each replica of each pipeline gets the rows that `first_row` says: dropout masks depend on it."""
    replicas = local * pipelines
    shares = [InputContext(p, pipelines, replicas).rows(batch, micro) for p in range(pipelines)]
    assert sorted(np.concatenate(shares)) == list(range(batch))
    block, placed = -(-batch // micro), []
    for pipeline, rows in enumerate(shares):
        dataset = tf.data.Dataset.from_tensors((rows, rows))
        laid_out = layout.lay_out(dataset, list(map(len, shares)), pipeline, micro, local)
        found = next(laid_out.as_numpy_iterator())
        share = found.x.shape[-1]
        assert share == -(-block // replicas), "no more places than needed"
        expected = found.first_row[..., None] + np.arange(share)
        real = found.weight > 0
        np.testing.assert_array_equal(found.x[real], expected[real])
        np.testing.assert_array_equal(real, np.arange(share) < found.rows[..., None])
        for m in range(micro):
            np.testing.assert_array_equal(found.x[:, m][real[:, m]] // block, m, "micro-batches are those of one device")
        placed += list(found.x[real])
    assert sorted(placed) == list(range(batch))


# ---- the input graph ----


def test_training_rows_are_the_ordered_windows_of_the_text(dataset):
    length, batch = 16, 8
    make = train_dataset_fn(
        dataset, sequence_length=length, global_batch_size=batch, accumulate_steps=1, seed=3, shuffle=True,
        vocab_size=258,
    )  # fmt: skip
    tokens = whole_split(dataset, "train")
    order = Order(num_windows(dataset.splits["train"], length), seed=3)
    steps = list(make(InputContext()).take(5).as_numpy_iterator())
    for step, (inputs, labels) in enumerate(steps):
        for row, window in enumerate(order.sample(step * batch + tf.range(batch, dtype=tf.int64)).numpy()):
            np.testing.assert_array_equal(inputs[row], tokens[window * length : (window + 1) * length])
            np.testing.assert_array_equal(labels[row], tokens[window * length + 1 : (window + 1) * length + 1])
    resumed = next(make(InputContext(start_step=4)).as_numpy_iterator())
    np.testing.assert_array_equal(resumed[0], steps[4][0])
    two = [next(make(InputContext(p, 2, start_step=2)).as_numpy_iterator())[0] for p in range(2)]
    np.testing.assert_array_equal(np.concatenate(two), steps[2][0])


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_evaluation_counts_every_token_once(dataset, batch):
    make = eval_dataset_fn(dataset, "validation", sequence_length=16, batch_size=batch, vocab_size=258)
    tokens = whole_split(dataset, "validation")
    windows = [w for x in make(InputContext()).as_numpy_iterator() for w in zip(*x, strict=True) if w[2].any()]
    seen = sorted((inputs.tobytes(), labels[weight > 0].tobytes()) for inputs, labels, weight in windows)
    padded = np.concatenate([tokens, np.repeat(tokens[-1:], 16)]).astype(np.int32)
    starts = range(0, len(tokens) - 1, 16)
    expected = [(padded[s : s + 16].tobytes(), tokens[s + 1 : s + 17].astype(np.int32).tobytes()) for s in starts]
    assert seen == sorted(expected)


def test_a_sequence_longer_than_the_corpus_is_refused(dataset):
    with pytest.raises(DataError, match="data.sequence_length: expected at most"):
        train_dataset_fn(
            dataset, sequence_length=10**6, global_batch_size=1, accumulate_steps=1, seed=0, shuffle=False,
            vocab_size=258,
        )  # fmt: skip


def test_token_ids_out_of_range_are_found(dataset, tmp_path):
    """An index that claims a smaller vocabulary than its shards use, and a model that is too small."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    index = json.loads((copy / "dataset.json").read_text())
    index["vocab_size"] = 100
    (copy / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="token ids below its vocabulary of 100, found"):
        shards.read(copy)
    make = eval_dataset_fn(dataset, "validation", sequence_length=16, batch_size=4, vocab_size=50)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a token id is not below model.vocab_size=50"):
        next(iter(make(InputContext())))
