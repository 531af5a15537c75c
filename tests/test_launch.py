"""The launcher and its supervisors, with real processes that do not import TensorFlow (tests/actor.py)."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import addresses, finish, measured, start

from tfdist.cli.processes import main as processes_command
from tfdist.cluster.spec import Task
from tfdist.cluster.tf_config import from_tf_config
from tfdist.launch import assign, launcher, restarts
from tfdist.launch.assign import Group
from tfdist.launch.watchdog import Limits, Seen, judge

ACTOR = str(Path(__file__).parent / "actor.py")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
QUICK = ("--heartbeat_timeout_s=2", "--step_timeout_s=2", "--start_timeout_s=5")


def launch(tmp_path, *arguments: str, actors: tuple[str, ...] = (), flags: tuple[str, ...] = QUICK, **env: str):
    command = ["-m", "tfdist.cli", "launch", *arguments, *flags, f"--log-dir={tmp_path}/logs"]
    return start([*command, "--", "python", ACTOR, *actors], {k: str(v) for k, v in env.items()})


def log(tmp_path, task: str) -> str:
    path = tmp_path / "logs" / f"{task}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def wait_until(condition, limit_s: float = 20.0):
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)
    return found


def pids(tmp_path, *tasks: str) -> list[int]:
    """Of the programs of these tasks, once they run."""

    def found():
        texts = [re.findall(r"pid (\d+)", log(tmp_path, task)) for task in tasks]
        return all(texts) and [int(text[-1]) for text in texts]

    return wait_until(found)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def group_of(process: subprocess.Popen) -> list[int]:
    """Every process below the launcher."""
    below, found = {process.pid}, []
    for _ in range(4):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                pid = int(stat.parent.name)
                if int(fields[1]) in below and pid not in below:
                    below.add(pid)
                    found.append(pid)
    return found


def assert_all_gone(members: list[int], limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while left := [pid for pid in members if alive(pid)]:
        assert time.monotonic() < deadline_s, f"still there: {left}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], ""),
        (["step 1", "done"], ""),
        (["Traceback (most recent call last):", "  File x", "my.Problem: not so", "and more", ""], "my.Problem: not so"),
        (["    ^^^^", "KeyboardInterrupt", "tfdist: chief 0 ended"], "KeyboardInterrupt"),
        (["Traceback (most recent call last):", "  File x", "KeyError: 1", "", "During handling of the above, another:", "",
          "Traceback (most recent call last):", "  File y", "ValueError: the cause"], "ValueError: the cause"),
        (["Traceback (most recent call last):", "  File x", "ValueError: the cause", "Exception ignored in: <A.__del__>",
          "Traceback (most recent call last):", "  File y", "TypeError: at the end"], "ValueError: the cause"),
        (["Traceback (most recent call last):", '  File "x", line 9, in <module>', "    [f(i) for i in range(3)]",
          "^^^^^^^^^^^^^^^^^^^^^^^^", "~~~~^~~~", "RuntimeError: no 1"], "RuntimeError: no 1"),
        (["Traceback (most recent call last):", "  File x", "[f(i) for i in range(3)]", "else:",
          "W0000 00:00:17.5 12 a.cc:3] b", "WARNING:absl:c", "tfdist: warning: d", "    ^", "e.NotFound"], "e.NotFound"),
        (["Traceback (most recent call last):", "  File x", "^^^^^^^^"], ""),  # the rest was not written
        (["Traceback (most recent call last):", "  File x", "f.<locals>.Problem: 1"], "f.<locals>.Problem: 1"),
    ],
)  # fmt: skip
def test_the_error_that_ended_a_program(lines, error):
    assert launcher.uncaught_error(lines) == error


# ---- a group that ends well ----


@pytest.mark.parametrize("shown", ["of worker 0", "of all"])
def test_output_has_prefixes_logs_are_whole_and_tasks_know_who_they_are(tmp_path, shown):
    """What worker 0 prints is shown, or what all print; what any writes to stderr always is. Logs have everything."""
    flags = ["--workers=2", *["--all-output"] * (shown == "of all")]
    process = launch(
        tmp_path, *flags, actors=("worker0:environment", "worker1:environment"), ACTOR_STEPS=5,
        CUDA_VISIBLE_DEVICES="0,1,2,3",
    )  # fmt: skip
    done = finish(process, 30)
    assert done.returncode == 0, done.stderr
    for i, gpus in enumerate(("0,1", "2,3")):
        line = next(line for line in log(tmp_path, f"worker-{i}").splitlines() if line.startswith("environment"))
        found = json.loads(line.partition("environment ")[2])
        cluster, _ = from_tf_config(found["TF_CONFIG"])
        assert cluster.task == Task("worker", i) and len(cluster.worker) == 2 and found["CUDA_VISIBLE_DEVICES"] == gpus
        assert (f"[worker {i}] {line}" in done.stdout.splitlines()) == (i == 0 or shown == "of all")
        assert f"[worker {i}] a warning" in done.stderr.splitlines() and "a warning" in log(tmp_path, f"worker-{i}")


TENSORFLOW_SAYS = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1795546653.344753    8936 port.cc:153] oneDNN custom operations are on.",
    "To enable the following instructions: AVX2 AVX512F, in other operations, rebuild it with the appropriate flags.",
    "E0000 00:00:1795546659.233137    8936 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error",
]


@pytest.mark.parametrize(
    ("environment", "shown"),
    [({}, []), ({"CUDA_VISIBLE_DEVICES": "0"}, TENSORFLOW_SAYS[3:]), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, TENSORFLOW_SAYS)],
)
def test_what_tensorflow_says_at_its_start_is_in_the_log(tmp_path, monkeypatch, environment, shown):
    """Errors of GPUs are shown where there are some; everything where the user says how much is to be logged."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    program = "import sys; print(*sys.argv[1:], 'E0000 its own error', sep='\\n', file=sys.stderr)"
    command = ["launch", "--workers=1", f"--log-dir={tmp_path}", "--", "python", "-c", program, *TENSORFLOW_SAYS]
    done = finish(start(["-m", "tfdist.cli", *command], environment), 30)
    lines = [line.removeprefix("[worker 0] ") for line in done.stderr.splitlines()]
    assert done.returncode == 0 and lines == [*shown, "E0000 its own error"]
    assert (tmp_path / "worker-0.log").read_text().splitlines() == [*TENSORFLOW_SAYS, "E0000 its own error"]


