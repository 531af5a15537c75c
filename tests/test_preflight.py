"""Everybody meets everybody, or every task says why not, in time. All tasks of a case live in one event loop; sockets and
ports are real."""

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import socket
import time
from pathlib import Path

import pytest
from processes import finish, start

from tfdist.cluster import ports, preflight
from tfdist.cluster.hello import Hello, versions
from tfdist.cluster.preflight import Disagreement, Meeting, ToldToStop
from tfdist.cluster.spec import Cluster, Task
from tfdist.cluster.wire import MAX_LINE_BYTES
from tfdist.errors import PeerLost, UserError

HERE = Path(__file__).parent
TIMEOUT_S = 1.2


@pytest.fixture
def addresses():
    reserved = [ports.reserve() for _ in range(4)]
    yield [f"localhost:{s.getsockname()[1]}" for s in reserved]
    for s in reserved:
        s.close()


def tasks(*workers: str, **jobs) -> list[Cluster]:
    cluster = Cluster(worker=workers, **jobs)
    return [dataclasses.replace(cluster, task=task) for task in cluster.tasks]


async def one(cluster: Cluster, token: str = "t", facts=None, delay_s: float = 0.0, timeout_s: float = TIMEOUT_S):
    await asyncio.sleep(delay_s)
    meeting = Meeting(cluster, token, facts or {})
    try:
        kept = await meeting.run(timeout_s)
        return kept
    except Exception as error:
        return error
    finally:
        await asyncio.sleep(0.1)
        await meeting.close()


def together(*coroutines):
    async def run():
        return await asyncio.gather(*coroutines)

    started_s = time.monotonic()
    results = asyncio.run(asyncio.wait_for(run(), 20))
    return results, time.monotonic() - started_s


@pytest.mark.timed
def test_all_meet_and_the_ports_are_free_again(addresses):
    clusters = tasks(*addresses[:3])
    results, seconds = together(*(one(cluster, delay_s=0.1 * i) for i, cluster in enumerate(clusters)))
    assert set(results[0]) == {Task("worker", 1), Task("worker", 2)}
    assert set(results[1]) == set(results[2]) == {Task("worker", 0)}
    assert seconds < 2
    for address in addresses[:3]:
        ports.listen(int(address.rpartition(":")[2])).close()


def test_chief_workers_and_servers_meet(addresses):
    clusters = tasks(addresses[0], addresses[1], chief=(addresses[2],), ps=(addresses[3],))
    results, _ = together(*map(one, clusters))
    assert set(results[0]) == {Task("worker", 0), Task("worker", 1), Task("ps", 0)}
    assert set(results[3]) == {Task("chief", 0)}


def test_a_single_worker_meets_itself(addresses):
    results, _ = together(one(tasks(addresses[0])[0]))
    assert results == [{}]


@pytest.mark.timed
def test_a_missing_peer_is_named_by_everyone(addresses):
    clusters = tasks(*addresses[:3])
    results, seconds = together(one(clusters[0]), one(clusters[1]))
    for result in results:
        assert isinstance(result, PeerLost) and "worker 2" in str(result) and addresses[2] in str(result), result
        assert "refused" in str(result)
    assert seconds < TIMEOUT_S + 2


@pytest.mark.timed
def test_a_missing_leader_is_named(addresses):
    results, seconds = together(*map(one, tasks(*addresses[:3])[1:]))
    assert all(isinstance(r, PeerLost) and "worker 0" in str(r) for r in results) and seconds < TIMEOUT_S + 2


def test_nobody_starts_before_everyone_has_met_everyone(addresses):
    """Worker 1 cannot reach worker 2, as behind a firewall; the leader itself has met both."""
    clusters = tasks(*addresses[:3])

    class Walled(Meeting):
        async def _reach(self, task: Task) -> None:
            if task == Task("worker", 2):
                self.reasons[task] = "no route to host"
            else:
                await super()._reach(task)

    async def walled():
        meeting = Walled(clusters[1], "t", {})
        try:
            return await meeting.run(TIMEOUT_S)
        except Exception as error:
            return error
        finally:
            await meeting.close()

    results, _ = together(one(clusters[0]), walled(), one(clusters[2]))
    assert all(isinstance(r, PeerLost) for r in results), results
    assert "worker 2" in str(results[1]) and "no route to host" in str(results[1])


