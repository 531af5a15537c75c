"""The sample order, the input graph, sharding policies, and the audit: against NumPy and the one-worker run."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from processes import run, tfdist

from tfdist.config import Config, DataConfig, batch_sizes
from tfdist.data import audit, build, corpus, documents, pieces, sharding, shards
from tfdist.data.input import eval_dataset_fn, phases, train_dataset_fn
from tfdist.data.order import BlockOrder, Mixture, Order
from tfdist.errors import DataError
from tfdist.strategies import layout
from tfdist.strategies.base import InputContext

LENGTH = 16


def settings(source="", **values) -> Config:
    """Short sequences, small batches. `train__seed=1` sets `config.train.seed`."""
    config = Config(data=DataConfig(source=source, sequence_length=LENGTH, validation_fraction=0.1))
    config.train.global_batch_size, config.train.seed = 8, 3
    for name, value in values.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section or "data"), field, value)
    return config


def elements(dataset, config, number, context=None, phase=0):
    """(x, y[, weight], first token of each row) of so many steps."""
    made = train_dataset_fn(dataset, config, phase, with_places=True)(context or InputContext())
    return list(made.take(number).as_numpy_iterator())


def places(dataset, config, number, context=None, phase=0):
    return np.array([element[-1] for element in elements(dataset, config, number, context, phase)])


def whole(dataset, split="train"):
    return np.concatenate([shard.read() for shard in dataset.splits[split].shards])


@pytest.fixture(scope="module")
def dataset(text_files, cache_dir):
    return shards.open_source(settings(f"files:{text_files}/*.txt").data, cache_dir)


@pytest.fixture(scope="module")
def many_shards(text_files, tmp_path_factory):
    """The same corpus in a dozen shards."""
    out = tmp_path_factory.mktemp("shards") / "many"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_PIECE_BYTES", 3000)
        build.build(corpus.plan(f"files:{text_files}/*.txt", "text", 0.1), "bytes", "many", out)
    return shards.read(out)


@pytest.fixture(scope="module")
def mixed(dataset, text_files, cache_dir):
    """Two datasets, seven to three."""
    source = f"mix:0.7*shards:{dataset.path};0.3*files:{text_files}/1*.txt"
    return shards.open_source(settings(source).data, cache_dir)


@pytest.fixture
def in_blocks(monkeypatch):
    """Any corpus is larger than the memory for shuffling: two blocks of 2 kB in a group."""
    from tfdist.data import input

    whole_bytes = input._bytes
    monkeypatch.setattr(input, "_bytes", lambda splits: whole_bytes(splits) + (1 << 40))
    monkeypatch.setattr(input, "_BLOCK_BYTES", 2048)
    monkeypatch.setattr(input, "_GROUPS_IN_MEMORY", 256)


# ---- order ----


def test_each_epoch_is_a_permutation_and_epochs_differ():
    order = Order(num_samples=101, seed=7)
    samples = order.sample(tf.range(303)).numpy().reshape(3, 101)
    for epoch in samples:
        assert sorted(epoch) == list(range(101))
    assert (samples[0] != samples[1]).any() and (samples[1] != samples[2]).any()
    assert (Order(101, seed=8).sample(tf.range(101)).numpy() != samples[0]).any()


@pytest.mark.parametrize("number", [1, 7, 8, 64, 103, 200])
@pytest.mark.parametrize("shuffle", [True, False])
def test_block_order_is_a_permutation_that_stays_within_groups(number, shuffle):
    order = BlockOrder(number, seed=1, block=8, group=4, shuffle=shuffle)
    samples = order.sample(tf.range(3 * number)).numpy().reshape(3, number)
    for epoch in samples:
        assert sorted(epoch) == list(range(number))
        for group in range(order.groups):  # its samples are those of whole blocks
            mine = epoch[group * 32 : (group + 1) * 32]
            assert len(set(mine // 8)) == -(-len(mine) // 8)
    if not shuffle:
        assert (samples == np.arange(number)).all()
    elif number > 32:
        assert len(set((samples[0] // 8)[:32])) == 4 and (samples[0] != samples[1]).any()
        far = np.abs(np.diff(samples[0])).mean()
        assert far > 2, "neighbours do not stay together"


@pytest.mark.parametrize("make", [lambda: Order(50, 1), lambda: BlockOrder(50, 1, 4, 3), lambda: Order(10**12, 1)])
def test_a_sample_depends_on_its_index_alone(make):
    order = make()
    together = order.sample(tf.range(120)).numpy()
    apart = [order.sample(tf.constant([i])).numpy()[0] for i in (0, 49, 50, 99, 119)]
    assert apart == [together[i] for i in (0, 49, 50, 99, 119)]


@pytest.mark.parametrize("weights", [[1], [0.7, 0.3], [5, 1, 1], [1, 1e-9]])
def test_a_mixture_keeps_shares_and_takes_each_dataset_in_a_row(weights):
    mixture = Mixture.of_weights(weights, seed=2)
    chosen, position = (t.numpy() for t in mixture.split(tf.range(5500)))
    for i, weight in enumerate(weights):
        mine = position[chosen == i]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
        share = max(weight / sum(weights), 0.001)
        np.testing.assert_allclose([(chosen[:5000] == i).mean()], share, atol=0.0011)
    for index in (0, 1, 999, 1000, 1234, 5499):
        expected = [(chosen[:index] == i).sum() for i in range(len(weights))]
        np.testing.assert_array_equal(mixture.before(tf.constant(index)), expected)
    if len(weights) > 1:
        assert (chosen[:1000] != chosen[1000:2000]).any() or weights[1] < 1e-6, "cycles differ"


# ---- rows of a pipeline ----


@pytest.mark.parametrize(
    ("pipelines", "weights"), [(1, ()), (2, ()), (3, ()), (4, ()), (2, (3, 1)), (3, (1, 2, 1)), (3, (1, 1, 0.001))]
)
@pytest.mark.parametrize("local", [1, 2])
@pytest.mark.parametrize(("batch", "micro"), [(8, 1), (8, 4), (12, 2), (5, 2), (3, 1)])
def test_pipeline_rows_are_disjoint_complete_and_laid_out_at_their_place(batch, micro, local, pipelines, weights):
    """Each replica of each pipeline gets the rows that `first_row` says: dropout masks depend on it."""
    replicas = local * pipelines
    shares = [InputContext(p, pipelines, replicas, weights=weights).rows(batch, micro) for p in range(pipelines)]
    assert sorted(np.concatenate(shares)) == list(range(batch))
    block, placed = -(-batch // micro), []
    if not weights:
        of_first_block = [(rows < block).sum() for rows in shares]
        assert max(of_first_block) - min(of_first_block) <= 1, "balance within one"
    for pipeline, rows in enumerate(shares):
        dataset = tf.data.Dataset.from_tensors((rows, rows))
        laid_out = layout.lay_out(dataset, list(map(len, shares)), pipeline, micro, local)
        found = next(laid_out.as_numpy_iterator())
        share = found.x.shape[-1]
        assert share <= max(1, -(-block // replicas)) or weights, "no more places than needed"
        expected = found.first_row[..., None] + np.arange(share)
        real = found.weight > 0
        np.testing.assert_array_equal(found.x[real], expected[real])
        np.testing.assert_array_equal(real, np.arange(share) < found.rows[..., None])
        for m in range(micro):
            np.testing.assert_array_equal(found.x[:, m][real[:, m]] // block, m, "micro-batches are those of one device")
        placed += list(found.x[real])
    assert sorted(placed) == list(range(batch))


# ---- the input graph ----


@pytest.mark.parametrize(
    ("source", "packing", "where"),
    [
        ("dataset", "joined", "memory"),
        ("many_shards", "padded", "memory"),
        ("many_shards", "joined", "blocks"),
        pytest.param("mixed", "padded", "blocks", marks=pytest.mark.slow),
        pytest.param("many_shards", "padded", "blocks", marks=pytest.mark.slow),
        pytest.param("mixed", "joined", "blocks", marks=pytest.mark.slow),
        pytest.param("mixed", "padded", "memory", marks=pytest.mark.slow),
    ],
)
def test_rows_are_windows_of_the_text_each_once_an_epoch(request, source, packing, where):
    """Against the shards read with NumPy; at any step the same as without a stop."""
    if where == "blocks":
        request.getfixturevalue("in_blocks")
    data = request.getfixturevalue(source)
    config, tokens = settings(packing=packing, shuffle_buffer_mb=1), whole(data)
    epoch = -(-len(tokens) // LENGTH // 8) + 40
    found = elements(data, config, epoch)
    starts = data.splits["train"].starts_and_keys()[:, 0]
    for x, y, *weight, place in found:
        expected = tokens[np.minimum(place[:, None] + np.arange(LENGTH + 1), len(tokens) - 1)]
        real = weight[0] > 0 if weight else np.ones_like(x, bool)
        np.testing.assert_array_equal(x[real], expected[:, :-1][real])
        np.testing.assert_array_equal(y[real], expected[:, 1:][real])
        if packing == "padded":  # a row is of one document, and ends with it
            last = place + real.sum(1)
            np.testing.assert_array_equal(
                np.searchsorted(starts, place, side="right"), np.searchsorted(starts, last, side="right")
            )
            assert (np.diff(real.astype(int), axis=1) <= 0).all()
    if source != "mixed":
        seen = np.concatenate([place for *_, place in found])
        if packing == "joined":
            expected = np.arange((len(tokens) - 1) // LENGTH) * LENGTH
        else:
            lengths = np.diff(np.append(starts, len(tokens))) - 1
            expected = np.concatenate([a + np.arange(0, n, LENGTH) for a, n in zip(starts, lengths, strict=True)])
        np.testing.assert_array_equal(np.sort(seen[: len(expected)]), expected)
        assert (seen[: len(expected)] != expected).any()
    for step in (1, epoch - 30, epoch - 2):
        again = elements(data, config, 2, InputContext(start_step=step))
        for a, b in zip(again, found[step : step + 2], strict=True):
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one, other)


def test_ids_of_four_bytes_are_read(tmp_path, in_blocks):
    """A vocabulary beyond 65,536: from disk in blocks, from memory, for evaluation."""
    tokens = np.random.default_rng(0).integers(0, 70_000, 6000).astype(np.uint32)
    head = np.zeros(256, "<i4")
    head[:3] = 20240801, 7, len(tokens)
    (tmp_path / "x.bin").write_bytes(head.tobytes() + tokens.tobytes())
    values = {"tokenizer": "ids:70000", "model__vocab_size": 70_000, "shuffle": False}
    dataset = shards.open_source(settings(f"bin:{tmp_path}/x.bin", **values).data, tmp_path / "cache")
    assert dataset.splits["train"].shards[0].dtype == "uint32"
    for config in (settings(**values), settings(**values, shuffle_buffer_mb=1 << 30)):
        (x, y, _), *_ = elements(dataset, config, 1)
        np.testing.assert_array_equal(x.ravel(), tokens[: x.size])
        np.testing.assert_array_equal(y.ravel(), tokens[1 : x.size + 1])
        x, y, weight = next(eval_dataset_fn(dataset, config)(InputContext()).as_numpy_iterator())
        assert np.isin(x[weight > 0], tokens[-600:]).all()


@pytest.mark.parametrize("where", ["memory", "blocks"])
def test_resuming_at_a_million_steps_is_like_counting_there(request, dataset, where):
    if where == "blocks":
        request.getfixturevalue("in_blocks")
    order = Order((dataset.splits["train"].tokens - 1) // LENGTH, 3)
    (found,) = places(dataset, settings(shuffle_buffer_mb=1), 1, InputContext(start_step=10**6))
    if where == "memory":
        np.testing.assert_array_equal(found, order.sample(8 * 10**6 + tf.range(8)) * LENGTH)
    else:
        group_bytes = (1 << 20) // 256
        block = group_bytes // 16 // (LENGTH * 2)
        blocks = BlockOrder(order.num_samples, 3, block, group_bytes // ((block * LENGTH + 1) * 2))
        np.testing.assert_array_equal(found, blocks.sample(8 * 10**6 + tf.range(8)) * LENGTH)


@pytest.mark.parametrize(
    ("source", "where", "workers"),
    [
        ("dataset", "memory", (2, 3, 1)),
        ("dataset", "blocks", (2, 3, 1)),
        ("mixed", "memory", (4, 2)),
        pytest.param("mixed", "blocks", (2, 3, 1), marks=pytest.mark.slow),
        pytest.param("dataset", "blocks", (4, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_reads_the_batches_of_one(request, source, where, workers):
    """Token for token over two epochs, also when their number changes at a restart."""
    if where == "blocks":
        request.getfixturevalue("in_blocks")
    data = request.getfixturevalue(source)
    config = settings(shuffle_buffer_mb=1, train__global_batch_size=32, train__accumulate_steps=2)
    steps = 2 * -(-data.splits["train"].tokens // LENGTH // 32)
    expected = elements(data, config, steps)
    bounds = np.linspace(0, steps, len(workers) + 1).astype(int)
    for number, start, end in zip(workers, bounds[:-1], bounds[1:], strict=True):
        contexts = [InputContext(w, number, 2 * number, start) for w in range(number)]
        rows = np.concatenate([context.rows(32, 2) for context in contexts])
        shares = [elements(data, config, end - start, context) for context in contexts]
        for step in range(end - start):
            for part in range(3):
                found = np.concatenate([share[step][part] for share in shares])[np.argsort(rows)]
                np.testing.assert_array_equal(found, expected[start + step][part])


def test_a_ramped_batch_neither_repeats_nor_skips(dataset):
    config = settings(train__batch_ramp="5:16,9:3")
    assert batch_sizes(config) == [(0, 8), (5, 16), (9, 3)]
    assert [p.sample for p in phases(config)] == [0, 40, 104]
    found = np.concatenate([
        places(dataset, config, 5).ravel(),
        *(places(dataset, config, 2, InputContext(start_step=s), 1).ravel() for s in (5, 7)),
        places(dataset, config, 4, InputContext(start_step=9), 2).ravel(),
    ])  # fmt: skip
    flat = places(dataset, settings(), 20).ravel()
    np.testing.assert_array_equal(found, flat[: len(found)])


def test_border_tokens_are_no_targets_when_asked(dataset):
    for x, y, weight, _ in elements(dataset, settings(border_loss=False, shuffle=False), 20):
        np.testing.assert_array_equal(weight, (y != 256).astype(np.float32))
        assert x.shape == y.shape


@pytest.mark.parametrize(
    ("packing", "batch", "where"),
    [
        ("joined", 1, "memory"),
        ("joined", 7, "memory"),
        ("padded", 64, "memory"),
        ("joined", 64, "disk"),
        ("padded", 7, "disk"),
    ],
)
def test_evaluation_counts_every_token_once(request, many_shards, batch, packing, where):
    if where == "disk":
        request.getfixturevalue("in_blocks")
    make = eval_dataset_fn(many_shards, settings(packing=packing, eval__batch_size=batch), "validation")
    tokens = whole(many_shards, "validation")
    found = [row for element in make(InputContext()).as_numpy_iterator() for row in zip(*element, strict=True)]
    seen = sorted((x[w > 0].tobytes(), y[w > 0].tobytes()) for x, y, w in found if w.any())
    starts = np.append(many_shards.splits["validation"].starts_and_keys()[:, 0], len(tokens))
    ranges = [(0, len(tokens))] if packing == "joined" else list(zip(starts[:-1], starts[1:], strict=True))
    expected = []
    for a, b in ranges:
        for start in range(a, b - 1, LENGTH):
            window = tokens[start : min(start + LENGTH + 1, b)].astype(np.int32)
            expected.append((window[:-1].tobytes(), window[1:].tobytes()))
    assert seen == sorted(expected)


def test_a_sequence_longer_than_the_corpus_is_refused(dataset):
    with pytest.raises(DataError, match="data.sequence_length: expected at most"):
        train_dataset_fn(dataset, settings(sequence_length=10**6))


def test_documents_need_a_tokenizer_that_marks_them(dataset):
    bare = dataclasses.replace(dataset, document_start=-1)
    for values in ({"packing": "separated"}, {"border_loss": False}):
        with pytest.raises(DataError, match="expected a tokenizer whose documents have a start"):
            train_dataset_fn(bare, settings(**values))


def test_a_model_with_a_small_vocabulary_is_found(dataset):
    make = eval_dataset_fn(dataset, settings(model__vocab_size=50), "validation")
    with pytest.raises(tf.errors.InvalidArgumentError, match="a token id is not below model.vocab_size=50"):
        next(iter(make(InputContext())))


# ---- policies ----


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 100, 1001])
@pytest.mark.parametrize("policy", ["file", "random", "hash"])
def test_policies_divide_everything(policy, items, workers):
    """Everybody's share by a table: disjoint and complete, because each item has one owner; even within one, but for
    hashes, which are even on average; with fewer items than workers some have nothing."""
    keys = np.array([documents.key_of(f"document {i}") for i in range(items)], np.int64)
    owners = {
        "file": lambda: np.array(sharding.owner_of_files(items, workers), np.int64),
        "random": lambda: sharding.owner_at_random(items, workers, seed=1).numpy() if items else np.zeros(0, np.int64),
        "hash": lambda: np.asarray(sharding.owner_by_hash(keys, workers)),
    }[policy]()
    assert owners.shape == (items,) and ((owners >= 0) & (owners < workers)).all()
    shares = np.bincount(owners, minlength=workers)
    if policy == "hash":
        assert (np.abs(shares - items / workers) <= 5 * np.sqrt(items / workers) + 1).all()
        np.testing.assert_array_equal(owners[: items // 2], sharding.owner_by_hash(keys[: items // 2], workers))
    else:
        assert shares.max() - shares.min() <= 1
    if policy == "random" and items > 100 and workers > 1:
        assert (owners != sharding.owner_at_random(items, workers, seed=2).numpy()).any()


@pytest.mark.parametrize(
    ("policy", "packing"),
    [
        ("hash", "joined"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("file", "padded"), ("random", "padded"), ("replicate", "joined"))
        ),
    ],
)
def test_workers_read_their_share_of_the_corpus_and_all_of_it(many_shards, policy, packing):
    config, workers = settings(sharding=policy, packing=packing, train__global_batch_size=24), 3
    steps = many_shards.splits["train"].tokens // LENGTH // 8 * 2  # nobody has more than two thirds
    found = [places(many_shards, config, steps, InputContext(w, workers)) for w in range(workers)]
    shares = [set(share.ravel()) for share in found]
    if policy == "replicate":
        for share in found[1:]:
            np.testing.assert_array_equal(share, found[0])
        return
    assert not shares[0] & shares[1] and not shares[1] & shares[2] and not shares[0] & shares[2]
    everything = set(places(many_shards, settings(packing=packing), steps * 3).ravel())
    if policy == "file" and packing == "joined":  # the ends of files are cut off
        assert all(len(share) > len(everything) / 6 for share in shares)
    else:
        assert set().union(*shares) == everything
    if policy == "hash":  # a document stays with its worker
        starts = many_shards.splits["train"].starts_and_keys()[:, 0]
        owned = [{int(d) for d in np.searchsorted(starts, list(share), side="right")} for share in shares]
        assert not owned[0] & owned[1] and not owned[1] & owned[2]


def test_a_worker_without_files_takes_part_with_weight_0(dataset):
    """One shard, three workers."""
    config = settings(sharding="file", train__global_batch_size=6)
    weights = [elements(dataset, config, 3, InputContext(w, 3))[2][2] for w in range(3)]
    assert weights[0].all() and not weights[1].any() and not weights[2].any()
    assert weights[0].shape == weights[1].shape


def test_shares_that_cannot_be_are_refused_at_the_start(many_shards, mixed):
    with pytest.raises(DataError, match="replicate: expected as many rows for each of 3 workers, found .2, 3."):
        places(many_shards, settings(sharding="replicate"), 1, InputContext(0, 3))
    with pytest.raises(DataError, match="file: expected a file of each dataset of the mixture for each of 2 workers"):
        places(mixed, settings(sharding="file"), 1, InputContext(1, 2))


def test_policies_that_need_memory_say_so(dataset, in_blocks):
    with pytest.raises(DataError, match="data.sharding=hash: expected a corpus of at most data.shuffle_buffer_mb"):
        places(dataset, settings(sharding="hash"), 1, InputContext(0, 2))


# ---- audit ----


@pytest.mark.parametrize(
    ("policy", "packing"),
    [
        ("batch", "padded"),
        ("file", "joined"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("hash", "padded"), ("random", "joined"), ("replicate", "joined"))
        ),
    ],
)
def test_the_audit_finds_nothing_where_nothing_is(many_shards, policy, packing):
    config = settings(sharding=policy, packing=packing, train__batch_ramp="10:12")
    report = audit.audit(many_shards, config, workers=4, steps=40)
    assert report.exit_code == 0 and not report.violations and report.duplicates == report.gaps == 0
    assert sum(worker.rows for worker in report.workers) == 10 * 8 + 30 * 12
    if packing == "joined":
        assert all(worker.padding == 0 for worker in report.workers)
    text = str(report)
    assert "4 workers" in text and "duplicates: 0, gaps: 0" in text


def test_the_audit_names_the_documents(dataset):
    report = audit.audit(dataset, settings(shuffle=False, train__global_batch_size=2), workers=2, steps=3)
    assert report.workers[0].documents == [0], "its rows are the beginning of the first document"
    padded = audit.audit(dataset, settings(packing="padded", shuffle=False), 2, 400)
    assert padded.workers[0].documents == list(range(27))
    lengths = np.diff(np.append(dataset.splits["train"].starts_and_keys()[:, 0], dataset.splits["train"].tokens)) - 1
    assert all(0 < worker.padding < (-lengths % LENGTH).sum() / lengths.sum() * 2 for worker in padded.workers)


WRONG = {
    "same rows": (lambda make, context: make(InputContext(0, context.pipelines)), "the global batch of step 0"),
    "a step too far": (
        lambda make, context: make(context).skip(1 if context.pipeline else 0),
        "the global batch of step 0 is not that of one worker",
    ),
    "other tokens": (
        lambda make, context: make(context).map(lambda x, y, place: (x + 1, y, place)),
        "are not what the shards hold",
    ),
    "nothing": (
        lambda make, context: make(context).map(lambda x, y, p: (x, y, tf.zeros(tf.shape(x)) * (context.pipelines == 1), p)),
        "worker 0 reads nothing",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_audit_finds_what_was_planted(dataset, name):
    change, expected = WRONG[name]
    config = settings()
    whole_fn = train_dataset_fn(dataset, config, with_places=True)
    report = audit.audit(dataset, config, 2, 5, make=lambda phase: lambda context: change(whole_fn, context))
    assert report.exit_code == 7 and any(expected in text for text in report.violations), report.violations


@pytest.mark.parametrize(
    ("policy", "change", "expected"),
    [
        ("batch", lambda ds: ds.take(3).repeat(), "readings of a sample before its turn"),
        ("hash", lambda ds: ds, "are read by more than one worker"),
        ("random", lambda ds: ds.take(1).repeat(), "are read by more than one worker"),
    ],
)
def test_the_audit_finds_repeated_samples(many_shards, policy, change, expected):
    config = settings(sharding=policy)
    one = train_dataset_fn(many_shards, dataclasses.replace(config, data=settings().data), with_places=True)
    report = audit.audit(many_shards, config, 2, 30, make=lambda _: lambda context: change(one(InputContext(0, 1))).map(
        lambda x, y, place: (x, y, tf.ones_like(x, tf.float32), place)))  # fmt: skip
    assert report.duplicates and any(expected in text for text in report.violations), report.violations


def test_the_audit_on_the_command_line(text_files):
    """A worker without files is a violation: one shard for two."""
    config = ["--config=tests/tiny.py", f"--config.data.source=files:{text_files}/*.txt", "--workers=2", "--steps=10"]
    done = tfdist("data", "audit", *config, "--config.data.sharding=file", "--json")
    assert done.returncode == 7 and "worker 1 reads nothing (data.sharding=file)" in done.stdout, done.stderr


def test_reading_a_range_of_a_large_file_needs_no_memory(tmp_path):
    """4 GB (a sparse file), a few kB of it: in a process of its own, whose largest memory is that of TensorFlow alone."""
    program = """
import resource, sys
from pathlib import Path
import numpy as np, tensorflow as tf
from tfdist.data import samples
from tfdist.data.shards import Shard, Split
path, tokens = Path(sys.argv[1]), 2_000_000_000
np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(tokens,))[-3:] = 7
split = Split((Shard(path, tokens, 128, "uint16", 0),), tokens, 0, 0)
before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
starts = tf.data.Dataset.from_tensor_slices(np.array([0, tokens - 1000], np.int64))
found = [range.tolist() for range in starts.map(lambda s: samples.token_range(split, s, s + 1000)).as_numpy_iterator()]
assert found == [[0] * 1000, [0] * 997 + [7] * 3]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024)
"""
    done = run(["-c", program, str(tmp_path / "large.npy")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 200, "MB"