def test_without_a_workdir_the_logs_are_in_a_temporary_folder_that_the_first_line_names(tmp_path):
    command = ["-m", "tfdist.cli", "launch", "--workers=2", "--", "python", "-c", "print('a line')"]
    done = finish(start(command, {"TMPDIR": str(tmp_path)}), 30)
    folder = Path(done.stderr.splitlines()[0].removeprefix("tfdist: the output of every process: "))
    assert done.returncode == 0 and folder.parent == tmp_path
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("worker-0.log", "worker-1.log"), "a line\n"
    )


def test_logs_that_cannot_be_written_are_one_line_and_a_folder_that_is_removed_stops_no_restart(tmp_path):
    (tmp_path / "file").touch()
    done = finish(start(["-m", "tfdist.cli", "launch", "--workers=1", f"--log-dir={tmp_path}/file/logs", "--", "true"]), 20)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--log_dir: cannot write to" in done.stderr
    program = f"import os, shutil, sys; d = {str(tmp_path / 'logs')!r}; shutil.rmtree(d); open(d, 'w'); sys.exit(1)"
    command = ["launch", "--workers=1", "--max-restarts=1", f"--log-dir={tmp_path}/logs", "--", "python", "-c", program]
    done = finish(start(["-m", "tfdist.cli", *command]), 20)
    assert done.returncode == 1 and "its lines are lost" in done.stderr, done.stderr
    assert "no restart: 1 of 1 restarts are used" in done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_that_every_worker_makes_is_explained(tmp_path, workers):
    (tmp_path / "out").mkdir(exist_ok=True)  # made by whoever was first
    program = f"import os; os.makedirs({str(tmp_path / 'out')!r})"
    command = ["launch", f"--workers={workers}", f"--log-dir={tmp_path}", "--", "python", "-c", program]
    done = finish(start(["-m", "tfdist.cli", *command]), 30)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "FileExistsError: [Errno 17]" in last
    assert ("same folder: use os.makedirs(..., exist_ok=True)" in last) == (workers == 2)


