"""What supervisors, launcher and peers do to each other: malformed messages, deaths, silence, sleep. Without TensorFlow."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import addresses, finish, start
from test_launch import (
    ACTOR,
    LIMITS,
    QUICK,
    alive,
    assert_all_gone,
    group_of,
    launch,
    parent_of,
    pids,
    seen,
    slow,
    wait_until,
)

from tfdist.cluster.hello import Hello, versions
from tfdist.cluster.preflight import Meeting
from tfdist.cluster.spec import Cluster, Task
from tfdist.cluster.wire import MAX_LINE_BYTES, Connection, connect
from tfdist.launch import process as launch_process
from tfdist.launch import protocol
from tfdist.launch.process import OwnProcess
from tfdist.launch.watchdog import judge

HERE = Path(__file__).parent

# ---- what is no message ----

GOOD = {
    "beat": (protocol.BEAT, {"phase": "train", "step": 1, "batches": 2, "steps": 1, "ticks": 0}),
    "end": (protocol.END_OF_ALL, {"exit_code": 137, "message": "m", "task": ["worker", 1], "step": 3, "stacks": True}),
}
GOOD["status"] = (
    protocol.STATUS,
    GOOD["beat"][1] | {"suspended": False, "exiting": False, "must_beat": True, "silent_s": 0.5, "exit_code": None},
)
NEVER = (float("nan"), float("inf"), -1e400, 1 << 70, [], {}, [[]], {"a": 1}, ["worker"], ["\x1b[31m", 1], ["worker", "1"])
MALFORMED_CODES = (256, -1, 512, 2.0, True, "0", "256")


@pytest.mark.parametrize("what", GOOD)
def test_what_is_malformed_is_named(what):
    fields, good = GOOD[what]
    assert protocol.check(good, fields, what) is good
    for name in fields:
        without = {key: value for key, value in good.items() if key != name}
        codes = MALFORMED_CODES if name == "exit_code" else ()
        for bad in [without, *(good | {name: value} for value in (*NEVER, *codes))]:
            with pytest.raises(protocol.Malformed, match=rf"{what}\.{name}: ") as found:
                protocol.check(bad, fields, what)
            assert str(found.value).isprintable() and len(str(found.value)) < 120


def test_no_line_of_bytes_does_more_than_be_malformed():
    chance = random.Random(1)
    lines = [json.dumps({"end": GOOD["end"][1]}).encode()] * 300
    for line in [b"[" * 100_000, b'{"end":' * 50_000, b"1" * 5000, b"\xff\xfe", b"null", *lines]:
        damaged = bytearray(line)
        for _ in range(chance.randrange(4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        with contextlib.suppress(protocol.Malformed):
            message = protocol.parse(bytes(damaged[: chance.randrange(len(damaged) + 1)]))
            protocol.known(message, protocol.TO_MEMBER)
            end = protocol.check(message["end"], protocol.END_OF_ALL, "end")
            assert 0 <= end["exit_code"] <= 255


END = {"exit_code": 3, "message": "the reason", "task": ["worker", 0], "step": 1}


@pytest.mark.parametrize(
    ("sent", "code", "named"),
    [
        ([json.dumps({"end": END | {"exit_code": 256}}).encode() + b"\n"], 140, "malformed message: end.exit_code: 256"),
        slow([b"garbage\n"], 140, "malformed message: a line that is no JSON object: b'garbage'"),
        slow([b'{"end": 1}\n'], 140, "malformed message: end: 1"),
        slow([b'{"child": "1"}\n'], 140, "malformed message: child: '1'"),
        ([bytes([byte]) for byte in json.dumps({"end": END}).encode() + b"\n"], 3, "the reason"),  # cut anywhere
    ],
)
def test_what_a_supervisor_tells_its_launcher(tmp_path, sent, code, named):
    """A program in a supervisor's place; it ends with 0, and so must not the group."""
    fake = (
        "import os, time\n"
        f"for part in {sent!r}:\n    os.write(int(os.environ['TFDIST_LAUNCHER_FD']), part)\n    time.sleep(0.001)\n"
        "time.sleep(0.3)\n"
    )
    program = (
        "import sys\nfrom pathlib import Path\nfrom tfdist.launch import assign, launcher\n"
        f"group = assign.Group([sys.executable, '-c', {fake!r}], 1, log_dir=Path({str(tmp_path)!r}))\n"
        "sys.exit(launcher.run(group))"
    )
    done = finish(start(["-c", program]), 20)
    assert done.returncode == code and named in done.stderr and "Traceback" not in done.stderr, done.stderr


