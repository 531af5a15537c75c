"""Nobody reads what tfdist prints: a closed pipe, a terminal that is gone, a full disk, a reader that has stopped. Signals,
restarts and exit codes are as ever, and what is printed is lost."""

import contextlib
import json
import os
import pty
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import addresses, finish, fork, start
from test_launch import ACTOR, QUICK, log, slow, wait_until

from tfdist.launch.member import open_log
from tfdist.launch.output import say
from tfdist.metrics.writers import read_rows

HERE = Path(__file__).parent
PRINTS_MUCH = "print(*range(100_000), sep='\\n', flush=True)"


@contextlib.contextmanager
def unwritable(kind: str):
    """A file descriptor that takes nothing; an unread pipe takes 64 KiB, and then blocks."""
    if kind == "full disk":
        fds = [os.open("/dev/full", os.O_WRONLY)]
    elif kind == "gone terminal":
        other, end = pty.openpty()
        os.close(other)
        fds = [end]
    else:
        read, write = os.pipe()
        fds = [write, read]
        if kind == "closed pipe":
            os.close(fds.pop())
    try:
        yield fds[0]
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("kind", ["full disk", "unread pipe", slow("closed pipe"), slow("gone terminal")])
def test_a_launcher_restarts_passes_signals_on_and_keeps_the_code(tmp_path, kind):
    command = ["-m", "tfdist.cli", "launch", "--workers=2", "--max-restarts=1", *QUICK, f"--log-dir={tmp_path}/logs"]
    number = {"closed pipe": signal.SIGINT, "gone terminal": signal.SIGHUP}.get(kind, signal.SIGTERM)
    with unwritable(kind) as output:
        program = f"{PRINTS_MUCH}; import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
        actor = ["python", "-c", program, ACTOR, "worker1:exit1_once"]
        process = start([*command, "--", *actor], {"ACTOR_FILE": str(tmp_path / "once")}, output)
        wait_until(lambda: all(len(re.findall(r"pid \d+", log(tmp_path, f"worker-{i}"))) == 2 for i in range(2)))
        time.sleep(0.2)
        process.send_signal(number)
        assert finish(process, 15).returncode == 143
    assert all("saved" in log(tmp_path, f"worker-{i}") for i in range(2))


@pytest.mark.parametrize("kind", ["closed pipe", slow("full disk"), slow("gone terminal")])
def test_the_code_of_a_failure_is_its_own(tmp_path, kind):
    """Of a launcher and of a supervisor: a script that puts jobs back into a queue goes by it."""
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with unwritable(kind) as output:
        launched = start(["-m", "tfdist.cli", "launch", "--workers=1", f"--log-dir={tmp_path}", "--", *kill], {}, output)
        supervised = start(["-m", "tfdist.cli", "supervise", "--", *kill], {}, output)
        config = {"cluster": {"worker": [*addresses(1), "localhost:1"]}, "task": {"type": "worker", "index": 0}}
        waits = ["-m", "tfdist.cli", "supervise", "--start-timeout-s=1", "--", *kill]
        lost = start(waits, {"TF_CONFIG": json.dumps(config)}, output)
        usage = start(["-m", "tfdist.cli", "launch", "--nonsense"], {}, output)
        codes = [finish(process, 20).returncode for process in (launched, supervised, lost, usage)]
    assert codes == [137, 137, 140, 2]


def test_streams_that_are_closed_from_the_start():
    """What is opened next must not get what is printed."""
    program = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = finish(
        start(["-c", program, "-m", "tfdist.cli", "supervise", "--", "sh", "-c", "echo a; echo b >&2; exit 3"]), 20
    )
    assert done.returncode == 3


@pytest.fixture(scope="module")
def train(text_files):
    return [
        "-m", "tfdist.cli", "train", f"--config={HERE / 'tiny.py'}", f"--config.data.source=files:{text_files}/*.txt",
        "--config.eval.every_steps=0", "--config.log.tensorboard=False", "--config.checkpoint.every_steps=0",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["full disk", slow("gone terminal")])
def test_a_run_alone_goes_on_to_its_end(train, tmp_path, kind):
    with unwritable(kind) as output:
        done = finish(fork([*train, f"--workdir={tmp_path}", "--config.train.num_steps=5"], {}, output), 120)
    assert done.returncode == 0
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl", "train")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "report.png").exists() and list((tmp_path / "samples").iterdir())


@pytest.mark.slow
def test_a_run_alone_is_told_to_stop_and_saves(train, tmp_path):
    with unwritable("closed pipe") as output:
        process = fork([*train, f"--workdir={tmp_path}", "--config.train.num_steps=1000000"], {}, output)
        metrics = tmp_path / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(read_rows(metrics, "train")) >= 2, 60)
        os.kill(process.pid, signal.SIGTERM)
        assert finish(process, 30).returncode == 143
    assert list((tmp_path / "checkpoints").glob("step-*/manifest.json"))


def test_a_command_that_is_asked_for_its_output_says_that_it_is_lost():
    with unwritable("full disk") as output:
        assert finish(start(["-m", "tfdist.cli", "--help"], {}, output), 20).returncode != 0


def test_a_stream_that_lacks_a_character_loses_no_line(tmp_path):
    """An old locale. What forwards a worker's output must not end, or the worker stands still at a full pipe."""
    program = "import sys; sys.stdout.buffer.write('\u2713 good\\n'.encode() + b'y' * 3_000_000)"
    command = ["-m", "tfdist.cli", "launch", "--workers=1", f"--log-dir={tmp_path}/logs", "--", "python", "-c", program]
    done = finish(start(command, {"PYTHONIOENCODING": "ascii"}), 30)
    assert done.returncode == 0 and done.stdout.startswith("[worker 0] \\u2713 good\n") and "y" * 1000 in done.stdout
    assert "\u2713 good" in log(tmp_path, "worker-0")


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_folder_of_logs_from_elsewhere_leads_nowhere(tmp_path, kind):
    (tmp_path / "logs").mkdir()
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "logs" / "worker-0.log"
    (tmp_path / "logs" / "latest.log").symlink_to("worker-1.log")  # the user's own
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("../precious")
    done = finish(start(["-m", "tfdist.cli", "launch", "--workers=1", f"--log-dir={path.parent}", "--", "true"]), 20)
    assert done.returncode == 2 and "found worker-0.log, a link or a pipe" in done.stderr
    assert (tmp_path / "precious").read_text() == "mine"
    with contextlib.closing(open_log(path)) as file:  # one that came later
        file.write(b"lost")
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_is_said_is_one_line(capsys):
    say("worker 1 failed\ntfdist: all is well\x1b[2J")
    assert capsys.readouterr().err == "tfdist: worker 1 failed tfdist: all is well\\x1b[2J\n"
