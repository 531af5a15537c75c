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
from tfdist.checkpoint.workdir import Workdir
from tfdist.errors import CheckpointError, UserError
from tfdist.train import beginning

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


def edit_manifest(path, change):
    """With its checksum made anew."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(files.sealed(manifest)))


def linked(path):
    path.rename(path.with_name("beside"))
    path.symlink_to("beside")


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
    "files of another form": (lambda p: edit_manifest(p, lambda m: m.update(files=[])), "not a manifest"),
    "a text for a step": (lambda p: edit_manifest(p, lambda m: m.update(step="9")), "not a manifest"),
    "deep JSON": (lambda p: (p / "manifest.json").write_text("[" * 100_000), "nested too deep"),
    "a pipe": (lambda p: ((p / "manifest.json").unlink(), os.mkfifo(p / "manifest.json")), "expected a regular file"),
    "values that are a link": (lambda p: linked(p / "values-00000.bin"), "expected a regular file"),
    "values elsewhere": (
        lambda p: edit_manifest(p, lambda m: m["files"].update({"../step-00000005/values-00000.bin": {}})),
        "not a manifest",
    ),
    "a pipe for a folder": (lambda p: (shutil.rmtree(p), os.mkfifo(p)), "Not a directory"),
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
    (tmp_path / "step-00000009.tmp-0123456789abcdef").mkdir()
    (tmp_path / "step-by-step.tmp-notes").mkdir()
    store.save(tmp_path, 5, ARRAYS, {})
    (tmp_path / "step-by-step.tmp-notes").rmdir()  # the user's own
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
    slices = [
        {"offset": [2, 0], "shape": [2, 2], "file": "values-00000.bin", "byte_offset": 32},
        {"offset": [0, 0], "shape": [2, 2], "file": "values-00000.bin", "byte_offset": 0},
    ]
    edit_manifest(path, lambda manifest: manifest["arrays"]["a"].update(slices=slices))
    np.testing.assert_array_equal(store.latest(tmp_path).arrays()["a"], np.arange(8.0).reshape(4, 2))


def random_boxes(chance, box, at_least):
    """A box cut again and again."""
    found = [box]
    while len(found) < at_least:
        offset, shape = found.pop(chance.randrange(len(found)))
        dim = chance.randrange(len(shape))
        cut = chance.randrange(shape[dim] + 1)
        for start, size in ((0, cut), (cut, shape[dim] - cut)):
            found.append(([*offset[:dim], offset[dim] + start, *offset[dim + 1 :]], [*shape[:dim], size, *shape[dim + 1 :]]))
    return found


def test_slices_that_cover_an_array_once_and_only_those_are_read(tmp_path):
    """Random cuts are put together to what was saved; with a slice away, twice, moved or longer they are refused. The oracle
    counts how often each element is covered."""
    chance, whole = random.Random(0), np.arange(5 * 4 * 6, dtype=np.float32).reshape(5, 4, 6)
    refused = 0
    for step in range(200):
        boxes = random_boxes(chance, ([0, 0, 0], [5, 4, 6]), chance.randrange(1, 9))
        do = chance.randrange(5)
        one = chance.randrange(len(boxes))
        if do == 1:
            del boxes[one]
        elif do == 2:
            boxes.append(boxes[one])
        elif do == 3:
            boxes[one] = ([chance.randrange(5) for _ in range(3)], boxes[one][1])
        elif do == 4:
            boxes[one] = (boxes[one][0], [chance.randrange(5) for _ in range(3)])
        counts = np.zeros([20, 20, 20], int)
        places = [tuple(slice(o, o + n) for o, n in zip(*box, strict=True)) for box in boxes]
        for place in places:
            counts[place] += 1
        path, start, slices = tmp_path / f"step-{step:08d}", 0, []
        content = b"".join(whole[place].tobytes() for place in places)
        for (offset, shape), place in zip(boxes, places, strict=True):
            slices.append({"offset": offset, "shape": shape, "file": "values-00000.bin", "byte_offset": start})
            start += whole[place].nbytes
        store.save(tmp_path, step, {"a": np.frombuffer(content, np.uint8)}, {})
        entry = {"shape": [5, 4, 6], "dtype": "float32", "slices": slices}
        edit_manifest(path, lambda manifest, entry=entry: manifest["arrays"].update(a=entry))
        inside = all(o + n <= size for box in boxes for o, n, size in zip(*box, whole.shape, strict=True))
        if inside and (counts[:5, :4, :6] == 1).all() and counts.sum() == whole.size:
            np.testing.assert_array_equal(store.verify(path).arrays()["a"], whole)
        else:
            refused += 1
            with pytest.raises(CheckpointError, match="not a manifest|exactly once"):
                store.verify(path)
    assert 50 < refused < 180


BAD_ARRAYS = {
    "no slices": {"slices": []},
    "objects": {"dtype": "object"},
    "texts": {"dtype": "<U2"},
    "records": {"dtype": "V8"},
    "dates": {"dtype": "datetime64[ns]"},
    "no type": {"dtype": None},
    "a number for a type": {"dtype": 8},
    "a negative shape": {"shape": [-2, -3]},
    "another shape": {"shape": [3, 3]},
    "a huge shape": {"shape": [1 << 40, 1 << 20]},
    "a huge shape without elements": {"shape": [0, 1 << 62, 1 << 62], "slices": []},
    "a text for a shape": {"shape": "23"},
    "truth values for a shape": {"shape": [True, True]},
    "a list": [],
}


@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_arrays_that_are_none_are_refused_before_memory_is_taken(tmp_path, bad):
    store.save(tmp_path, 5, ARRAYS, {})
    path = store.save(tmp_path, 9, ARRAYS, {})

    def change(manifest):
        entry = manifest["arrays"]["model/a"]
        manifest["arrays"]["model/a"] = {**entry, **BAD_ARRAYS[bad]} if BAD_ARRAYS[bad] else []

    edit_manifest(path, change)
    assert store.latest(tmp_path).step == 5


@pytest.mark.parametrize("piece", [
    {"byte_offset": 1000}, {"byte_offset": -4}, {"byte_offset": 1.0}, {"byte_offset": 4}, {"file": "manifest.json"},
    {"file": "../x"}, {"file": None}, {"offset": [0]}, {"offset": [0, 1]}, {"offset": [-1, 0]}, {"shape": [2, 4]},
])  # fmt: skip
def test_slices_outside_of_their_file_or_array_and_bytes_of_two_arrays_are_refused(tmp_path, piece):
    store.save(tmp_path, 5, ARRAYS, {})
    path = store.save(tmp_path, 9, ARRAYS, {})
    edit_manifest(path, lambda manifest: manifest["arrays"]["model/a"]["slices"][0].update(piece))
    assert store.latest(tmp_path).step == 5


def test_names_that_are_no_steps_are_passed_over(tmp_path):
    """Among them digits that `int` does not take, and steps that Python writes in another way."""
    store.save(tmp_path, 5, ARRAYS, {})
    for name in ("step-²", "step-٣", "step-7", "step-000000007", "step-", "step--0000001", "step-" + "9" * 240):
        (tmp_path / name).mkdir()
    assert store.steps(tmp_path) == [5] and store.latest(tmp_path).step == 5
    with pytest.raises(CheckpointError, match="expected numbers, found x of <U4"):
        store.save(tmp_path, 6, {"x": np.array("text")}, {})
    assert store.steps(tmp_path) == [5]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o007, 0o077])
def test_checkpoints_have_the_modes_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = store.save(tmp_path / "checkpoints", 5, ARRAYS, {})
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (path.parent, path)] == [0o777 & ~umask] * 2
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o666 & ~umask}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "file", "link", "loop"])
def test_what_has_the_name_of_a_step_and_is_no_folder_makes_room(tmp_path, kind):
    """It is passed over, pruned, and overwritten by a save, without a wait and without harm to what a link leads to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes.txt").write_text("precious")
    folder = tmp_path / "checkpoints"
    store.save(folder, 5, ARRAYS, {})
    make = {
        "pipe": os.mkfifo,
        "file": Path.touch,
        "link": lambda p: p.symlink_to(precious),
        "loop": lambda p: p.symlink_to(p),
    }
    for step in (1, 9):
        make[kind](folder / f"step-{step:08d}")
    make[kind](folder / "step-00000002.tmp-0123456789abcdef")
    assert store.latest(folder).step == 5
    assert policy.save(folder, 9, ARRAYS, {}, policy.Keep(2)).is_dir()
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000005", "step-00000009"]
    assert_same(store.latest(folder).arrays())
    assert (precious / "notes.txt").read_text() == "precious"


# ---- the workdir ----


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "report.png"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_workdir_from_elsewhere_cannot_lead_to_other_files(tmp_path, name, kind):
    """Nothing is written through its links, and nothing waits for its pipes."""
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("precious")
    folder.mkdir()
    {"link": lambda p: p.symlink_to(precious), "pipe": os.mkfifo, "folder": Path.mkdir}[kind](folder / name)
    workdir = Workdir(folder)
    begin = workdir.lock if name == ".lock" else lambda: beginning.check_writable(workdir)
    with pytest.raises(UserError, match="cannot write to .*expected a regular file"):
        begin()
    assert precious.read_text() == "precious"


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
        ([10, 20, 30], [10, 20, 30], 90, 0, []),  # they may be all that there is
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
