"""Ports of this machine: who holds one, and taking one."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import resource
import socket
import time
from pathlib import Path

from tfdist.errors import UserError

_RETRY_S = 0.2
BACKLOG = 1024  # connections that wait to be accepted


class PortTaken(UserError):
    """Another process of this machine listens there."""


def listen(port: int, host: str = "") -> socket.socket:
    """A listening socket: on loopback alone for a `host` that is this machine by any name of loopback, else on all
    interfaces, IPv4 and IPv6. Raises OSError when the port is taken."""
    if host.lower() == "localhost":
        return socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
    if _is_loopback(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


async def take(port: int, host: str, give_up_s: float) -> socket.socket:
    """Listens; tries again until the monotonic clock says `give_up_s`: who had the port before may still be dying.

    Raises `PortTaken` that names the holder, or `UserError` that says why not.
    """
    while True:
        try:
            return listen(port, host)
        except OSError as error:
            if is_out_of_descriptors(error):
                raise UserError(out_of_descriptors()) from None
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"cannot listen on port {port}: {error.strerror}; give this task another port") from None
            if time.monotonic() >= give_up_s:
                raise PortTaken(f"port {port} is taken by {holder(port)}; stop it, or give this task another port") from None
        await asyncio.sleep(_RETRY_S)


def is_out_of_descriptors(error: BaseException | None) -> bool:
    """Whether this process, or the machine, may open no more files and sockets."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def out_of_descriptors() -> str:
    """What to say then."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"expected to open more files and sockets, found a limit of {most} for a process; raise it (ulimit -n {4 * most})"


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
