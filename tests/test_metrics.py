"""Rows of metrics on disks that do not take them: whole lines or none, the lost ones named, and training never ends."""

import contextlib
import fcntl
import json
import random
import resource
from pathlib import Path

import pytest

from tfdist.metrics import report, writers
from tfdist.metrics.writers import JsonLines, TensorBoard, read_all, read_rows


@contextlib.contextmanager
def no_file_above(num_bytes: int):
    """As a disk that becomes full in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def row(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1.5, "padding": "x" * (step % 7)}


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_whole_or_absent_and_the_lost_ones_are_named(tmp_path, seed):
    path, chance, step, taken = tmp_path / "metrics.jsonl", random.Random(seed), 0, []
    writer = JsonLines(path)
    for _ in range(4):
        for full in (False, True):
            with no_file_above(path.stat().st_size + chance.randrange(200)) if full else contextlib.nullcontext():
                for _ in range(chance.randrange(1, 8)):
                    step += 1
                    size = path.stat().st_size
                    writer.write(row(step))
                    taken += [step] if path.stat().st_size > size else []
    writer.close()
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    rows = [json.loads(line) for line in lines]  # every line is a row
    assert [one for one in rows if one["kind"] == "train"] == [row(one) for one in taken]
    named = [one for one in rows if one["kind"] == "event"]
    assert taken and all(one["name"] == "rows_lost" and one["reason"] == "File too large" for one in named)
    lost = [one for event in named for one in range(event["first_step"], event["last_step"] + 1)]
    assert sorted(lost + taken) == list(range(1, step + 1)) and sum(one["rows"] for one in named) == len(lost)


@pytest.mark.parametrize(
    ("tail", "steps"),
    [
        (b'{"kind": "train", "st', [1, 3]),
        (b'{"kind": "train", "step": 2}', [1, 2, 3]),
        (b"\0\0\0\0", [1, 3]),
        (b"\xff[1]\n7\n", [1, 3]),
    ],
)
def test_what_a_killed_run_left_is_cut_off(tmp_path, tail, steps):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b"\n" + tail)
    writer = JsonLines(path)
    writer.write(row(3))
    writer.close()
    assert [one["step"] for one in read_rows(path, "train")] == [one["step"] for one in read_all(path)] == steps
    assert path.read_bytes().endswith(json.dumps(row(3)).encode() + b"\n")


def test_two_writers_of_one_file_glue_nothing_and_wait_for_nobody(tmp_path, monkeypatch):
    """An evaluator and the chief, whose disk becomes full in the middle of a row; one that was stopped in a row."""
    monkeypatch.setattr(writers, "_LOCK_S", 0.1)
    path = tmp_path / "metrics.jsonl"
    chief, evaluator = JsonLines(path), JsonLines(path)
    chief.write(row(1))
    with open(path, "ab") as torn:  # by a process that was killed
        torn.write(json.dumps(row(2)).encode()[:20])
    evaluator.write(row(3))
    with no_file_above(path.stat().st_size + 20):
        chief.write(row(4))
    evaluator.write(row(5))
    with open(path) as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        chief.write(row(6))
    chief.write(row(7))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["step"] for one in rows if one["kind"] == "train"] == [1, 3, 5, 7]
    assert [(one["first_step"], one["last_step"]) for one in rows if one["kind"] == "event"] == [(4, 6)]


def test_a_report_of_strange_numbers_is_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    strange = [
        {"step": 10**400},
        {"step": True},
        {"step": 2, "loss": 10**400},
        {"step": 3, "loss": "x"},
        {"step": 4, "loss": 1.0},
    ]
    path.write_text("".join(json.dumps({"kind": "train"} | one) + "\n" for one in strange))
    report.plot(path, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_tensorboard_never_ends_training_and_goes_on_in_a_new_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writers, "_AGAIN_S", 0.0)
    writer = TensorBoard(tmp_path)
    writer.write(row(1))
    with no_file_above(200):
        for step in range(2, 30):
            writer.write(row(step))
    assert "tensorboard: cannot write to" in caplog.text
    for step in range(30, 40):
        writer.write(row(step))
    writer.close()
    assert 39 in steps_in(tmp_path)


def steps_in(folder: Path) -> set[int]:
    """Of every event file, up to its first torn record."""
    import tensorflow as tf

    steps = set()
    for path in folder.iterdir():
        with contextlib.suppress(tf.errors.DataLossError):
            for event in tf.compat.v1.train.summary_iterator(str(path)):
                steps.add(event.step)
    return steps
