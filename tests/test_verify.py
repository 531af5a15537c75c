"""`tfdist.verify` says that what is equal is equal, and finds and names what was planted (planted.py)."""

import os
import sys

import numpy as np
import planted
import pytest
from processes import run, run_forked, tfdist

from tfdist.errors import UserError
from tfdist.verification import compare, subject
from tfdist.verification.run import verify

BUGS = {  # planted bug -> (the first tensor that differs, a word of the likely cause)
    "clip_before_reduce": ("grad_norm", "clipping order"),
    "mean_of_means": ("loss", "weighting"),
    "same_dropout_seed": ("loss", "seed of dropout"),
    "unsynchronised_batch_norm": ("loss", "statistics"),
    "double_all_reduce": ("grad_norm", "gradients count 2 times"),
    "lost_accumulation": ("grad_norm", "accumulation"),
    "stale_ema": ("moving_average", "moving average"),
    "shifted_data": ("loss", "data: the batch of step 1"),
}


@pytest.fixture
def in_forks(monkeypatch):
    """Records in forks: what is planted is not in how processes start."""

    def record(program, strategy):
        done = run_forked(program[program.index("-m") :])
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr("tfdist.verification.run._finish", record)


def run_verify(strategy="mirrored:2", model=planted.build, loss=planted.loss, **options):
    return verify(
        model, planted.data, loss, optimizer_fn=planted.optimizer, strategies=[strategy], num_steps=3,
        **planted.OPTIONS | options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_named(bug, monkeypatch, in_forks):
    monkeypatch.setenv("PLANT", bug)
    report = run_verify()
    tensor, cause = BUGS[bug]
    one_device, mirrored = report.results
    assert one_device.equal and not mirrored.equal and report.exit_code == 7
    assert mirrored.difference.step == 1 and tensor in mirrored.difference.tensor
    assert [cause in text for text in mirrored.causes] == [True], mirrored.causes
    assert "DIFFERS" in str(report) and cause in str(report)


def test_what_is_equal_is_equal():
    """Every feature at once, a stock layer of random numbers, no bug. Functions may be given by name."""
    report = run_verify(model="planted:with_stock_dropout", loss=planted.loss_of_equal_types)  # of float32 data, in float64
    assert report.equal and report.exit_code == 0 and "DIFFERS" not in str(report)
    assert report.results[1].variables < 1e-12
    assert report.switched_off == ("dropout",) and "switched off" in str(report)


@pytest.mark.slow
def test_a_seed_that_stock_layers_share_is_named(monkeypatch, in_forks):
    monkeypatch.setenv("PLANT", "same_seed_in_stock_layers")
    report = run_verify(model=planted.with_stock_dropout)
    assert "seed: replicas draw the same" in str(report) and report.exit_code == 7


@pytest.mark.slow
def test_every_feature_on_two_workers():
    """With batch normalisation, dropout and accumulation, whose rows must be those of one device."""
    report = run_verify(strategy="multi_worker:2x1")
    assert report.equal, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "own"])
def test_other_precisions(dtype, in_forks):
    report = run_verify(dtype=dtype)
    assert report.equal and report.tolerances[0] == (1e-6 if dtype == "own" else 3e-2), str(report)


@pytest.mark.slow
def test_a_model_alone_is_enough():
    report = verify(planted.with_stock_dropout, strategies=["multi_worker:2x1"], num_steps=3, dtype="float32")
    assert report.equal and [r.num_replicas for r in report.results] == [1, 2]


