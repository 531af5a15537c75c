import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest

from tfdist import files
from tfdist.checkpoint import keys, policy, store
from tfdist.errors import CheckpointError

ARRAYS = {
    "model/a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model/b": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "step": np.array(7, np.int64),
    "empty": np.zeros([0, 3], np.float64),
}


def assert_same(found, expected=ARRAYS):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)


def test_round_trip_with_facts(tmp_path):
    path = store.save(tmp_path, 7, ARRAYS, {"seed": 3})
    assert path.name == "step-00000007"
    found = store.latest(tmp_path)
    assert (found.step, found.manifest["seed"]) == (7, 3)
    assert_same(found.arrays())
    entry = found.manifest["arrays"]["model/a"]
    assert entry["shape"] == [2, 3] and len(entry["slices"]) == 1


def test_no_checkpoint_is_none(tmp_path):
    assert store.latest(tmp_path) is None and store.latest(tmp_path / "missing") is None


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    other = path.with_name("other")  # an inode of its own: times are too coarse to tell it from what was just saved
    other.write_bytes(data)
    other.replace(path)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGE = {
    "a flipped byte": (lambda p: flip_a_byte(p / "values-00000.bin"), "SHA-256 does not match"),
    "a cut file": (lambda p: os.truncate(p / "values-00000.bin", 5), "bytes, found 5"),
    "a missing file": (lambda p: (p / "values-00000.bin").unlink(), "No such file"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: missing"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 40), "not a manifest"),
    "a future format": (
        lambda p: (p / "manifest.json").write_text('{"format": 9, "files": {}, "step": 1, "sha256": ""}'),
        "expected format 1",
    ),
    "an edited manifest": (lambda p: edit(p / "manifest.json", '"byte_offset": 0', '"byte_offset": 4'), "its own SHA-256"),
    "another step's manifest": (lambda p: edit(p / "manifest.json", '"step": 9', '"step": 8'), "its own SHA-256"),
    "a list": (lambda p: (p / "manifest.json").write_text("[]"), "not a manifest"),
    "files of another form": (lambda p: edit(p / "manifest.json", '"size": ', '"sise": '), "not a manifest"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, damage, caplog):
    store.save(tmp_path, 5, ARRAYS, {})
    newest = store.save(tmp_path, 9, ARRAYS, {})
    do, reason = DAMAGE[damage]
    do(newest)
    with caplog.at_level("WARNING", logger="absl"):
        assert store.latest(tmp_path).step == 5
    assert "step-00000009" in caplog.text and reason in caplog.text


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    flip_a_byte(store.save(tmp_path, 5, ARRAYS, {}) / "values-00000.bin")
    with pytest.raises(CheckpointError, match="expected a usable checkpoint") as error:
        store.latest(tmp_path)
    assert error.value.exit_code == 4


@pytest.fixture
def others_folder():
    """A folder for a process without root's rights, which this one gives up meanwhile."""
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    if user == 0:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    subprocess.run(["chmod", "-R", "u+rwx", folder], check=True)
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", [".", "step-00000009", "step-00000009/manifest.json", "step-00000009/values-00000.bin"])
def test_what_may_not_be_read_is_neither_missing_nor_damaged(others_folder, what):
    store.save(others_folder, 5, ARRAYS, {})
    store.save(others_folder, 9, ARRAYS, {})
    store._checksums.clear()  # as in another process
    (others_folder / what).chmod(0o000)
    with pytest.raises(CheckpointError, match="cannot read .*Permission denied"):
        store.latest(others_folder)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(CheckpointError, match="cannot read"):
        store.latest(tmp_path / "checkpoints")


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path):
    (tmp_path / "step-00000009.tmp-abc").mkdir()
    store.save(tmp_path, 5, ARRAYS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_a_disk_that_does_not_take_it_leaves_the_last_good_one(tmp_path):
    store.save(tmp_path, 5, ARRAYS, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            store.save(tmp_path, 9, ARRAYS | {"big": np.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert_same(store.latest(tmp_path).arrays())


def test_slices_are_put_together(tmp_path):
    """The manifest of a sharded save that does not exist yet: two slices of one array."""
    path = store.save(tmp_path, 1, {"a": np.arange(8.0).reshape(4, 2)}, {})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["arrays"]["a"]["slices"] = [
        {"offset": [2, 0], "shape": [2, 2], "file": "values-00000.bin", "byte_offset": 32},
        {"offset": [0, 0], "shape": [2, 2], "file": "values-00000.bin", "byte_offset": 0},
    ]
    manifest["sha256"] = store._manifest_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    np.testing.assert_array_equal(store.latest(tmp_path).arrays()["a"], np.arange(8.0).reshape(4, 2))


@pytest.mark.parametrize(
    ("steps", "damaged", "saved", "last", "every", "deleted"),
    [
        ([1, 2, 3], [], 3, 3, 0, []),
        ([10, 30, 20, 40], [], 40, 2, 0, [10, 20]),
        ([10, 20, 30, 40, 50], [], 50, 1, 20, [10, 30]),
        ([10, 20, 30, 40], [40], 30, 1, 0, [10, 20]),
        ([10, 20, 30, 40, 50], [50, 40], 30, 2, 0, [10]),
        ([10, 20, 30, 40, 50], [50, 40, 20], 30, 3, 0, []),  # fewer good ones than are wanted
        ([10, 20, 30, 40], [20], 40, 2, 0, [10, 20]),
        ([10, 20, 30], [], 10, 1, 0, [20]),
        ([], [], 0, 3, 0, []),
    ],
)
def test_which_checkpoints_are_deleted(steps, damaged, saved, last, every, deleted):
    assert policy.Keep(last, every).to_delete(steps, lambda step: step not in damaged, saved) == deleted


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_pruning_never_deletes_the_last_good_ones(tmp_path, keep_last):
    """Random saves and damage: after each save the newest good ones are all there, among them the one just saved."""
    chance, good = random.Random(keep_last), set()
    for _ in range(60):
        step = chance.randrange(100)
        good.add(int(policy.save(tmp_path, step, ARRAYS, {}, policy.Keep(keep_last)).name.removeprefix("step-")))
        there = set(store.steps(tmp_path))
        assert step in there and set(sorted(good)[-keep_last:]) <= there
        good &= there
        for one in chance.sample(sorted(good), chance.randrange(len(good) + 1)):
            flip_a_byte(tmp_path / f"step-{one:08d}" / "values-00000.bin")
            good.discard(one)


def test_a_checkpoint_is_hashed_once_and_the_one_just_written_never(tmp_path, monkeypatch):
    hashed = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.parent.name) or sha256(path))
    for step in (1, 2, 3):
        policy.save(tmp_path, step, ARRAYS, {}, policy.Keep(2))
    assert store.latest(tmp_path).step == 3 and not hashed
    store._checksums.clear()  # as in another process
    assert [store.latest(tmp_path).step for _ in range(3)] == [3, 3, 3] and hashed == ["step-00000003"]
    for _ in range(2):
        policy.save(tmp_path, 3, ARRAYS, {}, policy.Keep(2))
    assert hashed == ["step-00000003", "step-00000002"]


@pytest.mark.parametrize(
    ("steps", "damaged", "missing", "every", "given_up"),
    [
        ([10, 20, 30], [], 90, 0, [10]),
        ([10, 20, 30], [], 101, 0, [10, 20]),
        ([10, 20, 30], [], 201, 0, []),  # that would not be enough: nothing is given up in vain
        ([10, 20, 30], [30], 150, 0, [10, 30]),
        ([10, 20, 30], [], 90, 10, []),
        ([10, 20, 30], [], 90, 20, [10]),
        ([10, 20, 30], [], 0, 0, []),
        ([], [], 10, 0, []),
    ],
)
def test_which_checkpoints_are_given_up(steps, damaged, missing, every, given_up):
    sizes = dict.fromkeys(steps, 100)
    assert policy.Keep(1, every).to_give_up(sizes, lambda step: step not in damaged, missing) == given_up


ON_A_SMALL_DISK = """
import sys, numpy as np
from pathlib import Path
from tfdist.checkpoint import policy, store
from tfdist.errors import CheckpointError

folder, keep = Path(sys.argv[1]), policy.Keep(9, 30)
for step, size in ((10, 200), (20, 200), (30, 200), (40, 200), (50, 300), (60, 900)):
    try:
        policy.save(folder, step, {"a": np.zeros(size << 10, np.uint8)}, {}, keep)
    except CheckpointError as error:
        print(error)
    print(step, sorted(store.steps(folder)), store.latest(folder).step)
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0, reason="this user may not mount"
)
def test_a_full_disk_takes_the_next_checkpoint_in_place_of_old_ones(tmp_path):
    """One MB: the oldest ones go, but not that which was promised, nor any for a save that would not fit anyway."""
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && exec "
    command = [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} "$@"', "sh", *command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "10 [10] 10",
        "20 [10, 20] 20",
        "30 [10, 20, 30] 30",
        "40 [10, 20, 30, 40] 40",
        "50 [20, 30, 40, 50] 50",
        f"checkpoint: cannot write {tmp_path}/step-00000060: No space left on device",
        "60 [20, 30, 40, 50] 50",
    ]
    assert done.stderr.count("is given up for the next one") == 1 and "step-00000010 is given up" in done.stderr


# ---- keys ----


def functional():
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(2)])
    return keras.Model(inputs, inner(keras.layers.BatchNormalization()(keras.layers.Dense(3)(inputs))))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self._hidden = [keras.layers.Dense(2), keras.layers.Dense(2)]
        self.by_name = {"rnn": keras.layers.Bidirectional(keras.layers.GRU(3))}
        self.first = self.add_weight(shape=(2,), name="w")
        self.second = self.add_weight(shape=(2,), name="w")
        self.build((None, 5, 4))

    def build(self, shape):
        self._hidden[0].build(shape)
        self._hidden[1].build((None, 5, 2))
        self.by_name["rnn"].build((None, 5, 2))
        self.built = True


@pytest.mark.parametrize("make", [functional, Subclassed])
def test_model_keys_are_complete_unique_and_the_same_for_a_second_build(make):
    model, again = make(), make()
    found = keys.model_keys(model)
    assert {id(v) for v in found.values()} == {id(v) for v in model.weights}
    assert list(found) == list(keys.model_keys(again))


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.AdamW, keras.optimizers.Adafactor, keras.optimizers.Lion,
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
    ],
)  # fmt: skip
def test_optimizer_keys_follow_the_model(optimizer):
    model, opt = functional(), optimizer()
    opt.build(model.trainable_variables)
    found = keys.optimizer_keys(opt, model)
    assert {id(v) for v in found.values()} == {id(v) for v in opt.variables}
    slots = [key for key in found if "/" in key]
    assert slots and not any(key.startswith("variables/") for key in slots)
    names = set(keys.model_keys(model))
    assert all(key.partition("/")[2] in names for key in slots)