@pytest.mark.slow
def test_with_servers_there_is_one_process_more(tmp_path):
    process = launch(tmp_path, "--workers=3", "--ps=2", "--evaluator", actors=("worker2:exit1_once",), ACTOR_STEPS=60,
                     ACTOR_FILE=tmp_path / "once", CUDA_VISIBLE_DEVICES="")  # fmt: skip
    done = finish(process, 40)
    names = sorted(p.stem for p in (tmp_path / "logs").iterdir())
    assert names == ["chief-0", "evaluator-0", "ps-0", "ps-1", "worker-0", "worker-1", "worker-2"]
    # its restart alone is not in the budget: the others go on
    assert done.returncode == 0 and "worker 2 is lost; the others go on" in done.stderr


# ---- who is restarted ----


def test_a_worker_with_servers_restarts_alone(tmp_path):
    process = launch(tmp_path, "--workers=2", "--ps=1", "--max-restarts=2",
                     actors=("worker0:forever", "worker1:exit1_once", "ps0:forever"), ACTOR_STEPS=130,
                     ACTOR_FILE=tmp_path / "once")  # fmt: skip
    done = finish(process, 40)
    assert done.returncode == 0, done.stderr
    assert "worker 1 ended with exit code 1; it starts again in 1 s (1 of 2 restarts)" in done.stderr
    starts = {name: log(tmp_path, name).count(" pid ") for name in ("chief-0", "worker-0", "worker-1", "ps-0")}
    assert starts == {"chief-0": 1, "worker-0": 1, "worker-1": 2, "ps-0": 1}


@pytest.mark.slow
def test_an_evaluator_restarts_alone(tmp_path):
    process = launch(tmp_path, "--workers=1", "--evaluator", "--max-restarts=1", actors=("evaluator0:exit1_once",),
                     ACTOR_STEPS=150, ACTOR_FILE=tmp_path / "once")  # fmt: skip
    done = finish(process, 40)
    assert done.returncode == 0, done.stderr
    assert log(tmp_path, "evaluator-0").count(" pid ") == 2 and log(tmp_path, "worker-0").count(" pid ") == 1


def test_a_collective_worker_restarts_the_whole_group(tmp_path):
    process = launch(tmp_path, "--workers=2", "--max-restarts=2", actors=("worker1:exit1_once",), ACTOR_STEPS=60,
                     ACTOR_FILE=tmp_path / "once")  # fmt: skip
    done = finish(process, 40)
    assert done.returncode == 0, done.stderr
    assert [log(tmp_path, f"worker-{i}").count(" pid ") for i in range(2)] == [2, 2]
    assert "restart 1 of 2 of the whole group" in done.stderr


@pytest.mark.slow
def test_the_same_error_three_times_is_enough(tmp_path):
    process = launch(tmp_path, "--workers=2", "--max-restarts=9", actors=("worker1:exit1",))
    done = finish(process, 60)
    assert done.returncode == 1 and "the same error came 3 times" in done.stderr
    assert log(tmp_path, "worker-1").count(" pid ") == 3


def test_an_error_of_the_user_is_not_tried_again(tmp_path):
    done = finish(launch(tmp_path, "--workers=2", "--max-restarts=9", actors=("worker1:exit3",)), 30)
    assert done.returncode == 3 and "starting again would not help" in done.stderr
    lines = done.stderr.splitlines()
    assert "--- the last lines of worker 1 ---" in lines and lines.index("the reason") > lines.index(
        "--- the last lines of worker 1 ---"
    )
    assert log(tmp_path, "worker-1").count(" pid ") == 1


