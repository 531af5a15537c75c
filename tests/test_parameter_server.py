"""Training with parameter servers, through `tfdist launch`: real servers, real workers, kills and freezes."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from processes import addresses, finish, measured, run_forked, start, tfdist
from test_launch import alive, assert_all_gone, group_of, parent_of, wait_until

from tfdist.checkpoint import store

HERE = Path(__file__).parent
METRICS = "metrics.jsonl"


def launch(workers: int, servers: int, *arguments: str):
    return start(["-m", "tfdist.cli", "launch", f"--workers={workers}", f"--ps={servers}", *arguments])


@pytest.fixture(scope="module")
def train(text_files):
    return [
        "--", "train", f"--config={HERE / 'tiny.py'}", f"--config.data.source=files:{text_files}/*.txt",
        "--config.checkpoint.every_steps=20", "--config.eval.every_steps=0", "--config.log.tensorboard=False",
        "--config.cluster.heartbeat_timeout_s=3", "--config.cluster.start_timeout_s=60",
        "--config.strategy.min_shard_bytes=64",
    ]  # fmt: skip


def rows(workdir, kind: str) -> list[dict]:
    path = Path(workdir) / METRICS
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]  # the last one may be half written
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def events(workdir, name: str) -> list[dict]:
    return [row for row in rows(workdir, "event") if row["name"] == name]


def task_pids(process) -> dict[str, int]:
    """The training and serving processes by their task: they are the children of the launcher's children."""
    found = {}
    for pid in group_of(process):
        try:
            environ = dict(
                item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
            )
            task = json.loads(environ["TF_CONFIG"])["task"]
            if parent_of(parent_of(pid)) == process.pid:
                found[f"{task['type']} {task['index']}"] = pid
        except (OSError, KeyError, ValueError):
            continue
    return found


def wait_for_step(workdir, step: int, process, limit_s: float = 90.0) -> None:
    def reached():
        assert process.poll() is None, process.stderr.read()
        return max((row["step"] for row in rows(workdir, "train")), default=0) >= step

    wait_until(reached, limit_s)


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_step_is_counted_once_and_evaluation_is_exact(train, tmp_path, thorough):
    """Then the run goes on with three servers (and an evaluator that crashes), on one device, and with one server."""
    process = launch(2, 2, *train, f"--workdir={tmp_path}", "--config.train.num_steps=40")
    wait_for_step(tmp_path, 1, process)
    chief, members = task_pids(process)["chief 0"], group_of(process)
    wait_until(lambda: not alive(chief), 60)
    gone_s = time.monotonic()
    done = finish(process, 60)
    measured("everybody ends after the chief", time.monotonic() - gone_s, 5)
    assert done.returncode == 0, done.stderr
    assert_all_gone(members, 1)
    assert "looked up by row on the servers: transformer_lm/position_embedding/embeddings" in done.stderr
    (counted,) = events(tmp_path, "workers")
    assert counted["updates"] == counted["step"] == 40 and counted["rerun_steps"] == []
    assert sum(counted["steps"].values()) == sum(counted["staleness"].values()) == 40
    assert min(counted["steps"].values()) >= 5
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 41))
    by_servers = rows(tmp_path, "eval")[-1]
    if thorough:
        crashes = launch(1, 3, "--evaluator", *train, f"--workdir={tmp_path}", "--config.train.num_steps=50")
        os.kill(wait_until(lambda: task_pids(crashes).get("evaluator 0"), 30), signal.SIGKILL)
        more = finish(crashes, 120)
        assert more.returncode == 137 and "evaluator 0 was killed by signal 9" in more.stderr, more.stderr
        assert_goes_on(tmp_path, 40, 50)
        alone = tfdist(*train[1:], f"--workdir={tmp_path}", "--config.train.num_steps=61")
        assert alone.returncode == 0, alone.stderr
        assert by_servers["tokens"] == rows(tmp_path, "eval")[-1]["tokens"]
        processes = by_hand([*train[2:], f"--workdir={tmp_path}", "--config.train.num_steps=70"])
        assert [(p.returncode, p.stderr) for p in (finish(p, 120) for p in processes) if p.returncode] == []
        assert_goes_on(tmp_path, 61, 70)
    evaluated = tfdist("eval", f"--workdir={tmp_path}")
    assert f"loss {rows(tmp_path, 'eval')[-1]['loss']:.6f}" in evaluated.stdout


