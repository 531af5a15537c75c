"""TFRecord files with an index, and what is said of a user's dataset before the first step."""

import numpy as np
import pytest
import tensorflow as tf

from tfdist.data import records
from tfdist.errors import DataError, UserError
from tfdist.strategies import input_checks
from tfdist.strategies.base import InputContext

SIZES = (7, 0, 12, 5)


@pytest.fixture
def files(tmp_path):
    """Four files of records 0, 1, 2, ...; one has none."""
    number = 0
    for i, size in enumerate(SIZES):
        with tf.io.TFRecordWriter(str(tmp_path / f"{i}.tfrecord")) as writer:
            for _ in range(size):
                writer.write(str(number).encode() + b" " * (number % 5))
                number += 1
    return tmp_path


def parse(serialised):
    number = tf.strings.to_number(tf.strings.strip(serialised))
    return number, number


def read(folder, context=None, number=None, **options):
    options = {"global_batch_size": 5} | options
    made = records.dataset_fn(folder / "index.json", parse, **options)(context or InputContext())
    return [x.tolist() for x, _ in (made.take(number) if number else made).as_numpy_iterator()]


def indexed(folder, **options):
    return records.index_files(f"{folder}/*.tfrecord", folder / "index.json", **options)


def test_rows_come_in_the_order_of_the_files_on_any_number_of_workers(files):
    assert indexed(files) == 24
    expected = [[float(i % 24) for i in range(5 * step, 5 * step + 5)] for step in range(15)]
    assert read(files, number=15) == expected
    for step in (1, 4, 5, 9, 10):
        assert read(files, InputContext(start_step=step), 2) == expected[step : step + 2]
    shares = [read(files, InputContext(w, 3, start_step=2), 4) for w in range(3)]
    for step in range(4):
        assert sum((share[step] for share in shares), []) == expected[2 + step]
    assert read(files, repeat=False) == [*expected[:4], [20.0, 21.0, 22.0, 23.0]]
    assert read(files, InputContext(1, 2), repeat=False)[-1] == [22.0, 23.0]


def test_files_are_shuffled_anew_in_each_epoch(files):
    indexed(files)
    found = np.concatenate(read(files, number=24, global_batch_size=3, seed=1)).reshape(3, 24)
    assert all(sorted(epoch) == list(range(24)) for epoch in found.tolist())
    assert len({tuple(epoch) for epoch in found.tolist()}) > 1
    later = read(files, InputContext(start_step=11), 3, global_batch_size=3, seed=1)
    np.testing.assert_array_equal(np.concatenate(later), found.ravel()[33:42])


def test_each_worker_reads_its_own_files(files):
    indexed(files)
    shares = [np.concatenate(read(files, InputContext(w, 2), 8, policy="file", global_batch_size=6)) for w in range(2)]
    assert set(shares[0]) == set(range(19)), "files 0 and 2"
    assert set(shares[1]) == set(range(19, 24))
    with pytest.raises(DataError, match="expected records for worker 1 of 4, found none"):
        read(files, InputContext(1, 4), 1, policy="file", global_batch_size=8)


@pytest.mark.parametrize("cut", [1, 17, 20])
def test_a_file_that_was_cut_short_is_found(files, cut):
    """Also at the edge of a record, where TensorFlow reads a shorter file without an error."""
    indexed(files)
    path = files / "2.tfrecord"
    content = path.read_bytes()
    offsets = records._offsets(str(path))
    path.write_bytes(content[: offsets[-3]] if cut == 20 else content[:-cut])
    with pytest.raises(DataError, match=r"expected \d+ bytes of .*2.tfrecord.*cut short"):
        read(files, number=1)
    if cut == 20:
        assert len(list(tf.data.TFRecordDataset(str(path)))) == 10, "no error from TensorFlow"
    else:
        with pytest.raises(DataError, match="expected whole records in .*2.tfrecord, found"):
            indexed(files)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        read(files, number=1)


def test_bad_records_are_refused_or_skipped_and_counted(files, caplog):
    path = files / "2.tfrecord"
    offsets = records._offsets(str(path))
    content = bytearray(path.read_bytes())
    for record in (0, 3, 11):
        content[offsets[record] + 12] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="expected at most 0 bad records, found 3: the first in .*2.tfrecord at byte 0"):
        indexed(files)
    with pytest.raises(DataError, match="expected at most 2 bad records, found 3"):
        indexed(files, on_bad_record="skip", max_bad_records=2)
    assert indexed(files, on_bad_record="skip", max_bad_records=3) == 21
    found = np.concatenate(read(files, repeat=False))
    assert found.tolist() == [i for i in range(24) if i not in (7, 10, 18)]
    assert read(files, InputContext(start_step=2), 1) == [[12.0, 13.0, 14.0, 15.0, 16.0]]


def test_damage_after_the_index_is_an_error_while_reading(files):
    indexed(files)
    path = files / "0.tfrecord"
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(tf.errors.DataLossError):
        read(files, number=2)


@pytest.mark.parametrize("index", [None, "{}", '{"files": [{"x": 1}]}'])
def test_a_bad_index_is_one_line(files, index):
    if index:
        (files / "index.json").write_text(index)
    with pytest.raises(DataError, match="cannot read the index"):
        read(files, number=1)
    with pytest.raises(DataError, match="expected files at"):
        records.index_files(f"{files}/none*", files / "index.json")


# ---- what is said of a dataset before the first step ----


def numbers():
    return tf.data.Dataset.range(40)


def test_a_dataset_that_is_too_short_is_said_at_the_start(caplog):
    input_checks.check_length(numbers().batch(4), start_step=3, num_steps=11, whole=False)
    assert "the dataset has 10 batches from step 3 on, 11 were asked for: this ends at step 13" in caplog.text
    caplog.clear()
    for dataset in (numbers().batch(4), numbers().filter(lambda x: x > 3).batch(4)):  # one does not know its length
        input_checks.check_length(dataset, 0, 10, whole=True)
    assert not caplog.text


def test_an_endless_dataset_where_all_is_read_is_refused():
    with pytest.raises(UserError, match="expected a dataset that ends .*repeats for ever"):
        input_checks.check_length(numbers().repeat().batch(4), 0, 0, whole=True)
    input_checks.check_length(numbers().repeat().batch(4), 0, 5, whole=False)


def test_shapes_that_are_not_known_are_refused_where_they_must_be():
    with pytest.raises(UserError, match="expected elements whose shapes are all known, found .None"):
        input_checks.check_shapes(numbers().batch(3))
    input_checks.check_shapes(numbers().batch(3, drop_remainder=True))


@pytest.mark.parametrize(
    ("make", "pipelines", "refused"),
    [
        (lambda data: data.shuffle(9).shard(2, 0).batch(2), 2, True),
        (lambda data: data.batch(2).shuffle(9).map(lambda x: x).shard(2, 0).prefetch(1), 2, True),
        (lambda data: data.shuffle(9, seed=1).shard(2, 0).batch(2), 2, False),
        (lambda data: data.shard(2, 0).shuffle(9).batch(2), 2, False),
        (lambda data: data.shuffle(9).shard(2, 0).batch(2), 1, False),
    ],
)
def test_a_shuffle_without_a_seed_before_sharding_is_refused(make, pipelines, refused):
    tf.random.set_seed(None)
    context = InputContext(0, pipelines)
    if refused:
        with pytest.raises(UserError, match="expected shuffle.*seed.* before shard"):
            input_checks.check_order(make(numbers()), context)
    else:
        input_checks.check_order(make(numbers()), context)
    tf.random.set_seed(1)  # this fixes the order of all
    input_checks.check_order(make(numbers()), context)