def test_a_late_peer_is_waited_for(addresses):
    clusters = tasks(*addresses[:2])
    results, seconds = together(one(clusters[0], timeout_s=5), one(clusters[1], delay_s=0.6))
    assert isinstance(results[0], dict) and isinstance(results[1], dict) and seconds > 0.6


def test_one_that_goes_away_and_comes_back_is_met_again(addresses):
    first, second = tasks(*addresses[:2])

    async def twice():
        meeting = Meeting(second, "t", {})
        attempt = asyncio.ensure_future(meeting.run(TIMEOUT_S))
        await asyncio.sleep(0.3)  # the leader is not there yet
        attempt.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await attempt
        await meeting.close()
        return await one(second)

    results, _ = together(twice(), one(first, delay_s=0.5))
    assert isinstance(results[0], dict) and isinstance(results[1], dict), results


@pytest.mark.timed
def test_an_unresolvable_host_is_named(addresses):
    here, _ = tasks(addresses[0], "no-such-host.invalid:2222")
    (result,), seconds = together(one(here))
    assert isinstance(result, PeerLost) and "cannot resolve no-such-host.invalid" in str(result), result
    assert "worker 1" in str(result) and seconds < TIMEOUT_S + 2


@pytest.mark.timed
def test_an_own_address_of_another_machine(addresses):
    there, here = tasks("192.0.2.1:2222", addresses[0])
    results, seconds = together(one(there), one(here))
    assert isinstance(results[0], UserError) and not isinstance(results[0], PeerLost)
    assert "192.0.2.1 is not an address of this machine" in str(results[0])
    assert "192.0.2.1" in str(results[1]) and seconds < TIMEOUT_S + 2


@pytest.mark.timed
def test_a_taken_port_names_its_holder(addresses):
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        clusters = tasks(addresses[0], f"localhost:{port}")
        results, seconds = together(*(one(c, timeout_s=5) for c in clusters))
    assert isinstance(results[1], UserError) and f"port {port} is taken by process" in str(results[1]), results
    assert f"process {os.getpid()} (" in str(results[1])
    assert isinstance(results[0], PeerLost) and f"worker 1: port {port} is taken there" in str(results[0])
    assert "process" not in str(results[0]), "the arguments of a process are its machine's own business"
    assert seconds < 7


@pytest.mark.timed
@pytest.mark.parametrize("side", [0, 1])
def test_differing_facts_are_named_on_every_task(addresses, side):
    clusters = tasks(*addresses[:3])
    facts = [{"config.train.seed": 1, "version of keras": "3"} for _ in clusters]
    facts[side]["config.train.seed"] = 2
    results, seconds = together(*(one(c, facts=f) for c, f in zip(clusters, facts, strict=True)))
    for result in results:
        assert isinstance(result, Disagreement) and "config.train.seed differs" in str(result), results
        assert f"2 at worker {side}" in str(result)
    assert seconds < 2


def test_differing_versions_are_named(addresses):
    clusters = tasks(*addresses[:2])
    results, _ = together(one(clusters[0], facts=versions()), one(clusters[1], facts={"version of tfdist": "0"}))
    assert all("version of" in str(r) and r.exit_code == 2 for r in results)


@pytest.mark.timed
@pytest.mark.parametrize("token", ["same", None])
def test_differing_clusters_are_named_on_every_task(addresses, token):
    mine, theirs = tasks(*addresses[:2]), tasks(addresses[0], addresses[2])
    results, seconds = together(
        one(mine[0], token or mine[0].identity()), one(theirs[1], token or theirs[1].identity(), delay_s=0.2)
    )
    for result in results:
        assert isinstance(result, Disagreement) and "the cluster differs: cluster.worker[1]" in str(result), results
    assert seconds < 3


@pytest.mark.timed
def test_the_same_index_twice_is_found(addresses):
    clusters = tasks(*addresses[:3])
    results, seconds = together(
        one(clusters[1], timeout_s=5), one(clusters[1], delay_s=0.2, timeout_s=5), one(clusters[0], timeout_s=5)
    )
    texts = list(map(str, results))
    assert all(r.exit_code in (2, 140) for r in results), texts
    assert any("twice" in text for text in texts) and all("worker 1" in text for text in texts), texts
    assert seconds < 7