def two_workers(index: int) -> tuple[list[Cluster], subprocess.Popen]:
    """A cluster of two, and the real supervisor of one of them; the test plays the other."""
    cluster = Cluster(worker=tuple(addresses(2)))
    both = [dataclasses.replace(cluster, task=task) for task in cluster.tasks]
    process = start(
        ["-m", "tfdist.cli", "supervise", *QUICK, "--", sys.executable, ACTOR],
        {"TF_CONFIG": both[index].to_tf_config(), "TFDIST_JOB_TOKEN": "t"},
    )
    return both, process


def play(cluster: Cluster, sent: list[bytes], pause_s: float = 0.0) -> dict[Task, str]:
    """Meets the others as this task, then sends that, and listens until they go. Returns what each said last."""

    async def run() -> dict[Task, str]:
        meeting = Meeting(cluster, "t", versions())
        try:
            last = {}
            for task, connection in (await meeting.run(20)).items():
                for part in sent:
                    connection.writer.write(part)
                    await connection.writer.drain()
                    await asyncio.sleep(pause_s)
                while (message := await connection.inbox.get()) is not None:
                    last[task] = json.dumps(message)
            return last
        finally:
            await meeting.close()

    return asyncio.run(asyncio.wait_for(run(), 40))


STATUS = GOOD["status"][1]


def line(**message) -> bytes:
    return json.dumps(message).encode() + b"\n"


@pytest.mark.parametrize(
    ("member", "sent", "named"),
    [
        (1, line(status=STATUS | {"exit_code": 256}), "worker 1 is lost: malformed message: status.exit_code: 256"),
        slow(1, line(status=[]), "worker 1 is lost: malformed message: status: a list"),
        (1, line(stop=True)[:-1] + b"}\n", "worker 1 is lost: malformed message: a line that is no JSON object"),
        slow(1, line(stop=1), "worker 1 is lost: malformed message: stop: 1"),
        slow(1, line(other=1), "worker 1 is lost: malformed message: expected status or stop, found 'other'"),
        (0, line(end=GOOD["end"][1] | {"exit_code": 256}), "worker 0 is lost: malformed message: end.exit_code: 256"),
        slow(0, line(end=GOOD["end"][1] | {"task": ["worker"]}), "worker 0 is lost: malformed message: end.task: a list"),
    ],
)
def test_a_malformed_message_of_a_peer_ends_the_connection_and_is_named(member, sent, named):
    both, process = two_workers(1 - member)
    play(both[member], [sent])
    done = finish(process, 20)
    assert done.returncode == 140 and named in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_lines_of_a_peer_that_are_cut_anywhere_are_joined():
    both, process = two_workers(1)
    play(both[0], [bytes([byte]) for byte in line(end=GOOD["end"][1])], 0.002)
    done = finish(process, 20)
    assert done.returncode == 137 and "tfdist: m; the group is stopped" in done.stderr, done.stderr


