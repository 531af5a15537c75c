"""Folders from elsewhere: whatever is in them, every command ends within seconds with one line and code 2, 3 or 4, or takes
an older good checkpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest
from processes import run, run_forked

from tfdist import config

FUZZ = str(Path(__file__).parent / "fuzz.py")


def fuzzed(kind: str, count: int, seed: int = 0) -> dict:
    begin = run if kind == "datasets" else run_forked  # no TensorFlow
    done = begin([FUZZ, kind, str(count), str(seed)], limit_s=60 + count)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(kind, count, found["ended"], f"slowest {found['slowest_s']} s")
    assert not found["num_wrong"], "\n".join(found["wrong"])
    assert kind == "datasets" or found["heard"] >= found["ended"]["older"]
    assert set(found["ended"]) <= {"good", "older", "2", "3", "4"} and sum(found["ended"].values()) == count
    return found["ended"]


@pytest.mark.parametrize(("kind", "count"), [("manifests", 88), ("fits", 12), ("datasets", 100)])
def test_damage_of_every_kind_ends_in_one_line(kind, count):
    ended = fuzzed(kind, count)
    assert ended.get("good", 0) < count / 3 and (kind == "datasets" or ended["older"] > count / 5), ended


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "count"), [("manifests", 1200), ("fits", 300), ("datasets", 1500)])
def test_damage_of_every_kind_ends_in_one_line_again_and_again(kind, count):
    fuzzed(kind, count, seed=1)


CONFIG = json.loads(config.to_json(config.Config()))
CONFIGS = {
    "a pipe": os.mkfifo,
    "a device": lambda p: p.symlink_to("/dev/zero"),
    "a link": lambda p: (p.with_name("other").write_text(json.dumps(CONFIG)), p.symlink_to("other")),
    "a folder": Path.mkdir,
    "deep": lambda p: p.write_text("[" * 100_000),
    "no text": lambda p: p.write_bytes(b"\xff\xfe"),
    "a list": lambda p: p.write_text("[]"),
    "cut": lambda p: p.write_text(json.dumps(CONFIG)[:99]),
    "a text for a number": lambda p: p.write_text(json.dumps(CONFIG | {"model": {"num_layers": "4"}})),
    "a huge number": lambda p: p.write_text(json.dumps(CONFIG | {"model": {"num_layers": 10**400}})),
    "an object for a text": lambda p: p.write_text(json.dumps(CONFIG | {"data": {"source": {"x": 1}}})),
    "control characters": lambda p: p.write_text(json.dumps(CONFIG | {"data": {"\x1b[31m\n" * 999: 1}})),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_from_elsewhere_is_one_line(tmp_path, kind):
    CONFIGS[kind](tmp_path / "config.json")
    done = run(["-m", "tfdist.cli", "eval", f"--workdir={tmp_path}"], limit_s=20)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("tfdist: ") and line.isprintable() and len(line) <= 500, done.stderr
    assert "config.json" in line


def test_each_value_of_a_config_has_its_type():
    values = (None, [], {}, "x" * 999, "\x1b", 1 << 70, True, -1.5, 7)
    for section, name, value in ((s, n, v) for s, fields in CONFIG.items() for n in fields for v in values):
        default, text = CONFIG[section][name], json.dumps({section: {name: value}})
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if fits and value != 1 << 70:
            assert getattr(getattr(config.from_json(text), section), name) == value
        else:
            with pytest.raises(ValueError, match=f"{section}.{name}: expected a value of ") as error:
                config.from_json(text)
            assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_a_dataset_from_elsewhere_is_one_line_of_the_command(text_files, tmp_path):
    """What a user sees; `fuzz.py` has the cases."""
    out = tmp_path / "built"
    build = ["-m", "tfdist.cli", "data", "build", f"--source=files:{text_files}/*.txt", f"--out={out}"]
    assert run(build).returncode == 0
    for damage in (lambda p: p.write_text("[" * 100_000), lambda p: (p.unlink(), os.mkfifo(p)), shutil.rmtree):
        damage(out if damage is shutil.rmtree else out / "dataset.json")
        done = run(["-m", "tfdist.cli", "data", "inspect", str(out)], limit_s=20)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 3 and line.startswith("tfdist: data: ") and len(line) <= 500, done.stderr