class Vanishing(Meeting):
    """Of a machine that has met everybody and then says nothing more, and closes nothing."""

    def vanish(self) -> None:
        self._stop_listening()
        for task in self.tasks:
            task.cancel()
        self.gone = [connection.writer for connection in [*self.reached.values(), *(c for _, c in self.came.values())]]
        for writer in self.gone:
            writer.transport.pause_reading()


@pytest.mark.timed
def test_a_machine_that_vanished_and_comes_again_is_met_again(addresses):
    """While worker 2 is still missing. Its connections are open: nobody has closed them."""
    first, second, third = tasks(*addresses[:3])

    async def vanishes():
        meeting = Vanishing(second, "t", {})
        attempt = asyncio.ensure_future(meeting.run(10))
        await asyncio.sleep(1.0)
        assert {first.task, second.task} <= meeting.reached.keys() & meeting.came.keys()
        attempt.cancel()
        meeting.vanish()
        await asyncio.gather(attempt, return_exceptions=True)
        result = await one(second, timeout_s=10)
        for writer in meeting.gone:
            writer.transport.abort()
        return result

    results, seconds = together(one(first, timeout_s=10), vanishes(), one(third, delay_s=2.5, timeout_s=10))
    assert all(isinstance(result, dict) for result in results), results
    assert seconds < 8


@pytest.mark.parametrize(("host", "reached"), [("localhost", False), ("127.0.0.1", False), ("0.0.0.0", True)])
def test_the_port_of_a_localhost_cluster_is_open_on_loopback_alone(host, reached):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks for this machine's own address
            own = probe.getsockname()[0]
        except OSError:
            pytest.skip("this machine has no address but loopback")
    reserved = ports.reserve()
    port = reserved.getsockname()[1]
    with ports.listen(port, host), reserved:
        socket.create_connection(("127.0.0.1", port), 2).close()
        with contextlib.nullcontext() if reached else pytest.raises(OSError):
            socket.create_connection((own, port), 2).close()


def test_a_flood_of_connections_is_one_error(addresses, capfd):
    """Whose process may open no more files: not a line for each that waits."""
    here, _ = tasks(*addresses[:2])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def flooded():
        attempt = asyncio.ensure_future(one(here, timeout_s=5))
        await asyncio.sleep(0.3)
        flood = [socket.socket() for _ in range(60)]
        for connection in flood:
            connection.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(c.fileno() for c in flood) + 3, limits[1]))
        for connection in flood:
            connection.connect_ex(("127.0.0.1", int(addresses[0].rpartition(":")[2])))
        try:
            return await attempt
        finally:
            for connection in flood:
                connection.close()

    try:
        (result,), _ = together(flooded())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(result, UserError) and "ulimit -n" in str(result), result
    assert "system resource" not in capfd.readouterr().err


def test_a_flood_of_strangers_does_not_end_a_job(addresses):
    """More than this process may have open: they give way, and the tasks of the job meet."""
    here, _ = tasks(*addresses[:2])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    other = f"print(asyncio.run(t.one(t.tasks(*{addresses[:2]})[1], timeout_s=15)))"
    there = start(["-c", f"import asyncio, sys; sys.path.insert(0, {str(HERE)!r}); import test_preflight as t; {other}"])

    async def flooded():
        attempt = asyncio.ensure_future(one(here, timeout_s=15))
        await asyncio.sleep(0.1)
        flood = [socket.socket() for _ in range(120)]
        for connection in flood:
            connection.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(c.fileno() for c in flood) + 60, limits[1]))
        try:
            for connection in flood:
                connection.connect_ex(("127.0.0.1", int(addresses[0].rpartition(":")[2])))
            return await attempt
        finally:
            for connection in flood:
                connection.close()

    try:
        (result,), _ = together(flooded())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(result, dict), result
    done = finish(there, 20)
    assert done.returncode == 0 and done.stdout.startswith("{"), (done.stdout, done.stderr)


def test_another_job_does_not_disturb(addresses):
    """Two jobs whose clusters overlap, told apart by their tokens: the one that is complete starts."""
    mine, theirs = tasks(*addresses[:2]), tasks(addresses[0], addresses[2])
    results, _ = together(one(mine[0], "a"), one(mine[1], "a", delay_s=0.5), one(theirs[1], "b"))
    assert isinstance(results[0], dict) and isinstance(results[1], dict)
    assert isinstance(results[2], PeerLost) and "answers for another job" in str(results[2]) or "refused" in str(results[2])