def test_a_program_that_writes_into_its_supervisors_connection_is_named(tmp_path):
    beat = json.dumps(GOOD["beat"][1])
    program = (
        "import os, time\nfd = int(os.environ['TFDIST_SUPERVISOR'].split(':')[0])\n"
        f"for byte in {beat!r}:\n    os.write(fd, byte.encode()); time.sleep(0.002)\n"  # which is joined
        "os.write(fd, b'\\n'); time.sleep(0.5); os.write(fd, b'{\"phase\": 1}\\n'); time.sleep(30)\n"
    )
    done = finish(start(["-m", "tfdist.cli", "supervise", "--", sys.executable, "-c", program]), 20)
    assert done.returncode == 1 and "malformed message: beat.phase: 1" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("parts", "code", "said"),
    [
        ([b"st", b"op", b"\n"], 7, ""),
        ([b"lost wor", b"ker 3\nst", b"op\n"], 7, "lost worker 3\n"),
        ([b"lost worker x\n"], 140, "tfdist: the supervisor of this process sent b'lost worker x', expected stop or lost\n"),
        ([b"?" * 100], 140, "expected stop or lost\n"),
    ],
)
def test_what_a_supervisor_tells_its_process(parts, code, said):
    program = (
        "import os, signal, sys, time\nfrom tfdist.cluster.link import SupervisorLink\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
        "link = SupervisorLink(int(sys.argv[1]))\n"
        "link.on_lost(lambda task: print('lost', task, file=sys.stderr, flush=True))\ntime.sleep(30)"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command, fds = [sys.executable, "-c", program, str(theirs.fileno())], [theirs.fileno()]
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE, text=True)
        ours.recv(1 << 16)  # its first beat: its handler is there
        for part in parts:
            ours.send(part)
            time.sleep(0.05)
        try:
            assert process.communicate(timeout=10)[1].endswith(said) and process.returncode == code
        finally:
            process.kill()


def test_the_hello_of_4096_pods_with_long_names_fits():
    name = "a" * 63
    pods = [f"{name}-{i}.{name}.{'b' * 63}.svc.cluster.local.example.org:2222" for i in range(4096)]
    assert max(map(len, pods)) > 220
    hello = Hello.of(Cluster(worker=tuple(pods)), "t", versions())

    async def run() -> None:
        heard = asyncio.get_running_loop().create_future()

        async def welcome(reader, writer):
            heard.set_result(await Connection(reader, writer).receive())
            writer.close()

        server = await asyncio.start_server(welcome, "localhost", 0, limit=MAX_LINE_BYTES)
        connection = await connect("localhost", server.sockets[0].getsockname()[1], 5)
        connection.send(hello.to_json())
        assert Hello.parse(await heard) == hello
        await connection.close()
        server.close()

    asyncio.run(asyncio.wait_for(run(), 20))


# ---- who is to blame ----


@pytest.mark.parametrize("member", [1, slow(0)])
def test_a_peer_that_is_not_heard_any_more_is_silent_on_either_side(member):
    """Its connection stays open, as when a network is cut; its process beat a moment before."""
    both, process = two_workers(1 - member)
    heard = play(both[member], [line(status=STATUS)] if member else [line(alive=True)])
    done = finish(process, 20)
    who = f"worker {member} is silent: network or machine"
    assert done.returncode == 140 and who in done.stderr and "frozen" not in done.stderr, done.stderr
    assert member == 0 or (who in heard[Task("worker", 0)] and '"exit_code": 140' in heard[Task("worker", 0)])


def test_a_supervisor_that_slept_gives_everybody_a_new_heartbeat():
    slept = [seen(i, heard_s=50, beat_s=49, moved_s=49) for i in range(2)]
    assert judge(slept, LIMITS, now_s=100.0) is not None
    for one in slept:
        one.renew(100.0)
    assert judge(slept, LIMITS, now_s=100.0) is None and judge(slept, LIMITS, now_s=102.9) is None
    assert judge([*slept, seen(2)], LIMITS, now_s=103.1).exit_code == 140  # and no more than that
    silent_program = seen(0, beat_s=None, must_beat=False)
    silent_program.renew(100.0)
    assert silent_program.beat_s is None
    assert all(0.2 < dataclasses.replace(LIMITS, heartbeat_timeout_s=s).late_s <= s / 2 for s in (1.0, 2.0, 30.0))


