"""The command line, in real processes: the whole path, stops and restarts, and every bad input as one line."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from processes import finish, fork, run, run_forked, start, tfdist

from tfdist.checkpoint import store
from tfdist.metrics.writers import read_rows
from tfdist.models.transformer import TransformerLM

CONFIG = f"--config={Path(__file__).parent / 'tiny.py'}"


@pytest.fixture(scope="module")
def source(text_files):
    return f"--config.data.source=files:{text_files}/*.txt"


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A run that was never stopped. Tests read it, or copy it."""
    workdir = tmp_path_factory.mktemp("finished")
    done = tfdist("train", CONFIG, source, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done


def losses(workdir) -> dict[int, str]:
    return {row["step"]: row["loss_hex"] for row in read_rows(workdir / "metrics.jsonl", "train")}


def assert_one_line(done, code, *parts):
    assert done.returncode == code, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("I0000", "E0000", "WARNING: All"))]
    assert len(lines) == 1 and lines[0].startswith("tfdist: "), done.stderr
    for part in parts:
        assert part in lines[0], (part, lines[0])


# ---- instant answers ----


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "tfdist train"),
        (["train", "--help"], 0, "fresh"),
        ([], 2, "tfdist train"),
        (["trian"], 2, "did you mean train?"),
        (["train"], 2, "expected --config=FILE.py"),
        (["train", CONFIG, "--config.modle.num_layers=3"], 2, "did you mean model.num_layers"),
        (["train", CONFIG, "--config.train.num_stpes=3"], 2, "did you mean train.num_steps"),
        (["train", CONFIG, "--config.train.num_steps=many"], 2, "train.num_steps=many"),
        (["train", CONFIG, "--config.train.global_batch_size=0"], 2, "expected at least 1, found 0"),
        (["train", CONFIG, "--config.train.global_batch_size=-4"], 2, "expected at least 1, found -4"),
        (["train", CONFIG, "--wrkdir=x"], 2, "did you mean workdir"),
        (["train", CONFIG, "oops"], 2, "unexpected argument 'oops'"),
        (["train", "--config=nowhere.py"], 2, "found no file 'nowhere.py'"),
        (["train", "--config=elsewhere/lm_tiny.py"], 2, "did you mean lm_tiny?"),
        (["verify", "--config", "lm_tiny", "oops"], 2, "unexpected argument 'oops'"),
        (["train", CONFIG, "--num_steps=3"], 2, "did you mean config.train.num_steps"),
        (["eval"], 2, "expected --workdir=FOLDER"),
        (["eval", "--workdir=nowhere"], 2, "expected the folder of a run"),
        (["generate", "--workdir=nowhere", "--prompt=x"], 2, "expected the folder of a run"),
    ],
)
def test_help_and_usage_errors_are_instant_and_one_line(arguments, code, expected):
    done = run(["-X", "importtime", "-m", "tfdist.cli", *arguments])
    imported = re.findall(r"\|\s+(\S+)$", done.stderr, re.MULTILINE)
    assert "absl.app" in imported and not {"tensorflow", "keras", "numpy"} & set(imported)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code and expected in "\n".join([done.stdout, *errors])
    assert len(errors) == (1 if code and arguments else 0), errors


@pytest.mark.timed
def test_help_takes_less_than_the_promised_time():
    best_s = float("inf")
    for _ in range(5):
        started_s = time.perf_counter()
        run(["-m", "tfdist.cli", "--help"])
        best_s = min(best_s, time.perf_counter() - started_s)
    assert best_s < 0.4


# ---- the whole path ----


def test_a_run_leaves_what_it_promises(finished):
    workdir, done = finished
    for name in ("config.json", "metrics.jsonl", "tensorboard", "report.png", "samples/step-00000030.txt"):
        assert (workdir / name).exists(), name
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [
        "step-00000010", "step-00000020", "step-00000030",
    ]  # fmt: skip
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.*"))
    assert "MFU = tokens/s x" in done.stdout and done.stdout.count("MFU = ") == 1
    assert "sample:" in done.stdout and f"tfdist generate --workdir={workdir}" in done.stdout
    assert "bits per byte" in done.stderr and "Traceback" not in done.stderr

    rows = read_rows(workdir / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, 31))
    fields = [
        "loss",
        "loss_hex",
        "grad_norm",
        "learning_rate",
        "tokens",
        "tokens_per_s",
        "step_time_s",
        "data_wait_s",
        "mfu",
    ]
    for row in rows:
        assert set(fields) <= set(row) and float.fromhex(row["loss_hex"]) == row["loss"] and row["tokens"] == 8 * 32
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    evals = read_rows(workdir / "metrics.jsonl", "eval")
    assert [row["step"] for row in evals] == [15, 30]
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= set(evals[-1])
    manifest = json.loads((workdir / "checkpoints/step-00000030/manifest.json").read_text())
    assert manifest["step"] == 30 and {"seed", "config_hash", "data_hash", "versions", "arrays", "files"} <= set(manifest)


