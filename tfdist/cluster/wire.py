"""One JSON object a line over a socket: what preflight and supervisors say to each other."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

MAX_LINE_BYTES = 1 << 21  # the hello of 4,096 pods with the longest names has 1.1 MB


class Connection:
    """Both ends of one connection. A line that is too long or no JSON object ends it, and is its `problem`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer, self.problem = reader, writer, ""
        self.heard_s = time.monotonic()  # when the last message came
        self.inbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()  # what came after the preflight; None: the end

    def send(self, message: dict[str, Any]) -> None:
        """Does not wait; a connection that is gone is found by the reader."""
        with contextlib.suppress(OSError, RuntimeError):
            if not self.writer.is_closing():
                self.writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        try:
            line = await self.reader.readline()
        except OSError:
            return None
        except ValueError:
            self.refuse("a line that is too long")
            return None
        if not line.endswith(b"\n"):
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.refuse(f"a line that is no JSON object: {line[:40]!r}")
            return None
        self.heard_s = time.monotonic()
        return message

    def refuse(self, problem: str) -> None:
        """Ends it, because of what the other end has sent."""
        self.problem = problem
        with contextlib.suppress(OSError, RuntimeError):
            self.writer.close()

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        while (message := await self.receive()) is not None:
            yield message

    async def close(self, grace_s: float = 0.5) -> None:
        """Sends what is still waiting, for at most `grace_s`."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            self.writer.close()
            await asyncio.wait_for(self.writer.wait_closed(), grace_s)


async def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Raises OSError: `socket.gaierror` for a name that cannot be resolved, `TimeoutError` past the limit."""
    addresses = await asyncio.wait_for(_addresses(host, port), timeout_s)
    problem: OSError = ConnectionRefusedError("no address")
    for family, kind, protocol, _, address in addresses:
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connection, address), timeout_s)
            return Connection(*await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES))
        except (OSError, asyncio.TimeoutError) as error:
            connection.close()
            problem = error if isinstance(error, OSError) else TimeoutError("timed out")
    raise problem


async def _addresses(host: str, port: int) -> list[tuple]:
    """`getaddrinfo` in a daemon thread: a name server that does not answer must not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future = loop.create_future()

    def settle(result, error) -> None:
        if not found.done():
            found.set_exception(error) if error else found.set_result(result)

    def look_up() -> None:
        result = error = None
        try:
            result = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as problem:
            error = problem
        except Exception as problem:  # a label that is too long, a module that cannot be loaded
            error = socket.gaierror(socket.EAI_NONAME, str(problem))
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=look_up, daemon=True).start()
    return await found