def test_budget():
    budget = restarts.Budget(max_restarts=4)
    waits = [budget.next_start_in_s(137, "killed", step) for step in (5, 9, 9, 12, 13)]
    assert waits == [1.0, 1.0, 2.0, 1.0, None] and "4 of 4" in budget.why_not(137)
    assert restarts.Budget(9).next_start_in_s(2, "usage", 0) is None
    assert restarts.Budget(0).next_start_in_s(137, "killed", 0) is None
    roles = {(job, ps) for job in ("chief", "worker", "evaluator") for ps in (False, True)} | {("ps", True)}
    assert set(restarts.POLICY) == roles


# ---- death ----


@pytest.mark.parametrize("task", [slow("worker0"), "worker1"])
@pytest.mark.timed
def test_a_dead_worker_ends_the_group_in_two_seconds(tmp_path, task):
    process = launch(tmp_path, "--workers=3")
    programs = dict(zip(("worker0", "worker1", "worker2"), pids(tmp_path, "worker-0", "worker-1", "worker-2"), strict=True))
    members = group_of(process)
    started_s = time.monotonic()
    os.kill(programs[task], signal.SIGKILL)
    assert_all_gone(members, 3.0)
    measured("worker dies -> group stopped", time.monotonic() - started_s, 2.0)
    done = finish(process, 5)
    assert done.returncode == 137 and f"worker {task[-1]} was killed by signal 9 (SIGKILL)" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("task", ["worker-0", slow("worker-1")])
def test_a_dead_supervisor_ends_the_group(tmp_path, task):
    process = launch(tmp_path, "--workers=2")
    (program,) = pids(tmp_path, task)
    members = group_of(process)
    supervisor = parent_of(program)
    os.kill(supervisor, signal.SIGKILL)
    assert_all_gone(members, 2.0)
    assert finish(process, 5).returncode == 137


@pytest.mark.timed
def test_a_killed_launcher_leaves_nobody(tmp_path):
    process = launch(tmp_path, "--workers=2", "--evaluator", actors=("worker1:orphan",))
    pids(tmp_path, "worker-0", "worker-1", "evaluator-0")
    members = wait_until(lambda: len(found := group_of(process)) >= 7 and found)
    os.kill(process.pid, signal.SIGKILL)
    started_s = time.monotonic()
    assert_all_gone(members, 5.0)
    measured("launcher killed -> nobody left", time.monotonic() - started_s, 5.0)
    finish(process, 5)


def test_what_a_program_started_goes_with_it(tmp_path):
    process = launch(tmp_path, "--workers=2", actors=("worker1:orphan",), ACTOR_STEPS=30)
    members = wait_until(lambda: len(found := group_of(process)) >= 5 and found)
    assert finish(process, 20).returncode == 0
    assert_all_gone(members, 1.0)


# ---- freezing and standing still ----


@pytest.mark.timed
def test_a_frozen_worker_is_found_and_all_stacks_are_written(tmp_path):
    process = launch(tmp_path, "--workers=2", actors=("worker1:freeze",))
    pids(tmp_path, "worker-0", "worker-1")
    started_s = time.monotonic() + 20 * 0.02  # of its 20 steps
    wait_until(lambda: "frozen: " in log(tmp_path, "worker-0"))
    measured("worker frozen -> found (heartbeat 2 s)", time.monotonic() - started_s, 2 + 2)
    done = finish(process, 20)
    assert done.returncode == 142 and "worker 1 is frozen: no heartbeat for" in done.stderr
    for i in range(2):
        assert "most recent call first" in log(tmp_path, f"worker-{i}") and "actor.py" in log(tmp_path, f"worker-{i}")
    assert "most recent call first" not in done.stderr and "actor.py" not in done.stderr, "the terminal is for the one line"