def test_the_command_line(text_files, tmp_path):
    arguments = ["verify", "--config=tests/tiny.py", f"--config.data.source=files:{text_files}/*.txt", "--steps=2"]
    done = tfdist(*arguments, "--strategies=mirrored:2", "--config.optimizer.ema_momentum=0.9", "--config.train.z_loss=1e-3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one_device" in done.stdout and "mirrored:2" in done.stdout and done.stdout.count("equal") == 2
    assert "left out, their true gradient is zero" in done.stdout and "attention/key/bias" in done.stdout


@pytest.mark.slow
def test_the_command_line_ends_with_7_where_runs_differ(text_files, tmp_path):
    """The bug is planted in the recording processes, which import `sitecustomize` like any Python."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'tfdist.verification.record' in sys.orig_argv: import planted"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.path.dirname(__file__)]), "PLANT": "lost_accumulation"}
    arguments = ["--config=tests/tiny.py", f"--config.data.source=files:{text_files}/*.txt", "--strategies=mirrored:2"]
    fewer_suspects = ["--config.model.dropout=0.0", "--config.train.clip_norm=0.0"]
    done = tfdist("verify", *arguments, *fewer_suspects, "--steps=1", env=env)
    assert done.returncode == 7, done.stderr[-3000:]
    assert "DIFFERS" in done.stdout and "accumulation" in done.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["--strategies=mirrored"],
            "strategies: expected one_device, mirrored:2, multi_worker:2x1 and the like, found 'mirrored'",
        ),
        (["--steps=0"], "flag --steps=0"),
        (["--dtype=float8"], "flag --dtype=float8"),
        (["--config=nowhere.py"], "found no file 'nowhere.py'"),
    ],
)
def test_usage_errors_are_one_line(given, expected):
    config = [] if any("config" in argument for argument in given) else ["--config=tests/tiny.py"]
    done = tfdist("verify", *config, *given)
    lines = [line for line in done.stderr.splitlines() if line.startswith("tfdist: ")]
    assert done.returncode == 2 and len(lines) == 1 and expected in lines[0], done.stderr


# ---- functions that other processes can import ----


def test_functions_that_cannot_be_imported_are_refused():
    def inside():
        return None

    for function, hint in (
        (inside, "define it at the top level of a module"),
        (lambda: None, "define it at the top level of a module"),
        ("planted", "write it as module:name"),
        ("planted:nothing", "no attribute 'nothing'"),
        ("no_such_module:f", "No module named"),
        ("planted:OPTIONS", "name a function"),
    ):
        with pytest.raises(UserError, match=hint):
            verify(function)
    with pytest.raises(UserError, match="verify: expected options of"):
        verify(planted.build, clipnorm=1.0)


def test_a_function_of_a_notebook_is_refused_with_the_hint(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)

    def model_fn():
        return None

    model_fn.__module__, model_fn.__qualname__ = "__main__", "model_fn"
    with pytest.raises(UserError, match="defined in a notebook or an interactive session; write it into a file"):
        subject.name_of(model_fn, "model_fn")


SCRIPT = """
import keras, tfdist

def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])

{guard}print(tfdist.verify(model, strategies=["one_device"], num_steps=1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("guard", ['if __name__ == "__main__":\n    ', ""])
def test_a_script_may_verify_its_own_function_behind_a_guard(tmp_path, guard):
    script = tmp_path / "own.py"
    script.write_text(SCRIPT.format(guard=guard))
    done = run([str(script)], limit_s=120)
    if guard:
        assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]
    else:
        assert done.returncode and "call it under `if __name__" in done.stderr


# ---- the comparison itself ----


def recording(values, losses=(0.0, 1.0, 1.0), rows=((1, 2), (3, 4)), noise=()):
    outputs = {name: np.array(losses) for name in ("loss", "grad_norm", "tokens", "evaluation")}
    arrays = {name: np.asarray(value, float) for name, value in values.items()}
    return compare.Recording(arrays, outputs, [list(r) for r in rows], (), (), noise)


def test_the_first_step_and_tensor_are_named():
    one = recording({"model/a": [[[1, 2]], [[3, 4]], [[5, 6]]], "model/b": [[[0]], [[0]], [[0]]]})
    two = recording(
        {"model/a": [[[1, 2]] * 2, [[3, 4]] * 2, [[5, 6], [5, 6.6]]], "model/b": [[[0]] * 2, [[0]] * 2, [[0]] * 2]}
    )
    found = compare.first_difference(one, two, (1e-9, 1e-9))
    assert (found.step, found.tensor, found.replica) == (2, "model/a", 1)
    assert found.amount == pytest.approx(0.1) and compare.largest_differences(one, two)[1] == pytest.approx(0.1)
    assert compare.first_difference(one, one, (0, 0)) is None
    quiet = recording(one.values, noise=("a",))
    assert compare.first_difference(quiet, two, (1e-9, 1e-9)) is None, "rounding is left out"


def test_nan_and_infinity_in_both_are_equal_and_in_one_are_not():
    one = recording({"model/a": [[[np.nan]], [[np.inf]]]}, losses=(0.0, np.nan))
    assert (
        compare.first_difference(one, recording({"model/a": [[[np.nan]], [[np.inf]]]}, losses=(0.0, np.nan)), (0, 0)) is None
    )
    other = recording({"model/a": [[[np.nan]], [[1.0]]]}, losses=(0.0, np.nan))
    assert compare.first_difference(one, other, (1e-9, 1e-9)).step == 1


def test_rows_in_another_place_are_not_other_rows(monkeypatch):
    one = recording({"model/a": [[[1]], [[1]], [[1]]]})
    difference = compare.Difference(1, "loss", -1, 0.5)
    assert compare.cause_without_trying(one, one, difference) == ""
    shifted = recording(one.values, rows=((1, 2), (4, 5)))
    assert compare.cause_without_trying(one, shifted, difference) == "", "behind the first difference"
    assert "data: the batch of step 2" in compare.cause_without_trying(one, shifted, compare.Difference(2, "loss", -1, 0.5))
