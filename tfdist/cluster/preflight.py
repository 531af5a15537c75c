"""Everybody meets everybody before TensorFlow is imported, because TensorFlow waits an hour for a peer that is not there.

Each task listens on its own port, connects to every task (itself too, at the address that it advertises) and compares
what must be equal. When all have met all, the leader says "go" and the ports are free for TensorFlow. Plain sockets.
"""

import asyncio
import ipaddress
import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from tfdist.cluster import ports
from tfdist.cluster.hello import Hello, versions
from tfdist.cluster.spec import Cluster, Task, split_address
from tfdist.cluster.wire import Connection, connect
from tfdist.errors import STOPPED, Failure, PeerLost, UserError, one_line

_HELLO_S = 5.0  # a connection that does not introduce itself is closed
_CONNECT_S = 3.0
_STRANGERS = 32  # that may be connected at once, and two for each task
_ACCEPTED_AT_ONCE = 16
_FREED_S = 3.0  # sockets are closed a little after they are dropped, and accepted again after a second
_LONGEST_LINE_BYTES = 1 << 16
_RETRY_S = 0.2
_PORT_RETRY_S = 3.0
_OWN_ERROR_FIRST_S = 0.5
_SAY_AFTER_S, _SAY_EVERY_S = 4.0, 30.0  # who waits says for whom
_ANSWER_S = 2.0  # one who is there answers at once
_SUSPECT_S = 3.0  # a suspicion becomes an error unless everybody has met by then


class Disagreement(UserError):
    """Two tasks were started differently; both find it."""


class ToldToStop(Failure):
    """This task, or a peer, was told to stop before training began: so is everyone."""

    exit_code = STOPPED