@pytest.mark.slow
def test_a_frozen_program_without_heartbeats_is_found(tmp_path):
    process = launch(tmp_path, "--workers=2", actors=("worker0:silent_program", "worker1:silent_program"))
    frozen = pids(tmp_path, "worker-0", "worker-1")[1]
    os.kill(frozen, signal.SIGSTOP)
    done = finish(process, 10)
    assert done.returncode == 142 and "worker 1 is frozen: its process is stopped" in done.stderr


@pytest.mark.parametrize("task", [slow("worker-0"), "worker-1"])
def test_a_frozen_supervisor_is_found(tmp_path, task):
    process = launch(tmp_path, "--workers=2")
    (program,) = pids(tmp_path, task)
    members = group_of(process)
    supervisor = parent_of(program)
    os.kill(supervisor, signal.SIGSTOP)
    done = finish(process, 15)
    assert done.returncode == 140 and f"{task.replace('-', ' ')} is silent: network or machine" in done.stderr
    assert_all_gone(members, 1.0)


@pytest.mark.timed
def test_a_group_that_stands_still_is_found(tmp_path):
    """Actors do not wait for each other, so both have to stand still; who has done less is to blame."""
    process = launch(tmp_path, "--workers=2", actors=("worker0:stuck", "worker1:stuck"))
    pids(tmp_path, "worker-0", "worker-1")
    started_s = time.monotonic() + 20 * 0.02
    wait_until(lambda: "stuck: " in log(tmp_path, "worker-0"))
    measured("worker stuck -> found (step timeout 2 s)", time.monotonic() - started_s, 2 + 2)
    done = finish(process, 20)
    assert done.returncode == 142 and "stuck: nobody went forward for" in done.stderr
    assert "time.sleep(600)" in log(tmp_path, "worker-1") or "actor.py" in log(tmp_path, "worker-1")


def seen(index: int, now_s: float = 100.0, **values) -> Seen:
    defaults = dict(heard_s=now_s, moved_s=now_s, beat_s=now_s, phase="train", step=7, must_beat=True)
    return Seen(Task("worker", index), **(defaults | values))


LIMITS = Limits(start_timeout_s=60, step_timeout_s=5, heartbeat_timeout_s=3)


def chief_and_server(**values) -> list[Seen]:
    tasks = {"chief": {"phase": "train"}, "ps": {"phase": "serve", "moved_s": 0.0}}
    return [dataclasses.replace(seen(0, **(own | values.get(name, {}))), task=Task(name, 0)) for name, own in tasks.items()]