@pytest.mark.parametrize(
    ("number", "at_step"), [(signal.SIGTERM, 12), pytest.param(signal.SIGINT, 3, marks=pytest.mark.slow)]
)
def test_a_run_that_is_told_to_stop_goes_on_with_the_same_numbers(finished, source, tmp_path, number, at_step):
    arguments = [
        "-m",
        "tfdist.cli",
        "train",
        CONFIG,
        source,
        f"--workdir={tmp_path}",
        "--config.train.steps_per_loop=1",
    ]
    process = start(arguments)
    deadline_s = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < at_step:
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert finish(process).returncode == 143
    stopped = max(losses(tmp_path))
    assert at_step <= stopped < 30
    done = tfdist("train", CONFIG, source, f"--workdir={tmp_path}", "--config.train.steps_per_loop=5")
    assert done.returncode == 0 and f"restore at step {stopped}" in done.stderr
    assert losses(tmp_path) == losses(finished[0])


def test_two_replicas_log_the_losses_of_one(finished, source, tmp_path):
    mirrored = ["--config.strategy.kind=mirrored", "--config.strategy.num_devices=2"]
    done = tfdist("train", CONFIG, source, *mirrored, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for step, expected in losses(finished[0]).items():
        found = losses(tmp_path)[step]
        assert abs(float.fromhex(found) - float.fromhex(expected)) < 2e-5, step  # float32, dropout on
    on_two = tfdist("eval", *mirrored, f"--workdir={finished[0]}", "--config.eval.batch_size=7").stdout
    on_one = tfdist("eval", f"--workdir={finished[0]}", "--config.eval.batch_size=3").stdout
    numbers = [re.findall(r"[\d.]+", text) for text in (on_one, on_two)]
    assert numbers[0][-1:] == numbers[1][-1:] and "tokens" in on_one  # every token counted once
    assert float(numbers[0][1]) == pytest.approx(float(numbers[1][1]), abs=2e-6)
    logged = read_rows(finished[0] / "metrics.jsonl", "eval")[-1]
    assert float(numbers[0][1]) == pytest.approx(logged["loss"], abs=2e-6)


@pytest.mark.slow
def test_a_run_with_averages_is_evaluated_and_exported_with_them(source, tmp_path):
    averages = ["--config.optimizer.ema_momentum=0.9", "--config.train.num_steps=20", "--config.train.label_smoothing=0.1"]
    done = tfdist("train", CONFIG, source, *averages, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0 and "each replica holds parameters" in done.stdout, done.stderr
    logged = read_rows(tmp_path / "run/metrics.jsonl", "eval")[-1]
    found = float(re.findall(r"[\d.]+", tfdist("eval", f"--workdir={tmp_path / 'run'}").stdout)[1])
    assert found == pytest.approx(logged["loss"], abs=2e-6)
    tfdist("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path}/model.keras")
    exported = keras.saving.load_model(tmp_path / "model.keras").get_weights()
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-00000020")
    arrays = store.latest(checkpoint.parent).arrays()
    trained = [array for key, array in arrays.items() if key.startswith("model/")]
    kept = [array for key, array in arrays.items() if "moving_average/" in key]
    assert all(any(np.array_equal(array, one) for one in kept) for array in exported)
    assert not all(any(np.array_equal(array, one) for one in trained) for array in exported)


def test_generate_and_export(finished, tmp_path):
    workdir, _ = finished
    generate = ["generate", f"--workdir={workdir}", "--prompt=the ", "--num_tokens=12"]
    text = tfdist(*generate, "--seed=1").stdout
    assert text.startswith("the ") and len(text) > len("the ")
    done = tfdist("export", f"--workdir={workdir}", f"--out={tmp_path}/model.keras")
    assert done.returncode == 0, done.stderr
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(model, TransformerLM) and f"{model.count_params():,} parameters" in done.stdout
    assert_one_line(tfdist("export", f"--workdir={workdir}", "--out=model.h5"), 2, "expected a file name ending in .keras")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("command", ["eval", "generate", "export"])
def test_a_workdir_of_another_user_says_what_it_asks_for_and_is_read_with_trust(finished, text_files, tmp_path, command):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    os.chown(workdir / "config.json", 65534, -1)
    source = f"files:{text_files}/*.txt"
    cache = f"--config.data.cache_dir={tmp_path}/cache"  # what the command line says does not make it one's own
    arguments = [command, f"--workdir={workdir}", *([f"--out={tmp_path}/m.keras"] if command == "export" else [])]
    for more in ([], [cache]):
        done = tfdist(*arguments, *more)
        assert_one_line(done, 2, "belongs to another user (number 65534)", source[:20], "--trust reads them")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["cache_dir"] = str(tmp_path / "theirs")
    (workdir / "config.json").write_text(json.dumps(config))
    assert_one_line(tfdist(*arguments), 2, f"data.cache_dir='{tmp_path}/theirs'")
    assert not (tmp_path / "theirs").exists() and not (tmp_path / "m.keras").exists()
    trusts, env = {"eval": (["--trust"], {}), "generate": ([], {"SUDO_UID": "65534"})}.get(command, (["--trust"], {}))
    done = tfdist(*arguments, *trusts, env=env)  # who became root with sudo has workdirs of one's own
    assert done.returncode == 0 and (tmp_path / "theirs").exists() == (command == "eval"), done.stderr


@pytest.mark.slow
def test_start_from_the_weights_of_another_run(finished, source, tmp_path):
    other = [f"--config.train.init_from={finished[0]}", "--config.train.num_steps=1", "--config.train.seed=5"]
    done = tfdist("train", CONFIG, source, f"--workdir={tmp_path}", *other)
    assert done.returncode == 0, done.stderr
    first = float.fromhex(losses(tmp_path)[1])
    assert first < float.fromhex(losses(finished[0])[1]) - 1
    assert tfdist("export", f"--workdir={finished[0]}", f"--out={tmp_path}/m.keras").returncode == 0
    other[0] = f"--config.train.init_from={tmp_path}/m.keras"
    assert tfdist("train", CONFIG, source, f"--workdir={tmp_path / 'from_file'}", *other).returncode == 0
    assert losses(tmp_path / "from_file")[1] == losses(tmp_path)[1]
    larger = ["--config.model.model_dim=32", f"--workdir={tmp_path / 'x'}", f"--config.train.init_from={finished[0]}"]
    assert_one_line(tfdist("train", CONFIG, source, *larger), 4, "does not fit the model")


# ---- bad input ----


@pytest.mark.slow
def test_a_ramped_batch_in_subwords_and_packed_documents(source, tmp_path):
    """Evaluated at the border too; done steps cannot be changed, later ones can; the run keeps its tokenizer."""
    arguments = [
        source, f"--workdir={tmp_path}/run", "--config.data.tokenizer=bpe:300", "--config.model.vocab_size=300",
        "--config.data.packing=separated", "--config.eval.every_steps=10", "--config.train.num_steps=30",
    ]  # fmt: skip
    done = tfdist("train", "--config=tests/tiny.py", *arguments, "--config.train.batch_ramp=10:12,20:6")
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["tokens"] // 32 for row in rows] == [8] * 10 + [12] * 10 + [6] * 10
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl", "eval")] == [10, 20, 30]
    more = ["--config.train.num_steps=40", "--config.train.batch_ramp"]
    refused = tfdist("train", "--config=tests/tiny.py", *arguments, *more[:1], more[1] + "=10:16,20:6")
    assert_one_line(refused, 2, "train.batch_ramp: expected '10:12,20:6' up to step 30", "only later steps may change")
    done = tfdist("train", "--config=tests/tiny.py", *arguments, *more[:1], more[1] + "=10:12,20:6,35:16")
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["tokens"] // 32 for row in rows[30:]] == [6] * 5 + [16] * 5
    text = tfdist("generate", f"--workdir={tmp_path}/run", "--prompt=the quick", "--num_tokens=9")
    assert text.returncode == 0 and text.stdout.startswith("the quick"), text.stderr


def test_a_config_that_does_not_fit_the_workdir_names_the_fields(finished, source):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    changed = ["--config.train.seed=3", "--config.model.dropout=0.0"]
    done = tfdist("train", CONFIG, source, f"--workdir={workdir}", *changed)
    assert_one_line(done, 2, "train.seed was 0, now 3", "model.dropout was 0.1, now 0.0", "--fresh")
    assert (workdir / "config.json").read_bytes() == before


def test_other_data_under_the_same_name_is_refused(finished, source, text_files, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    extra = text_files / "zz.txt"
    extra.write_text("more text\n" * 10)
    try:
        assert_one_line(tfdist("train", CONFIG, source, f"--workdir={workdir}"), 2, "data_hash: expected")
    finally:
        extra.unlink()


@pytest.mark.slow
def test_fresh_starts_anew_and_loses_nothing(finished, source, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    few = ["--config.train.num_steps=2", "--config.train.seed=9"]
    done = tfdist("train", CONFIG, source, f"--workdir={workdir}", "--fresh", *few)
    assert done.returncode == 0, done.stderr
    assert set(losses(workdir)) == {1, 2} and set(losses(workdir / "old-1")) == set(range(1, 31))


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_and_all_damaged_is_code_4(finished, source, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    values = sorted((workdir / "checkpoints").glob("*/values-*.bin"))
    os.truncate(values[-1], 100)
    done = tfdist("train", CONFIG, source, f"--workdir={workdir}")
    assert done.returncode == 0 and "skipping a damaged checkpoint" in done.stderr and "step-00000030" in done.stderr
    assert losses(workdir) == losses(finished[0])
    for path in (workdir / "checkpoints").glob("*/values-*.bin"):
        os.truncate(path, 100)
    done = tfdist("train", CONFIG, source, f"--workdir={workdir}")
    assert done.returncode == 4 and "expected a usable checkpoint" in done.stderr.splitlines()[-1]


def test_checkpoints_that_are_gone_are_code_4_and_the_config_stays(finished, source, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir, ignore=shutil.ignore_patterns("checkpoints"))
    before = (workdir / "config.json").read_bytes()
    done = tfdist("train", CONFIG, source, f"--workdir={workdir}", "--config.train.seed=9")
    assert_one_line(done, 4, "expected that of step 30", "--fresh")
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "code"), [("checkpoints", 4), ("samples", 2), ("metrics.jsonl", 4), ("report.png", 2), ("config.json", 2)]
)
def test_what_the_end_of_a_run_needs_is_tried_before_it_begins(source, tmp_path, name, code):
    path = tmp_path / name
    path.mkdir() if "." in name else path.write_text("in the way")
    done = tfdist("train", CONFIG, source, f"--workdir={tmp_path}")
    assert_one_line(done, code, "cannot", str(path))


def test_what_cannot_be_written_after_the_last_save_is_a_warning(source, tmp_path):
    """A folder that is put in the way of the report while the run trains."""
    process = fork(["-m", "tfdist.cli", "train", CONFIG, source, f"--workdir={tmp_path}"])
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "step-00000010").exists():
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.01)
    (tmp_path / "report.png").mkdir()
    done = finish(process)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "report.png: Is a directory" in done.stderr and max(losses(tmp_path)) == 30


def test_a_workdir_in_use_is_refused(source, tmp_path):
    more = ["--config.train.num_steps=100000"]
    first = start(["-m", "tfdist.cli", "train", CONFIG, source, f"--workdir={tmp_path}", *more])
    try:
        deadline_s = time.monotonic() + 60
        while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert_one_line(tfdist("train", CONFIG, source, f"--workdir={tmp_path}", *more), 6, "in use by another run")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "env", "code", "expected"),
    [
        ([], {"KERAS_BACKEND": "jax"}, 2, "KERAS_BACKEND: expected tensorflow, found 'jax'"),
        ([], {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'}, 2, "TF_CONFIG: task: missing"),
        (["--config.data.source=files:/nowhere/*.txt"], {}, 3, "found none"),
        (["--config.strategy.kind=tpu"], {}, 2, "TPU: not there yet"),
        _slow(["--config.data.source=shards:/nowhere"], {}, 3, "expected a token dataset"),
        _slow(["--config.data.source=ftp://x"], {}, 3, "expected stdlib, files:GLOB"),
        _slow(["--config.data.sequence_length=100000"], {}, 3, "data.sequence_length: expected at most"),
        _slow(["--config.model.vocab_size=100"], {}, 3, "model.vocab_size: expected at least 258"),
        _slow(
            ["--config.strategy.kind=multi_worker"], {}, 2, "TF_CONFIG: not set; strategy.kind=multi_worker needs a cluster"
        ),
    ],
)
def test_bad_input_is_one_line_with_its_code(source, tmp_path, arguments, env, code, expected):
    begin = run if "KERAS_BACKEND" in env else run_forked
    done = begin(["-m", "tfdist.cli", "train", CONFIG, source, f"--workdir={tmp_path / 'run'}", *arguments], env)
    assert_one_line(done, code, expected)