def hello(**changed) -> bytes:
    """Of somebody who knows the token "t", and little else."""
    known = {"token": "t", "nonce": "x", "task": {"type": "worker", "index": 1}, "who": "me", "jobs": {}, "facts": {}}
    return json.dumps(known | changed).encode() + b"\n"


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff" * 1000 + b"\n",
        b"[" * 100_000 + b"\n",
        b"x" * 3_000_000,
        hello(task={"type": "worker", "index": float("inf")}),
        hello(task=["worker", 1]),
        hello(token="\ud800"),
        hello(jobs={"\x1b[31m": ["a:1"]}),
        hello(facts=1),
        hello()[:-9] + b"\n",
    ],
)
def test_noise_on_the_port_is_ignored(addresses, noise):
    clusters = tasks(*addresses[:2])

    async def noisy():
        await asyncio.sleep(0.3)
        reader, writer = await asyncio.open_connection("localhost", int(addresses[0].rpartition(":")[2]))
        with contextlib.suppress(OSError):
            writer.write(noise)
            await writer.drain()
            await asyncio.wait_for(reader.read(), 2)
        writer.close()

    results, _ = together(one(clusters[0], timeout_s=5), noisy(), one(clusters[1], delay_s=0.8, timeout_s=5))
    assert isinstance(results[0], dict) and isinstance(results[2], dict), results


@pytest.mark.parametrize("noise", [b"garbage\n", b"[1]\n", b"x" * (MAX_LINE_BYTES + 2)])
def test_what_does_not_parse_after_a_good_hello_ends_the_connection(addresses, noise, caplog):
    """The task itself is met again."""
    clusters = tasks(*addresses[:2])
    good = json.dumps(Hello.of(clusters[1], "t", {}).to_json()).encode() + b"\n"

    async def noisy() -> bytes:
        await asyncio.sleep(0.3)
        reader, writer = await asyncio.open_connection("localhost", int(addresses[0].rpartition(":")[2]))
        with contextlib.suppress(OSError):
            writer.write(good + noise)
            await writer.drain()
            answer = await reader.readline()
            assert await asyncio.wait_for(reader.read(), 2) == b"", "the connection has ended"
            return answer

    results, _ = together(one(clusters[0], timeout_s=8), noisy(), one(clusters[1], delay_s=1.0, timeout_s=8))
    assert isinstance(results[0], dict) and isinstance(results[2], dict), results
    assert "worker 1 sent a line " in caplog.text


@pytest.mark.timed
def test_one_that_is_told_to_stop_tells_the_others(addresses):
    clusters = tasks(*addresses[:3])

    async def stopped():
        meeting = Meeting(clusters[1], "t", {})
        attempt = asyncio.ensure_future(meeting.run(TIMEOUT_S))
        await asyncio.sleep(0.5)
        meeting.stop()
        with pytest.raises(ToldToStop, match="worker 1 was told to stop"):
            await attempt
        await meeting.close()

    results, seconds = together(one(clusters[0]), stopped())
    assert isinstance(results[0], ToldToStop) and results[0].exit_code == 143 and "worker 1" in str(results[0])
    assert seconds < TIMEOUT_S + 2


def test_without_a_supervisor_a_program_meets_its_peers_itself(addresses):
    clusters = tasks(*addresses[:2])
    with pytest.raises(PeerLost, match="worker 1"):
        preflight.meet(clusters[0], "t", 1.0)


def test_reserved_ports_are_not_given_out_and_can_be_taken():
    reserved = ports.reserve()
    port = reserved.getsockname()[1]
    others = [ports.reserve() for _ in range(50)]
    assert port not in {s.getsockname()[1] for s in others}
    with ports.listen(port):
        assert "process" in ports.holder(port)
    for s in [reserved, *others]:
        s.close()
    assert ports.holder(port) == "another process"


@pytest.mark.timed
def test_fifty_tasks_meet_in_seconds():
    reserved = [ports.reserve() for _ in range(50)]
    clusters = tasks(*(f"localhost:{s.getsockname()[1]}" for s in reserved))
    results, seconds = together(*(one(c, timeout_s=15) for c in clusters))
    for s in reserved:
        s.close()
    assert all(isinstance(r, dict) for r in results) and seconds < 15