@pytest.mark.parametrize(
    ("everyone", "code", "text"),
    [
        ([*chief_and_server(), seen(0, phase="serve", exit_code=137, exited_s=90.0), seen(1, phase="serve")], None, ""),
        ([*chief_and_server(), seen(0, phase="serve", beat_s=90.0)], None, ""),  # its own supervisor starts it again
        ([*chief_and_server(), seen(0, phase="serve", heard_s=90.0), seen(1, phase="serve")], None, ""),
        ([*chief_and_server(), seen(0, exit_code=137, exited_s=90.0)], 140, "all workers are lost; worker 0 was killed"),
        ([*chief_and_server(), seen(0, exit_code=2, exited_s=90.0)], 2, "worker 0 ended with exit code 2"),
        ([*chief_and_server(ps={"beat_s": 90.0}), seen(0, phase="serve")], 142, "ps 0 is frozen"),
        ([*chief_and_server(ps={"exit_code": 137, "exited_s": 90.0}), seen(0, phase="serve")], 137, "ps 0 was killed"),
        ([*chief_and_server(chief={"moved_s": 90.0}), seen(0, phase="serve", moved_s=0.0)], 142, "chief 0"),  # stuck
        ([*chief_and_server(chief={"exit_code": 0}), seen(0, phase="serve")], 0, "the chief is done"),
        ([seen(0), seen(1)], None, ""),
        ([seen(0, moved_s=90), seen(1)], None, ""),  # one is still moving
        ([seen(0, moved_s=90), seen(1, moved_s=90, phase="compile")], None, ""),  # compiling may take 60 s
        ([seen(0, moved_s=30), seen(1, moved_s=30, phase="compile")], 142, "stuck"),
        ([seen(0, moved_s=90, steps=5, batches=6), seen(1, moved_s=90, steps=5, batches=5)], 142,
         "worker 1 (phase train, step 7, batch 6 not fetched) is behind for 10.0 s while the others wait"),
        ([seen(0, moved_s=90), seen(1, moved_s=90)], 142, "nobody went forward for 10.0 s"),
        ([seen(0, moved_s=90, phase="wait")], None, ""),  # an evaluator waits for a checkpoint
        ([seen(0, moved_s=90, beat_s=None, must_beat=False)], None, ""),  # a program without tfdist
        ([seen(0, moved_s=90), seen(1, moved_s=90, beat_s=None, must_beat=False)], 142, "worker 0"),
        ([seen(0, moved_s=30, beat_s=None, phase="start")], 142, "worker 0"),  # a start that hangs
        ([seen(0, exit_code=140, exited_s=99.9), seen(1, exit_code=140, exited_s=99.9)], 140, "every process lost a peer"),
        ([seen(0, exit_code=140, exited_s=99.9), seen(1, exit_code=0)], 140, "every process lost a peer"),
        ([seen(0, exit_code=140, exited_s=99.9), seen(1, exit_code=143)], 143, "stopped"),
        ([seen(0, beat_s=90, phase="connect"), seen(1, phase="import")], None, ""),  # TensorFlow waits, nobody can beat
        ([seen(0, beat_s=30, phase="connect"), seen(1, phase="import")], 142, "worker 0 is frozen"),
        ([seen(0), seen(1, beat_s=90, phase="import")], None, ""),  # the same while its libraries are loaded
        ([seen(0), seen(1, beat_s=30, phase="import")], 142, "worker 1 is frozen"),
        ([seen(0), seen(1, beat_s=90, phase="import", suspended=True)], 142, "worker 1 is frozen"),
        ([seen(0), seen(1, beat_s=90, phase="connect", suspended=True)], 142, "worker 1 is frozen"),
        ([seen(0, moved_s=0, phase="finish", must_beat=False)], None, ""),  # its own business
        ([seen(0, moved_s=0, phase="finish")], 142, "stuck"),
        ([seen(0), seen(1, beat_s=96)], 142, "worker 1 is frozen: no heartbeat for 4.0 s (phase train, step 7)"),
        ([seen(0), seen(1, beat_s=96, exiting=True)], None, ""),  # whose threads have ended
        ([seen(0), seen(1, beat_s=30, exiting=True)], 142, "worker 1 is frozen at its exit: no heartbeat for 70.0 s"),
        # who is not heard is silent, whatever its last beat was; who is heard, and does not beat, is frozen
        ([seen(0), seen(1, heard_s=96, beat_s=95.5)], 140,
         "worker 1 is silent: network or machine; nothing of its supervisor for 4.0 s (phase train, step 7)"),
        ([seen(0), seen(1, heard_s=97.5, beat_s=96.5)], None, ""),
        ([seen(0), seen(1, heard_s=98, beat_s=94)], 142, "worker 1 is frozen: no heartbeat for 4.0 s"),
        ([seen(0), seen(1, heard_s=96, beat_s=None, suspended=True, moved_s=95)], 140, "worker 1 is silent"),
        ([seen(0, exit_code=140, exited_s=99.5), seen(1, heard_s=97, beat_s=96.8)], 140, "worker 1 is silent: network or"),
        ([seen(0, exit_code=140, exited_s=99.5), seen(1, heard_s=99.5, beat_s=96.8)], 142, "worker 1 is frozen"),
        ([seen(0), seen(1, beat_s=None, suspended=True, moved_s=96)], 142, "worker 1 is frozen"),
        ([seen(0, exit_code=0), seen(1, exit_code=0)], 0, "done"),
        ([seen(0, exit_code=143), seen(1, exit_code=0)], 143, "stopped"),
        ([seen(0, exit_code=0), seen(1)], None, ""),
        ([seen(0, exit_code=140, exited_s=99.9), seen(1)], None, ""),  # the cause may still come
        ([seen(0, exit_code=140, exited_s=99.0), seen(1)], 140, "worker 0 lost a peer"),
        ([seen(0, exit_code=140, exited_s=99.0), seen(1, exit_code=137, exited_s=99.5)], 137, "worker 1 was killed"),
        ([seen(0, exit_code=1, exited_s=99.2), seen(1, exit_code=3, exited_s=99.1)], 3, "worker 1 ended with exit code 3"),
    ],
)  # fmt: skip
def test_judgement(everyone, code, text):
    verdict = judge(everyone, LIMITS, now_s=100.0)
    assert (verdict and verdict.exit_code) == code and (code is None or text in verdict.message), verdict