def assert_goes_on(workdir, step: int, to_step: int) -> None:
    assert events(workdir, "restore")[-1]["step"] == step
    assert events(workdir, "workers")[-1]["updates"] == to_step
    assert [row["step"] for row in rows(workdir, "train")] == list(range(1, to_step + 1))


def by_hand(arguments: list[str]) -> list:
    """`tfdist train` with TF_CONFIG as on three machines: the chief, a worker, a server."""
    cluster = {job: addresses(1) for job in ("chief", "worker", "ps")}
    return [
        start(
            ["-m", "tfdist.cli", "train", *arguments],
            {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": job, "index": 0}})},
        )
        for job in cluster
    ]


@pytest.mark.slow
@pytest.mark.timed
def test_a_worker_that_is_killed_or_frozen_costs_nothing(train, tmp_path):
    limits = ("--heartbeat_timeout_s=3", "--start_timeout_s=60", f"--log_dir={tmp_path / 'logs'}")
    process = launch(2, 1, "--max-restarts=2", *limits, "--", "python", str(HERE / "server_rows.py"), str(tmp_path))
    wait_for_step(tmp_path, 50, process)
    tasks = task_pids(process)
    log = lambda: (Path(tmp_path) / "logs" / "chief-0.log").read_text()  # noqa: E731
    for worker, number in (("worker 0", signal.SIGKILL), ("worker 1", signal.SIGSTOP)):
        os.kill(tasks[worker], number)
        wait_until(lambda worker=worker: f"{worker} is there again" in log(), 40)
        reached = max(row["step"] for row in rows(tmp_path, "train"))
        wait_for_step(tmp_path, reached + 300, process)  # both compute again
    members = group_of(process)
    process.send_signal(signal.SIGTERM)
    done = finish(process, 60)
    assert done.returncode == 143, done.stderr
    (counted,) = events(tmp_path, "workers")
    assert len(counted["rerun_steps"]) <= 2, "one each, if it was in the middle of one"
    assert counted["step"] <= counted["updates"] <= counted["step"] + len(counted["rerun_steps"])
    measured("longest time without a step while workers die", counted["longest_gap_s"], 2)
    for worker in ("worker 0", "worker 1"):
        seconds = float(log().partition(f"{worker} is there again after ")[2].split()[0])
        measured(f"{worker} is used again", seconds, 10 + (3 if worker == "worker 1" else 0))
    assert "worker 1 is frozen" in done.stderr
    assert_all_gone(members, 2)
    state = store.latest(tmp_path / "checkpoints")
    table = state.arrays()["model/layers/0/embeddings"][:, 0]
    rates = -table[: counted["step"]]  # of each step the sum of the learning rates that it was applied with
    twice = np.isin(np.arange(counted["step"]), counted["rerun_steps"])
    assert (table[counted["step"] :] == 0).all()
    assert (rates > 0).all() and len(set(rates[~twice])) == (~twice).sum(), "each step its own row, with a rate of its own"
    # a worker that dies after its update has its number, and before the row is written, leaves that number unused
    unused = np.arange(1.0, counted["updates"] + 1).sum() - rates.sum()
    assert 0 <= unused <= len(counted["rerun_steps"]) * counted["updates"], "no update without a number, or with two"
    if not counted["rerun_steps"]:
        assert unused == 0
    logged = {row["step"] - 1: row["learning_rate"] for row in rows(tmp_path, "train")}
    assert len(set(logged.values())) == counted["step"]
    assert sorted(logged.values())[-1] <= counted["updates"]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "number"), [("ps 0", signal.SIGSTOP), ("chief 0", signal.SIGKILL)])
@pytest.mark.timed
def test_a_lost_server_or_chief_restarts_all_from_the_checkpoint(train, tmp_path, task, number):
    process = launch(2, 2, "--max-restarts=1", *train, f"--workdir={tmp_path}", "--config.train.num_steps=200")
    wait_for_step(tmp_path, 25, process)
    tasks = task_pids(process)
    os.kill(tasks[task], number)
    lost_s = time.monotonic()
    wait_until(lambda: not any(alive(pid) for pid in tasks.values()))
    limit_s = 2 + (3 if number == signal.SIGSTOP else 0)  # as without servers: the heartbeat has to run out
    measured(f"{task} is killed or frozen -> group gone", time.monotonic() - lost_s, limit_s)
    done = finish(process, 120)
    assert done.returncode == 0, done.stderr
    assert "restart 1 of 1 of the whole group" in done.stderr and task in done.stderr
    (restored,) = events(tmp_path, "restore")
    assert restored["step"] >= 20
    assert max(row["step"] for row in rows(tmp_path, "train")) == 200


