"""Real training on real clusters of this machine, through `tfdist launch`: equality, kills, stops, hangs."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import addresses, finish, measured, start, tfdist
from test_launch import alive, assert_all_gone, group_of, parent_of, wait_until

from tfdist.checkpoint import store
from tfdist.metrics.writers import read_all, read_rows

HERE = Path(__file__).parent
REGRESSION = str(HERE / "regression.py")
NUM_STEPS = 60
WITH_UNDISTURBED = (pytest.mark.slow, pytest.mark.together("test_cluster_training"))


@pytest.fixture(scope="module")
def train(text_files):
    """Arguments of a training run on a cluster."""
    return [
        "--", "train", f"--config={HERE / 'tiny.py'}", f"--config.data.source=files:{text_files}/*.txt",
        f"--config.train.num_steps={NUM_STEPS}", "--config.checkpoint.every_steps=7", "--config.eval.every_steps=0",
        "--config.train.steps_per_loop=2", "--config.cluster.step_timeout_s=30", "--config.cluster.start_timeout_s=60",
    ]  # fmt: skip


def launch(*arguments: str):
    return start(["-m", "tfdist.cli", "launch", "--workers=2", *arguments])


def losses(workdir) -> dict[int, str]:
    path = Path(workdir) / "metrics.jsonl"
    return {row["step"]: row["loss_hex"] for row in read_rows(path, "train")} if path.exists() else {}


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = finish(launch(*train, f"--workdir={workdir}"), 120)
    assert done.returncode == 0, done.stderr
    return workdir, done


def trainers(process) -> list[int]:
    """The training processes, worker 0 first: those whose parent is itself a child of the launcher."""

    def found():
        try:
            members = group_of(process)
            supervisors = sorted(pid for pid in members if parent_of(pid) == process.pid)
            children = [pid for supervisor in supervisors for pid in members if parent_of(pid) == supervisor]
        except OSError:
            return None
        return len(children) == 2 and children

    return wait_until(found)


def wait_for_step(workdir, step: int, process, limit_s: float = 90.0) -> None:
    def reached():
        assert process.poll() is None, process.stderr.read()
        return max(losses(workdir), default=0) >= step

    wait_until(reached, limit_s)


# ---- the same answer ----


def test_two_workers_log_the_losses_of_one_process(undisturbed, train, tmp_path):
    workdir, done = undisturbed
    alone = tfdist(*train[1:], f"--workdir={tmp_path}")
    assert alone.returncode == 0, alone.stderr
    mine, theirs = losses(tmp_path), losses(workdir)
    assert sorted(mine) == sorted(theirs) == list(range(1, NUM_STEPS + 1))
    for step, loss in mine.items():
        one, two = float.fromhex(loss), float.fromhex(theirs[step])
        assert abs(one - two) <= 1e-6 * max(abs(one), 1), (step, one, two)
    assert "sample:" in done.stdout and "[worker 1]" not in done.stdout  # the chief alone speaks
    assert "MultiWorkerMirrored(num_replicas=2, num_workers=2)" in done.stdout


def test_the_next_command_works_as_printed(undisturbed):
    """Where the launcher ran, though its environment is not activated."""
    (command,) = re.findall(r"next: (.*)", undisturbed[1].stdout)
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("def main("), done.stderr


@pytest.mark.slow
@pytest.mark.timed
def test_killed_and_restarted_again_and_again(undisturbed, train, tmp_path, request):
    """`kill -9` of a worker and of the chief in turn, at random steps: the same loss for each step, bit by bit."""
    kills = request.config.getoption("--kills") or 4
    random.seed(kills)
    steps = sorted(random.sample(range(3, NUM_STEPS - 12), kills))
    process = launch(f"--max-restarts={kills}", *train, f"--workdir={tmp_path}", "--config.train.steps_per_loop=1")
    seconds_to_first_step = []
    for number, step in enumerate(steps):
        wait_for_step(tmp_path, step, process)
        os.kill(trainers(process)[(number + 1) % 2], signal.SIGKILL)
        died_s = time.monotonic()
        wait_until(lambda starts=number + 2: trains_again(tmp_path, process, starts), 90)
        seconds_to_first_step.append(time.monotonic() - died_s)
    done = finish(process, 120)
    assert done.returncode == 0, done.stderr
    assert f"restart {kills} of {kills}" in done.stderr and "was killed by signal 9 (SIGKILL)" in done.stderr
    assert losses(tmp_path) == losses(undisturbed[0])
    measured("death -> first new step after restart", max(seconds_to_first_step), 20)


def trains_again(workdir, process, starts: int) -> bool:
    """Whether the group that was started for the n-th time has logged a step."""
    assert process.poll() is None, process.stderr.read()
    rows = []  # those of starts before the first save were set aside
    for path in [*sorted(workdir.glob("old-*/metrics.jsonl")), workdir / "metrics.jsonl"]:
        rows += read_all(path)
    begins = [i for i, row in enumerate(rows) if row.get("name") in ("start", "restore")]
    return len(begins) == starts and any(row["kind"] == "train" for row in rows[begins[-1] :])


@pytest.mark.parametrize(
    "whom",
    [
        pytest.param("launcher", marks=pytest.mark.timed),
        pytest.param("one", marks=WITH_UNDISTURBED),
        pytest.param("all", marks=WITH_UNDISTURBED),
    ],
)
def test_sigterm_saves_the_same_step_everywhere_and_nothing_is_lost(train, tmp_path, whom, request):
    process = launch(*train, f"--workdir={tmp_path}")
    wait_for_step(tmp_path, 10, process)
    members = group_of(process)
    targets = {"launcher": [process.pid], "one": [trainers(process)[1]], "all": [process.pid, *members]}[whom]
    started_s = time.monotonic()
    for pid in targets:
        os.kill(pid, signal.SIGTERM)
    done = finish(process, 20)
    assert_all_gone(members, 1.0)
    if whom == "launcher":
        measured("SIGTERM -> all gone, saved", time.monotonic() - started_s, 8)
    assert done.returncode == 143, done.stderr
    stopped = max(losses(tmp_path))
    assert 10 <= stopped < NUM_STEPS and max(store.steps(tmp_path / "checkpoints")) == stopped
    if whom == "launcher":
        return
    # and on another number of workers: the losses of one device again, with each sample at its place
    undisturbed = request.getfixturevalue("undisturbed")
    done = tfdist(*train[1:], f"--workdir={tmp_path}")
    assert done.returncode == 0 and f"restore at step {stopped}" in done.stderr
    expected = losses(undisturbed[0])
    for step, loss in losses(tmp_path).items():
        one, two = float.fromhex(expected[step]), float.fromhex(loss)
        assert (loss == expected[step]) if step <= stopped else abs(one - two) <= 2e-5 * max(abs(one), 1), step


# ---- hangs ----


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.timed
def test_a_frozen_training_process_is_found(train, tmp_path, victim):
    more = ["--config.train.num_steps=1000000", "--config.cluster.heartbeat_timeout_s=3"]
    process = launch(*train, f"--workdir={tmp_path}", *more)
    wait_for_step(tmp_path, 5, process)
    members = group_of(process)
    os.kill(trainers(process)[victim], signal.SIGSTOP)
    started_s = time.monotonic()
    done = finish(process, 30)
    measured("training process frozen -> group stopped (heartbeat 3 s)", time.monotonic() - started_s, 3 + 2)
    assert done.returncode == 142 and f"worker {victim} is frozen: no heartbeat" in done.stderr
    for i in range(2):
        assert "most recent call first" in (tmp_path / f"logs/worker-{i}.log").read_text()
    assert_all_gone(members, 1.0)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("stuck_action", r"worker 1 \(phase train, step 15, batch \d+ not fetched\) is behind"),
        pytest.param("stuck_input", r"worker 1 \(phase train, step \d+, batch \d+ not fetched\) is behind",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_worker_that_is_stuck_is_named(tmp_path, behaviour, message):
    limits = ["--step-timeout-s=4", "--heartbeat-timeout-s=4", "--start-timeout-s=60", f"--log-dir={tmp_path}/logs"]
    process = launch(*limits, "--", "python", REGRESSION, str(tmp_path), behaviour)
    done = finish(process, 90)
    assert done.returncode == 142 and re.search(message, done.stderr), done.stderr[-3000:]
    stack = (tmp_path / "logs/worker-1.log").read_text()
    assert "most recent call first" in stack and "regression.py" in stack
    assert "most recent call first" in (tmp_path / "logs/worker-0.log").read_text()


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_training_process(train, tmp_path):
    process = launch(*train, f"--workdir={tmp_path}", "--config.train.num_steps=1000000")
    wait_for_step(tmp_path, 5, process)
    members = group_of(process)
    assert len(members) >= 4
    os.kill(process.pid, signal.SIGKILL)
    assert_all_gone(members, 5.0)
    finish(process, 5)


@pytest.mark.slow
@pytest.mark.timed
def test_a_killed_worker_without_a_launcher(train, text_files, tmp_path):
    """Two plain `tfdist train` with TF_CONFIG, as on two machines: the survivor ends at once and says why."""
    processes = on_two_machines(train[2:], tmp_path)
    wait_for_step(tmp_path, 5, processes[0])
    child = next(pid for pid in group_of(processes[1]))
    os.kill(child, signal.SIGKILL)
    started_s = time.monotonic()
    done = [finish(process, 30) for process in processes]
    assert time.monotonic() - started_s < 4
    assert [d.returncode for d in done] == [137, 137]
    assert all("worker 1 was killed by signal 9 (SIGKILL)" in d.stderr for d in done)


def on_two_machines(arguments, workdir, changed=()) -> list:
    """Starts the tasks of a cluster one by one; `changed` are further arguments of worker 1."""
    members, processes = addresses(2), []
    for i in range(2):
        config = {"cluster": {"worker": members}, "task": {"type": "worker", "index": i}}
        more = [*changed] if i else []
        processes.append(start(
            ["-m", "tfdist.cli", "train", *arguments, f"--workdir={workdir}", "--config.train.num_steps=1000000", *more],
            {"TF_CONFIG": json.dumps(config)},
        ))  # fmt: skip
    return processes


# ---- mistakes ----


@pytest.mark.timed
def test_differing_configs_end_both_tasks_with_one_line(train, tmp_path):
    started_s = time.monotonic()
    done = [finish(p, 30) for p in on_two_machines(train[2:], tmp_path, ["--config.train.seed=7"])]
    assert time.monotonic() - started_s < 10
    for d in done:
        lines = d.stderr.splitlines()
        assert d.returncode == 2 and len(lines) == 1 and "config.train.seed differs" in lines[0], d.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_an_error_of_one_worker_is_the_cause(tmp_path):
    process = launch(f"--log-dir={tmp_path}/logs", "--", "python", REGRESSION, str(tmp_path), "raise")
    done = finish(process, 60)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()
    assert "worker 1 ended with exit code 1" in last[-1] and "Error: worker 1 does not like this" in last[-1]
    assert any("worker 1 does not like this" in line for line in last[last.index("--- the last lines of worker 1 ---") :])


@pytest.mark.slow
def test_a_strategy_that_is_made_too_late_says_so(tmp_path):
    process = launch(f"--log-dir={tmp_path}/logs", "--", "python", REGRESSION, str(tmp_path), "too_late")
    done = finish(process, 60)
    assert done.returncode == 2 and "expected tfdist.MultiWorkerMirrored before any other TensorFlow work" in done.stderr


@pytest.mark.slow
def test_a_users_program_trains_and_sends_bytes(tmp_path):
    process = launch("--all-output", f"--log-dir={tmp_path}/logs", "--", "python", REGRESSION, str(tmp_path))
    done = finish(process, 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exact True") == 2 and max(losses(tmp_path)) == 60


@pytest.mark.parametrize(
    ("tf_config", "arguments", "expected"),
    [
        (None, ["--config.strategy.kind=multi_worker"], "TF_CONFIG: not set"),
        ('{"cluster": {"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}, "task": {"type": "chief", "index": 0}}',
         ["--config.strategy.kind=multi_worker"], "ps needs strategy.kind=parameter_server"),
        ('{"cluster": {"worker": ["a:1"]}}', [], "TF_CONFIG: task: missing"),
        ("", [], "TF_CONFIG: is empty"),
    ],
)  # fmt: skip
def test_a_bad_cluster_is_one_line_before_tensorflow(train, tf_config, arguments, expected):
    command = ["-X", "importtime", "-m", "tfdist.cli", *train[1:], *arguments]
    done = finish(start(command, {"TF_CONFIG": tf_config} if tf_config is not None else {}), 20)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(errors) == 1 and expected in errors[0], errors
    assert "tensorflow" not in {m.rpartition("|")[2].strip() for m in done.stderr.splitlines()}


def test_helpers_see_dead_processes():
    assert alive(os.getpid()) and not alive(2**22 - 1)


@pytest.mark.slow
def test_an_evaluator_evaluates_the_checkpoints(train, tmp_path):
    process = launch("--evaluator", *train, f"--workdir={tmp_path}", "--config.train.num_steps=30")
    done = finish(process, 120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    final = [row for row in rows if row["kind"] == "eval" and row["step"] == 30]
    assert len(final) == 2 and "[evaluator 0] eval  step 30" in done.stderr  # the chief's last one, and the evaluator's
    assert abs(final[0]["loss"] - final[1]["loss"]) <= 1e-6 * final[0]["loss"] and final[0]["tokens"] == final[1]["tokens"]


@pytest.mark.slow
def test_one_that_comes_late_to_tensorflow_is_not_frozen(tmp_path):
    """The first one waits inside TensorFlow, which lets no thread run, longer than the heartbeat timeout."""
    flags = ["--heartbeat-timeout-s=3", f"--log-dir={tmp_path}/logs"]
    done = finish(launch(*flags, "--", "python", REGRESSION, str(tmp_path), "late"), 90)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_gradients_in_bfloat16_and_in_packs_train_nearly_the_same(undisturbed, train, tmp_path):
    options = ["reduce_dtype=bfloat16", "communication=ring", "bytes_per_pack=4096", "communication_timeout_s=30"]
    done = finish(launch(*train, f"--workdir={tmp_path}", *(f"--config.strategy.{option}" for option in options)), 120)
    assert done.returncode == 0, done.stderr
    exact, rounded = losses(undisturbed[0]), losses(tmp_path)
    assert exact != rounded
    for step, loss in exact.items():
        assert abs(float.fromhex(loss) - float.fromhex(rounded[step])) < 0.02 * float.fromhex(loss), step


@pytest.mark.slow
def test_a_fresh_run_that_is_killed_goes_on_with_itself(undisturbed, train, tmp_path):
    """`--fresh` sets the earlier run aside once, not again at each restart."""
    first = tfdist(*train[1:], f"--workdir={tmp_path}", "--config.train.num_steps=10")
    assert first.returncode == 0, first.stderr
    process = launch("--max-restarts=1", *train, f"--workdir={tmp_path}", "--fresh", "--config.train.steps_per_loop=1")
    wait_until(lambda: (tmp_path / "old-1").exists(), 60)
    wait_for_step(tmp_path, 20, process)
    os.kill(trainers(process)[1], signal.SIGKILL)
    done = finish(process, 120)
    assert done.returncode == 0, done.stderr
    assert "restart 1 of 1" in done.stderr and "restore at step" in done.stderr
    assert losses(tmp_path) == losses(undisturbed[0])
    assert not (tmp_path / "old-2").exists() and len(losses(tmp_path / "old-1")) == 10


@pytest.mark.slow
def test_two_then_three_then_one_worker_train_like_one(text_files, tmp_path):
    """Killed in between, over more than two epochs: the global batches are the same, so the losses are (in float64)."""
    source = f"mix:2*files:{text_files}/0*.txt;1*files:{text_files}/1*.txt"
    arguments = [
        "train", "--config=tests/tiny.py", f"--config.data.source={source}", "--config.model.dtype=float64",
        "--config.train.num_steps=240", "--config.train.steps_per_loop=10", "--config.checkpoint.every_steps=20",
        "--config.eval.every_steps=0", "--config.log.sample_tokens=0", "--config.log.tensorboard=false",
        "--config.optimizer.learning_rate=1e-3",
    ]  # fmt: skip
    one = tfdist(*arguments, f"--workdir={tmp_path}/one")
    assert one.returncode == 0, one.stderr
    many = f"--workdir={tmp_path}/many"
    for workers, step in ((2, 60), (3, 140)):
        process = start(["-m", "tfdist.cli", "launch", f"--workers={workers}", "--", *arguments, many])
        wait_for_step(tmp_path / "many", step, process)
        members = group_of(process)
        os.kill(process.pid, signal.SIGKILL)
        assert_all_gone(members, 5.0)
        finish(process, 5)
    done = tfdist(*arguments, many)
    assert done.returncode == 0, done.stderr
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert found.keys() == expected.keys() and len(expected) == 240
    for step in expected:
        a, b = float.fromhex(found[step]), float.fromhex(expected[step])
        assert abs(a - b) < 1e-9 * max(1, abs(b)), (step, a, b)
    events = read_rows(tmp_path / "many" / "metrics.jsonl", "event")
    restores = [row["step"] for row in events if row["name"] == "restore"]
    assert len(restores) == 2 and 40 <= restores[0] < restores[1] < 240
