"""Ports of this machine: who holds one, and taking one."""

import asyncio
import contextlib
import errno
import os
import socket
import time
from pathlib import Path

from tfdist.errors import UserError

_RETRY_S = 0.2


def listen(port: int) -> socket.socket:
    """A listening socket on all interfaces, IPv4 and IPv6. Raises OSError when the port is taken."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


async def take(port: int, give_up_s: float) -> socket.socket:
    """Listens; tries again until the monotonic clock says `give_up_s`: who had the port before may still be dying.

    Raises `UserError` that names the holder, or says why not.
    """
    while True:
        try:
            return listen(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"cannot listen on port {port}: {error.strerror}; give this task another port") from None
            if time.monotonic() >= give_up_s:
                raise UserError(f"port {port} is taken by {holder(port)}; stop it, or give this task another port") from None
        await asyncio.sleep(_RETRY_S)


def reserve() -> socket.socket:
    """A port that nobody else gets from the system as long as this socket is open, and that a server may still take.

    Bound, not listening: sockets with SO_REUSEADDR may share it, and the system's own choice avoids it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def holder(port: int) -> str:
    """`process 123 (python train.py)`, or "another process" when it cannot be seen. Linux; elsewhere never seen."""
    inodes = _listening_inodes(port)
    if inodes:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if any(os.readlink(fd) in inodes for fd in (folder / "fd").iterdir()):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    return f"process {folder.name} ({command[:100]})"
            except OSError:  # another user's, or gone
                continue
    return "another process"


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, rows):
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    return inodes