def test_a_group_that_slept_longer_than_the_heartbeat_goes_on(tmp_path):
    process = launch(tmp_path, "--workers=2")
    pids(tmp_path, "worker-0", "worker-1")
    time.sleep(0.7)
    everyone = [process.pid, *group_of(process)]
    for number, seconds in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 1.0)):  # the heartbeat is 2 s
        for pid in everyone:
            os.kill(pid, number)
        time.sleep(seconds)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    done = finish(process, 15)
    assert done.returncode == 143 and "nothing ran here for 3" in done.stderr, done.stderr


# ---- parents and children ----


def kill(members: list[int]) -> None:
    """What a test that failed has left."""
    for pid in filter(alive, members):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_stopped_supervisors_end_with_their_launcher(tmp_path):
    """And what their programs have started."""
    process = launch(tmp_path, "--workers=2", actors=("worker1:orphan",))
    programs = pids(tmp_path, "worker-0", "worker-1")
    members = wait_until(lambda: len(found := group_of(process)) >= 5 and found)
    for program in programs:
        os.kill(parent_of(program), signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    finish(process, 5)
    try:
        assert_all_gone(members, 5.0)
    finally:
        kill(members)


@pytest.mark.parametrize("how", [slow("tied"), "tied and stopped", "free"])
def test_a_supervisor_ends_with_its_starter_only_if_it_is_told_to(tmp_path, how):
    flags = ["--with-parent"] if how != "free" else []
    command = [sys.executable, "-m", "tfdist.cli", "supervise", *flags, "--", sys.executable, ACTOR, "worker0:orphan"]
    starter = (
        "import subprocess, sys, time\n"
        f"log = open({str(tmp_path / 'log')!r}, 'w')\n"
        f"process = subprocess.Popen({command!r}, stdout=log, stderr=log, start_new_session=True)\n"
        "print(process.pid, flush=True)\ntime.sleep(600)"
    )
    process = start(["-c", starter])
    supervisor = int(process.stdout.readline())
    started = re.compile(r"(?:pid|grandchild) (\d+).*\n")
    wait_until(lambda: len(started.findall((tmp_path / "log").read_text())) == 2)
    members = [supervisor, *map(int, started.findall((tmp_path / "log").read_text()))]
    try:
        if how == "tied and stopped":
            os.kill(supervisor, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        finish(process, 5)
        if how == "free":
            time.sleep(1.0)
            assert all(map(alive, members))
            os.kill(supervisor, signal.SIGTERM)
        assert_all_gone(members, 5.0)
    finally:
        kill(members)


def test_the_number_of_a_process_is_its_own_until_its_group_is_killed(monkeypatch):
    signals = []

    def recorded(pid: int, number: int) -> None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises for what is no child any more
        signals.append(number)

    process = OwnProcess(["sh", "-c", "sleep 600 & echo $!; exit 5"], stdout=subprocess.PIPE)
    grandchild = int(process.process.stdout.readline())
    assert process.wait(5) == 5 and alive(grandchild)
    process.kill()
    assert_all_gone([grandchild], 2.0)
    monkeypatch.setattr(launch_process.os, "kill", recorded)
    monkeypatch.setattr(launch_process.os, "killpg", recorded)
    process.kill()
    process.signal(signal.SIGTERM)
    assert signals == [] and process.poll() == 5 and process.process.returncode == 5
    launch_process.kill_orphan(process.pid)
    assert signals == [], "the number of one that was reaped may be somebody else's"


WATCHED = """
import os, sys
def watched(real):
    def send(pid, number):
        try:
            pid == os.getpid() or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            open(os.environ["STRAY"], "a").write(f"{sys.argv} sent {number} to {pid}\\n")
        real(pid, number)
    return send
os.kill, os.killpg = watched(os.kill), watched(os.killpg)
"""


@pytest.mark.parametrize("fault", [slow("program"), "supervisor", slow("stopped supervisor")])
def test_no_signal_goes_to_a_number_that_was_reaped(tmp_path, fault):
    """Every signal that the launcher and its supervisors send goes to a child of theirs that is not reaped yet."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(WATCHED)
    path = os.pathsep.join([str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = launch(tmp_path, "--workers=2", actors=("worker0:orphan", "worker1:orphan"), STRAY=tmp_path / "stray",
                     PYTHONPATH=path)  # fmt: skip
    program = pids(tmp_path, "worker-0", "worker-1")[1]
    members = wait_until(lambda: len(found := group_of(process)) >= 6 and found)
    if fault == "program":
        os.kill(program, signal.SIGKILL)
    else:
        os.kill(parent_of(program), signal.SIGKILL if fault == "supervisor" else signal.SIGSTOP)
    done = finish(process, 20)
    assert done.returncode == (140 if fault == "stopped supervisor" else 137), done.stderr
    assert_all_gone(members, 1.0)
    assert not (tmp_path / "stray").exists(), (tmp_path / "stray").read_text()


@pytest.mark.slow
def test_what_programs_leave_behind_is_reaped_when_it_ends(tmp_path):
    """It becomes the launcher's own child, so that it can be told from a stranger with its number."""
    command = ["launch", "--workers=1", f"--log-dir={tmp_path}", "--", "sh", "-c", "(sleep 3 &); sleep 600"]
    process = start(["-m", "tfdist.cli", *command])
    own = lambda: [pid for pid in group_of(process) if parent_of(pid) == process.pid]  # noqa: E731
    orphan = max(wait_until(lambda: len(found := own()) == 2 and found))  # the other one is the supervisor
    wait_until(lambda: not Path(f"/proc/{orphan}").exists(), 10)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 10).returncode == 143


# ---- parameter servers ----


@pytest.mark.parametrize("evaluator", [False, slow(True)])
def test_with_servers_a_run_whose_chief_is_done_is_done(tmp_path, evaluator):
    """Though the supervisor of a worker was killed; an evaluator is not cut short by that either."""
    actors = ["worker0:forever", "worker1:forever", "ps0:forever", "evaluator0:longer"]
    process = launch(tmp_path, "--workers=2", "--ps=1", *["--evaluator"] * evaluator, actors=tuple(actors), ACTOR_STEPS=100)
    program = pids(tmp_path, "chief-0", "worker-0", "worker-1")[2]
    os.kill(parent_of(program), signal.SIGKILL)
    done = finish(process, 30)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("worker 1 is lost for good: the supervisor of worker 1 was killed by signal 9 (SIGKILL)") == 1
    assert not alive(program)


@pytest.mark.slow
def test_with_servers_and_no_worker_left_the_group_is_lost(tmp_path):
    process = launch(tmp_path, "--workers=1", "--ps=1", actors=("worker0:forever", "ps0:forever"))
    os.kill(parent_of(pids(tmp_path, "chief-0", "worker-0")[1]), signal.SIGKILL)
    done = finish(process, 30)
    assert done.returncode in (137, 140) and "lost for good" not in done.stderr, done.stderr


# ---- preflight ----


def test_a_stranger_that_says_nothing_leaves_the_error_one_line():
    (here,) = addresses(1)
    config = json.dumps({"cluster": {"worker": [here, "localhost:1"]}, "task": {"type": "worker", "index": 0}})
    process = start(["-m", "tfdist.cli", "supervise", "--start-timeout-s=1", "--", "true"], {"TF_CONFIG": config})
    host, _, port = here.partition(":")

    def reach():
        with contextlib.suppress(OSError):
            return socket.create_connection((host, int(port)), 1)

    with wait_until(reach):
        done = finish(process, 20)
    assert done.returncode == 140 and len(done.stderr.splitlines()) == 1, done.stderr