# ---- stopping ----


@pytest.mark.parametrize("whom", ["launcher", "one supervisor", "one program", "everyone"])
def test_sigterm_stops_everyone(tmp_path, whom):
    process = launch(tmp_path, "--workers=2")
    programs = pids(tmp_path, "worker-0", "worker-1")
    members = group_of(process)
    supervisor = parent_of(programs[1])
    for pid in {"launcher": [process.pid], "one supervisor": [supervisor], "one program": programs[1:],
                "everyone": [process.pid, *members]}[whom]:  # fmt: skip
        os.kill(pid, signal.SIGTERM)
    done = finish(process, 10)
    assert done.returncode == 143, done.stderr
    assert_all_gone(members, 1.0)
    assert "Traceback" not in done.stderr
    assert all("saved" in log(tmp_path, f"worker-{i}") for i in range(2)), "nobody is cut short"


@pytest.mark.parametrize(("behaviour", "code"), [("save_fails", 4), ("slow_program", 143)])
def test_the_code_of_a_stop_is_the_programs_own(tmp_path, behaviour, code):
    """A save that fails is not "stopped and saved"; a program without heartbeats has the time that it needs."""
    process = launch(tmp_path, "--workers=2", actors=(f"worker1:{behaviour}",))
    pids(tmp_path, "worker-0", "worker-1")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    done = finish(process, 20)
    assert done.returncode == code, done.stderr
    assert behaviour != "slow_program" or "saved" in log(tmp_path, "worker-1")


def test_a_lost_peer_is_never_a_success(tmp_path):
    done = finish(launch(tmp_path, "--workers=2", actors=("worker0:lost", "worker1:lost")), 20)
    assert done.returncode == 140


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    process = launch(tmp_path, "--workers=2", actors=("worker1:deaf",))
    pids(tmp_path, "worker-0", "worker-1")
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process, 10).returncode == 143


@pytest.mark.timed
def test_sigterm_while_a_peer_is_missing(tmp_path):
    """One task of two; the other never comes. It must end at once, not after start_timeout."""
    config = json.dumps({"cluster": {"worker": [*addresses(1), "localhost:1"]}, "task": {"type": "worker", "index": 0}})
    process = start(["-m", "tfdist.cli", "supervise", "--", "python", ACTOR], {"TF_CONFIG": config})
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    started_s = time.monotonic()
    done = finish(process, 5)
    assert done.returncode == 143 and "told to stop before training began" in done.stderr
    assert time.monotonic() - started_s < 3


# ---- starting ----