@pytest.mark.slow
def test_a_worker_that_stays_away_and_an_evaluator(train, tmp_path):
    """No restarts: the others go on, and the side-car evaluates each checkpoint; its result is that of `tfdist eval`."""
    process = launch(2, 1, "--evaluator", *train, f"--workdir={tmp_path}", "--config.train.num_steps=300")
    wait_for_step(tmp_path, 25, process)
    os.kill(task_pids(process)["worker 1"], signal.SIGKILL)
    done = finish(process, 120)
    assert done.returncode == 0, done.stderr
    assert "worker 1 is lost; the others go on" in done.stderr
    (counted,) = events(tmp_path, "workers")
    assert counted["step"] == 300 and 300 <= counted["updates"] <= 301
    evaluated = [row for row in rows(tmp_path, "eval") if row["step"] == 300]
    assert len(evaluated) == 2 and evaluated[0]["tokens"] == evaluated[1]["tokens"]  # the chief's and the evaluator's
    assert abs(evaluated[0]["loss"] - evaluated[1]["loss"]) <= 1e-5


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(train, tmp_path):
    process = launch(2, 1, *train, f"--workdir={tmp_path}", "--config.train.num_steps=100000")
    wait_for_step(tmp_path, 30, process)
    members = group_of(process)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process, 30)
    assert stopped.returncode == 143, stopped.stderr
    assert_all_gone(members, 2)
    (counted,) = events(tmp_path, "workers")
    assert counted["updates"] == counted["step"]
    more = finish(launch(2, 1, *train, f"--workdir={tmp_path}", f"--config.train.num_steps={counted['step'] + 5}"), 60)
    assert more.returncode == 0 and events(tmp_path, "restore")[0]["step"] == counted["step"]
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, counted["step"] + 6))


@pytest.mark.slow
def test_the_recommender_learns_and_moves_rows_alone(tmp_path):
    """A table of a million rows in parts on two servers. AUC 0.71 after 1,500 steps; knowing the groups gives 0.82."""
    program = ["python", str(HERE.parent / "configs" / "recommender_ps.py"), f"--workdir={tmp_path}"]
    done = finish(launch(2, 2, f"--log_dir={tmp_path / 'logs'}", "--", *program), 180)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.partition("AUC ")[2].split()[0]) > 0.69


@pytest.mark.slow
def test_the_tutorial(tmp_path):
    program = ["python", str(HERE.parent / "examples" / "parameter_server_with_keras.py")]
    done = finish(launch(2, 1, f"--log_dir={tmp_path}", "--", *program), 120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.partition("fit: accuracy ")[2].split()[0]) > 0.95
    assert float(done.stdout.partition("loop: loss ")[2].split(",")[0]) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.strategy.kind=parameter_server"], "needs a cluster"),
        (["--config.strategy.partitioner=max"], "strategy.partitioner: expected one of min_size, max_size, fixed, none"),
        (["--config.strategy.gradients_per_update=0"], "strategy.gradients_per_update: expected at least 1, found 0"),
    ],
)
def test_bad_settings_are_one_line(train, tmp_path, arguments, message):
    done = tfdist(*train[1:], f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_what_is_refused_says_why_and_what_is_saved_is_whole(tmp_path):
    """One cluster for all cases."""
    done = finish(launch(1, 2, f"--log_dir={tmp_path}", "--", "python", str(HERE / "server_cases.py"), str(tmp_path)), 120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all is well" in done.stdout


@pytest.mark.slow
def test_asynchronous_training_ends_where_synchronous_does(tmp_path):
    """Validation loss after as many samples: the mean of five seeds within three standard deviations of one device's."""
    losses = {}
    for name in ("one_device", "parameter_server"):
        program = [str(HERE / "server_seeds.py"), str(tmp_path / f"{name}.json")]
        if name == "one_device":
            done = run_forked(program)
        else:
            done = finish(launch(2, 1, f"--log_dir={tmp_path}", "--", "python", *program), 240)
        assert done.returncode == 0, done.stderr
        losses[name] = json.loads((tmp_path / f"{name}.json").read_text())
    sync, servers = (np.array(losses[name]) for name in ("one_device", "parameter_server"))
    print(f"\nmeasured: {sync.mean():.4f} +- {sync.std(ddof=1):.4f} on one device, {servers.mean():.4f} with servers")
    assert abs(servers.mean() - sync.mean()) <= 3 * sync.std(ddof=1), (sync, servers)
