"""What tfdist starts for itself imports nothing from the current folder; a program of the user's finds its neighbours."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import finish, start

from tfdist import programs

SHADOWS = ("random", "hmac", "secrets", "json", "numpy", "absl", "tfdist")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Full of modules that have the names of others, and leave a file when they are run."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'a').write('{name} ')")
    (tmp_path / "neighbour.py").write_text("answer = 42")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "neighbour.py").write_text("answer = 42")
    (tmp_path / "own" / "program.py").write_text("import neighbour\nprint('the answer is', neighbour.answer)")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tfdist(*arguments: str, limit_s: float = 60.0):
    return finish(start([*programs.module("tfdist.cli")[1:], *arguments]), limit_s)


@pytest.mark.parametrize(
    "arguments",
    [
        ["launch", "--workers=2", "--log_dir=logs", "--", "python", "own/program.py"],
        ["supervise", "--", "python", "own/program.py"],
    ],
)
def test_supervisors_import_nothing_from_the_current_folder(folder, arguments):
    done = tfdist(*arguments)
    assert done.returncode == 0 and "the answer is 42" in done.stdout, done.stderr
    assert not (folder / "was_run").exists(), (folder / "was_run").read_text()


def test_what_is_trained_in_a_cluster_imports_nothing_from_the_current_folder(folder):
    done = tfdist("launch", "--workers=1", "--", "train", "--config=lm_tiny", "--config.train.num_steps=x")
    assert done.returncode == 2 and "num_steps" in done.stderr
    assert not (folder / "was_run").exists(), (folder / "was_run").read_text()


@pytest.mark.slow
def test_verify_and_the_data_service_import_nothing_from_the_current_folder(folder):
    (folder / "own" / "mine.py").write_text(
        "import keras, tfdist\n"
        "def model():\n    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])\n"
        "if __name__ == '__main__':\n    print(tfdist.verify(model, strategies=['multi_worker:2x1'], num_steps=1))\n"
    )
    done = finish(start(["own/mine.py"]), 120)
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr
    service = tfdist("launch", "--workers=1", "--data_workers=1", "--log_dir=logs", "--", "python", "own/program.py")
    assert service.returncode == 0, service.stderr
    assert not (folder / "was_run").exists(), (folder / "was_run").read_text()


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_commands_for_each_python(folder, version):
    command = [*programs.module("json.tool", version), "--help"]
    assert subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    code = programs.code("import sys, random; print(random.randint(1, 1), *sys.argv[1:])")
    assert subprocess.run([*code, "a"], capture_output=True, text=True, timeout=20).stdout == "1 a\n"
    assert not (folder / "was_run").exists()
    plain = [sys.executable, "-c", "import random"]
    assert subprocess.run(plain, timeout=20).returncode == 0 and (folder / "was_run").exists(), "else this shows nothing"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an older Python has no way to say it")
def test_a_build_by_several_processes_imports_nothing_from_the_current_folder(folder):
    (folder / "signal.py").write_text(f"open({str(folder / 'was_run')!r}, 'a').write('signal ')")
    for i in range(3):
        (folder / f"{i}.txt").write_bytes(b"some text \n" * (4 << 20 >> i))
    command = str(Path(sys.executable).parent / "tfdist")  # as a user calls it: `-P` would be passed on by itself
    arguments = ["--source=files:*.txt", "--tokenizer=bytes", "--out=built", "--processes=2"]
    done = finish(start([command, "data", "build", *arguments]), 60)
    assert done.returncode == 0 and not (folder / "was_run").exists(), done.stderr