@pytest.mark.timed
def test_a_missing_peer_is_one_line_in_time(tmp_path):
    config = json.dumps({"cluster": {"worker": [*addresses(1), "localhost:1"]}, "task": {"type": "worker", "index": 0}})
    started_s = time.monotonic()
    done = finish(
        start(["-m", "tfdist.cli", "supervise", "--start-timeout-s=2", "--", "python", ACTOR], {"TF_CONFIG": config}), 10
    )
    assert done.returncode == 140 and time.monotonic() - started_s < 2 + 2
    assert len(done.stderr.splitlines()) == 1 and "worker 1 (localhost:1: connection refused)" in done.stderr


def test_two_groups_at_once(tmp_path):
    both = [launch(tmp_path / str(i), "--workers=2", ACTOR_STEPS=50) for i in range(2)]
    for process in both:
        done = finish(process, 30)
        assert done.returncode == 0, done.stderr


def test_members():
    group = Group([], num_workers=3, num_ps=2, evaluator=True)
    clusters = assign.clusters(group, [f"h:{i}" for i in range(1, 7)])
    assert [str(c.task) for c in clusters] == [
        "chief 0", "worker 0", "worker 1", "worker 2", "ps 0", "ps 1", "evaluator 0",
    ]  # fmt: skip
    for cluster in clusters:
        again, _ = from_tf_config(cluster.to_tf_config())
        assert again == cluster and cluster.leader == Task("chief", 0)
    without = assign.clusters(Group([], num_workers=2), ["h:1", "h:2"])
    assert [str(c.task) for c in without] == ["worker 0", "worker 1"] and without[0].is_chief


@pytest.mark.parametrize(
    ("visible", "workers", "per_worker", "expected"),
    [
        ("0,1,2,3", 2, 0, ["0,1", "2,3"]),
        ("0,1,2", 2, 0, ["0", "1"]),
        ("4,5,6,7", 2, 1, ["4", "5"]),
        ("0", 2, 0, ["-1", "-1"]),
        ("GPU-a,GPU-b", 2, 0, ["GPU-a", "GPU-b"]),
        ("", 2, 0, [None, None]),
        ("-1", 2, 0, [None, None]),
    ],
)
def test_gpus_are_divided(visible, workers, per_worker, expected):
    group = Group([], num_workers=workers, devices_per_worker=per_worker)
    found = assign.gpus_of_workers(group, {"CUDA_VISIBLE_DEVICES": visible})
    assert [found.get(Task("worker", i)) for i in range(workers)] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch"], "expected --workers=N"),
        (["launch", "--workers=0", "--", "train"], "workers"),
        (["launch", "--workers=2"], "expected a program after --"),
        (["launch", "--wrokers=2", "--", "train"], "did you mean workers"),
        (["launch", "--workers=2", "oops", "--", "train"], "unexpected argument 'oops'"),
        (["supervise"], "expected a program after --"),
    ],
)
def test_bad_usage_is_one_line(arguments, expected):
    done = subprocess.run([sys.executable, "-m", "tfdist.cli", *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_program_that_does_not_exist(tmp_path):
    command = ["-m", "tfdist.cli", "launch", "--workers=1", f"--log_dir={tmp_path}", "--", "no-such-program"]
    done = finish(start(command), 10)
    assert done.returncode == 2 and "cannot start no-such-program" in done.stderr


def test_a_program_that_is_alone_can_be_supervised():
    done = finish(start(["-m", "tfdist.cli", "supervise", "--", sys.executable, "-c", "print('alone')"]), 10)
    assert done.returncode == 0 and done.stdout == "alone\n" and done.stderr == ""


def test_limits_reach_train(monkeypatch, tmp_path):
    groups = []
    monkeypatch.setattr(launcher, "run", lambda group: groups.append(group) or 0)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    flags = ["--workers=2", "--heartbeat-timeout-s=3", f"--log-dir={tmp_path}"]
    with pytest.raises(SystemExit):
        processes_command("launch", [*flags, "--", "train", "--config=x.py", f"--workdir={tmp_path}"])
    assert groups[0].command[-1] == "--config.cluster.heartbeat_timeout_s=3.0"
    assert not [a for a in groups[0].command if "step_timeout_s" in a]