def meet(cluster: Cluster, token: str, timeout_s: float) -> None:
    """Meets all peers and lets go of them. For programs without a supervisor; blocks, in a thread of its own because the
    caller may be inside an event loop (a notebook)."""
    failed: list[BaseException] = []

    async def run() -> None:
        meeting = Meeting(cluster, token, versions())
        try:
            await meeting.run(timeout_s)
        finally:
            await meeting.close()

    def body() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class Meeting:
    """One task's side. `facts` are compared by name; differing ones are named in the error."""

    def __init__(self, cluster: Cluster, token: str, facts: Mapping[str, Any]):
        self.cluster, self.me = cluster, cluster.task
        self.mine = Hello.of(cluster, token, facts)
        self.is_unnamed = self.mine.is_unnamed
        self.came: dict[Task, tuple[str, Connection]] = {}  # they reached me: nonce, connection
        self.reached: dict[Task, Connection] = {}  # I reached them
        self.ready: set[Task] = set()  # on the leader: who has met everyone
        self.reasons: dict[Task, str] = {}  # why a task has not been reached yet
        self.own_error: Failure | None = None
        self.for_peers = ""  # the same, in the words that others are told
        self.told: Failure | None = None  # another task's error
        self.go = False
        self.warned: set[Task] = set()  # of a public address
        # what looks like a mistake but may be a stranger, or a name that still leads to an old address: since when
        self.suspected: dict[Task | None, tuple[float, Failure]] = {}
        self.changed = asyncio.Event()
        self.tasks: list[asyncio.Task] = []
        self.talks: set[asyncio.Task] = set()  # with those that reach me
        self.strangers: dict[Connection, None] = {}  # of them, who has not said who it is; the oldest first
        self.dropped_s = -math.inf  # when many of them were
        self.server: asyncio.Server | None = None

    async def run(self, timeout_s: float) -> dict[Task, Connection]:
        """Returns the connections that stay open: the leader's to everyone, everyone else's to the leader.

        Raises the error that concerns this task: its own first, then what another task said.
        """
        deadline_s = time.monotonic() + timeout_s
        asyncio.get_running_loop().set_exception_handler(self._on_problem)
        for task in self.cluster.tasks:
            self.tasks.append(asyncio.ensure_future(self._reach(task)))
        self.tasks.append(asyncio.ensure_future(self._listen(deadline_s)))
        say_s = time.monotonic() + _SAY_AFTER_S
        while not self.go:
            now_s = time.monotonic()
            if now_s >= say_s:
                say_s = now_s + _SAY_EVERY_S
                logging.warning("waiting for %s; for %.0f s more", self._missing(), deadline_s - now_s)
            due = [error for since_s, error in self.suspected.values() if now_s - since_s > _SUSPECT_S]
            if now_s >= deadline_s:
                self._fail(next((error for _, error in self.suspected.values()), None) or self._incomplete(timeout_s))
            elif due:
                self._fail(due[0])
            if self.own_error or self.told:
                await self._raise()
            self._tell_leader()
            if not self.go:
                await self._change(min(deadline_s - now_s, say_s - now_s, _SUSPECT_S if self.suspected else _SAY_EVERY_S))
        self._stop_listening()
        if self.cluster.is_chief:
            kept = {task: connection for task, (_, connection) in self.came.items() if task != self.me}
        else:
            kept = {self.cluster.leader: self.reached[self.cluster.leader]}
        self._close_all_but(kept.values())
        return kept

    def _on_problem(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Of the event loop. A server that may open no more files reports it again and again, for each that waits."""
        error = context.get("exception")
        if ports.is_out_of_descriptors(error):
            self._out_of_descriptors()
        else:
            loop.default_exception_handler(context)

    def _out_of_descriptors(self) -> None:
        """Many who do not say who they are give way. Without them the limit is too low."""
        if len(self.strangers) > len(self.cluster.tasks) + _ACCEPTED_AT_ONCE:
            self.dropped_s = time.monotonic()
            for stranger in list(self.strangers):
                self._drop(stranger)
        elif time.monotonic() - self.dropped_s > _FREED_S:
            self._fail(UserError(f"{self.me}: {ports.out_of_descriptors()}"))

    def stop(self) -> None:
        """From a signal handler of the event loop: `run` tells the others and raises `ToldToStop`."""
        self._fail(ToldToStop(f"{self.me} was told to stop"))

    async def _change(self, timeout_s: float) -> None:
        """Until something has happened, or for so long. Not `wait_for`, which can swallow a cancellation."""
        waiting = asyncio.ensure_future(self.changed.wait())
        await asyncio.wait({waiting}, timeout=timeout_s)
        waiting.cancel()
        self.changed.clear()

    async def close(self) -> None:
        """Closes everything; what was said last is still sent."""
        self.go = True  # nobody is reached again
        self._stop_listening()
        await asyncio.gather(*self._close_all_but([]))

    def _close_all_but(self, kept) -> list[asyncio.Task]:
        kept = {id(connection) for connection in kept}
        connections = [*self.reached.values(), *(connection for _, connection in self.came.values())]
        return [asyncio.ensure_future(c.close()) for c in connections if id(c) not in kept]

    # ---- my port ----

    async def _listen(self, deadline_s: float) -> None:
        host, port = split_address(self.cluster.address(self.me))
        try:
            listener = await ports.take(port, host, min(time.monotonic() + _PORT_RETRY_S, deadline_s))
        except ports.PortTaken as error:  # by whom is nobody's business but this machine's
            self._fail(UserError(f"{self.me}: {error}"), for_peers=f"{self.me}: port {port} is taken there")
            return
        except UserError as error:
            self._fail(UserError(f"{self.me}: {error}"))
            return
        longest = max(_LONGEST_LINE_BYTES, 2 * len(json.dumps(self.mine.to_json())))  # of each stranger, so much is kept
        self.server = await asyncio.start_server(self._welcome, sock=listener, limit=longest, backlog=_ACCEPTED_AT_ONCE)
        listener.listen(ports.BACKLOG)  # so many may wait nevertheless

    def _stop_listening(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A task of its own: of a coroutine that the loop's end cancels, asyncio would write a traceback."""
        if len(self.strangers) >= 2 * len(self.cluster.tasks) + _STRANGERS:
            self._drop(next(iter(self.strangers)))
        connection = Connection(reader, writer)
        self.strangers[connection] = None
        talk = asyncio.ensure_future(self._introduce(connection))
        self.talks.add(talk)
        talk.add_done_callback(self.talks.discard)

    def _drop(self, stranger: Connection) -> None:
        """One of too many. Whoever belongs to us comes again."""
        del self.strangers[stranger]
        stranger.writer.transport.abort()

    async def _introduce(self, connection: Connection) -> None:
        peer = None
        try:
            hello = Hello.parse(await asyncio.wait_for(connection.receive(), _HELLO_S))
            self.strangers.pop(connection, None)
            peer = self._introduced(hello)
            if peer is None:  # nobody of this job
                # one that seems to be of this job, with a mistake in its TF_CONFIG, must find the mistake as well
                # (the token that it gets is no secret: it is the hash of the cluster)
                may_differ = self.is_unnamed and self.suspected
                connection.send(self.mine.to_json() if may_differ else {"refused": "another job"})
                await connection.close()
                return
            connection.send(self.mine.to_json())
            known = self.came.get(peer)
            if known is not None and known[0] != hello.nonce:
                if await self._answers(known[1]):
                    self._fail(Disagreement(f"{peer} runs twice: {hello.who} came as well; start each task once"))
                    return
                await self._forget(peer)
            self.came[peer] = (hello.nonce, connection)
            self.changed.set()
            await self._read(peer, connection)
        except asyncio.TimeoutError:
            await connection.close()
        finally:
            self.strangers.pop(connection, None)
        if peer is not None and not self.go and self.came.get(peer, ("", None))[1] is connection:
            del self.came[peer]
            self.ready.discard(peer)

    async def _answers(self, connection: Connection) -> bool:
        """Whether the other end is still there: a machine that vanished closes nothing."""
        asked_s = time.monotonic()
        connection.send({"ping": True})
        while connection.heard_s < asked_s and time.monotonic() - asked_s < _ANSWER_S and not self.go:
            await asyncio.sleep(_RETRY_S / 4)
        return connection.heard_s >= asked_s

    async def _forget(self, peer: Task) -> None:
        """Both connections to a machine that vanished; it is met again like one that has never come."""
        self.ready.discard(peer)
        gone = [connection for connection in (self.came.pop(peer)[1], self.reached.get(peer)) if connection is not None]
        await asyncio.gather(*(connection.close() for connection in gone))

    # ---- the others ----

    async def _reach(self, task: Task) -> None:
        """Connects again and again until it has met the task; whatever goes wrong is the reason shown so far."""
        host, port = split_address(self.cluster.address(task))
        while not self.go:
            connection = None
            try:
                connection = await connect(host, port, _CONNECT_S)
                self._warn_if_public(task, connection)
                connection.send(self.mine.to_json())
                if self._answered(task, await asyncio.wait_for(connection.receive(), _HELLO_S)):
                    self.reached[task] = connection
                    self.changed.set()
                    await self._read(task, connection)
                    if self.go:
                        return
                    del self.reached[task]
                    self.reasons[task] = "it came and went away again"
            except socket.gaierror:
                self.reasons[task] = f"cannot resolve {host}"
            except asyncio.TimeoutError:
                self.reasons[task] = "no answer (timed out)"
            except OSError as error:
                if ports.is_out_of_descriptors(error):
                    self._out_of_descriptors()
                self.reasons[task] = (os.strerror(error.errno) if error.errno else str(error)).lower()
            except Exception as error:  # whatever answers there, the next attempt comes
                self.reasons[task] = f"{type(error).__name__}: {error}"[:80]
            if connection is not None:
                await connection.close()
            await asyncio.sleep(_RETRY_S)

    def _answered(self, task: Task, answer: dict[str, Any] | None) -> bool:
        """Whether the right process is at a task's address."""
        address = self.cluster.address(task)
        if answer is not None and "refused" in answer:
            self.reasons[task] = f"{address} answers for another job (TFDIST_JOB_TOKEN differs?)"
            return False
        hello = Hello.parse(answer)
        found = self._introduced(hello)
        if found is None:
            self.reasons[task] = "what answers there is no tfdist task of this job"
            return False
        if found != task:
            self._suspect(task, Disagreement(
                f"{self.me}: expected {task} at {address}, found {found} ({hello.who}); every task needs the same "
                "cluster and its own task.index"
            ))  # fmt: skip
            return False
        if task == self.me and hello.nonce != self.mine.nonce:
            host = split_address(address)[0]
            self._fail(Disagreement(
                f"{self.me} meets another {self.me} at its own address {address} ({hello.who}): it runs twice, or "
                f"{host} is not an address of this machine"
            ))  # fmt: skip
            return False
        self.suspected.pop(task, None)
        return True

    async def _read(self, task: Task, connection: Connection) -> None:
        """What a peer says after its hello; once training has begun, into the connection's inbox."""
        async for message in connection.messages():
            if self.go:
                connection.inbox.put_nowait(message)
                continue
            if message.get("ping") is True:
                connection.send({"pong": True})
            if "error" in message and task != self.me:
                self._hear(task, one_line(message["error"], 2000), message.get("kind"))
            if message.get("ready") is True:
                self.ready.add(task)
            if message.get("go") is True and task == self.cluster.leader:
                self.go = True
            self.changed.set()
        if connection.problem and not self.go:
            logging.warning("%s sent %s; its connection is closed", task, connection.problem)
        connection.inbox.put_nowait(None)

    def _hear(self, task: Task, error: str, kind: Any) -> None:
        if self.told is None:
            if kind == "stop":
                self.told = ToldToStop(error)
            elif kind == "disagreement":
                self.told = Disagreement(error)
            else:
                self.told = PeerLost(error if error.startswith(str(task)) else f"{task}: {error}")

    # ---- hello ----

    def _introduced(self, hello: Hello | None) -> Task | None:
        """Who says hello; None for a stranger. One of us who differs in what must be equal is an error of ours too."""
        if hello is None:
            return None
        if not hello.has_token_of(self.mine):
            if self.is_unnamed and hello.is_unnamed:  # most likely one job, with a mistake in a TF_CONFIG
                self._suspect(None, self._differs(self.mine.difference_of_clusters(hello), f"{hello.task} ({hello.who})"))
            return None
        if difference := self.mine.difference_of_clusters(hello):
            self._fail(self._differs(difference, str(hello.task)))
        elif difference := self.mine.difference_of_facts(hello):
            self._fail(Disagreement(f"{difference}; start all tasks with the same"))
        return hello.task if hello.task in self.cluster.tasks else None

    def _differs(self, difference: str, whose: str) -> Disagreement:
        return Disagreement(f"{self.me}: the cluster differs: {difference} at {whose}; give every task the same cluster")

    # ---- the end ----

    def _tell_leader(self) -> None:
        """When I have met everyone; the leader: when all have."""
        everyone = set(self.cluster.tasks)
        if not (everyone <= self.came.keys() and everyone <= self.reached.keys()):
            return
        if not self.cluster.is_chief:
            self.reached[self.cluster.leader].send({"ready": True})
        elif everyone - self.ready <= {self.me}:
            for task, (_, connection) in self.came.items():
                if task != self.me:
                    connection.send({"go": True})
            self.go = True

    def _suspect(self, task: Task | None, error: Failure) -> None:
        if task not in self.suspected:
            self.suspected[task] = (time.monotonic(), error)
            self.changed.set()

    def _fail(self, error: Failure, for_peers: str = "") -> None:
        if self.own_error is None:
            self.own_error, self.for_peers = error, for_peers or str(error)
            self._tell_everyone()
            self.changed.set()

    def _tell_everyone(self) -> None:
        for connection in [*self.reached.values(), *(connection for _, connection in self.came.values())]:
            connection.send({"error": self.for_peers, "kind": _kind(self.own_error)})

    async def _raise(self) -> None:
        if self.own_error is None:
            await asyncio.sleep(_OWN_ERROR_FIRST_S)  # mine may be on its way
        else:
            # someone may be connecting right now; it should hear the reason, not find a closed door
            known = len(self.came) + len(self.reached)
            await asyncio.sleep(_OWN_ERROR_FIRST_S)
            if len(self.came) + len(self.reached) > known:
                self._tell_everyone()
        raise self.own_error or self.told

    def _incomplete(self, timeout_s: float) -> Failure:
        address = self.cluster.address(self.me)
        if self.me not in self.reached:
            host = split_address(address)[0]
            reason = self.reasons.get(self.me, "no answer")
            if reason.startswith("cannot resolve"):
                return UserError(f"{self.me}: {reason}, its own host; mend the address {address} or the name service")
            return UserError(
                f"{self.me}: {host} is not an address of this machine: it could not meet itself at {address} within "
                f"{timeout_s:g} s ({reason}); give the address that others reach it at"
            )
        return PeerLost(f"{self.me}: not everyone came within {timeout_s:g} s; missing: {self._missing()}")

    def _missing(self) -> str:
        address, missing = self.cluster.address(self.me), []
        for task in self.cluster.tasks:
            if task not in self.reached:
                missing.append(f"{task} ({self.cluster.address(task)}: {self.reasons.get(task, 'no answer')})")
            elif task not in self.came:
                missing.append(f"{task} (is there, but has not reached {self.me} at {address}: a firewall?)")
        missing = missing or [f"{task} (has not met everyone)" for task in self.cluster.tasks if task not in self.ready]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return ", ".join(missing[:8]) + more

    def _warn_if_public(self, task: Task, connection: Connection) -> None:
        peer_name = connection.writer.get_extra_info("peername")  # None: it has closed already
        address = peer_name[0].partition("%")[0] if peer_name else "::1"
        if ipaddress.ip_address(address).is_global and task not in self.warned:
            self.warned.add(task)
            logging.warning(
                "%s is at the public address %s: TensorFlow's traffic is neither encrypted nor authenticated; use a private "
                "network (SECURITY.md)", task, address,
            )  # fmt: skip


def _kind(error: Failure) -> str:
    """Both sides of a disagreement find it, with the same exit code; of another error the peers are only told."""
    if isinstance(error, ToldToStop):
        return "stop"
    return "disagreement" if isinstance(error, Disagreement) else "own"
