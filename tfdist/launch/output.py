"""What tfdist prints, whatever happens to stdout and stderr: what cannot be written is dropped, and ends or stops nobody.
A character that the encoding lacks is spelt out."""

import asyncio
import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from absl import logging

from tfdist.errors import printable

_MOST_WAITING_BYTES = 8 << 20
_LAST_WORDS_S = 2.0
_STREAMS = {"stdout": 1, "stderr": 2}
_waiting: list["_Detached"] = []  # those of this process, inside of `detached`


def say(text: str) -> None:
    """One line on stderr, whatever others have put in it: a second one could pass for tfdist's own."""
    print(f"tfdist: {printable(' '.join(text.splitlines()))}", file=sys.stderr, flush=True)


def never_fail() -> None:
    """From now on a closed pipe, a terminal that is gone or a full disk raise nothing in this process, nor at its end. For
    the start of a program."""
    for fd in (0, *_STREAMS.values()):
        try:
            os.fstat(fd)
        except OSError:  # or the next file that is opened would get what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    _replace({name: _Dropping(fd) for name, fd in _STREAMS.items() if _is_of_system(name)})


@contextlib.contextmanager
def detached() -> Iterator[None]:
    """Inside, printing does not wait either: a reader that has stopped to read (a pager, a terminal after Ctrl-S) must not
    keep signals and heartbeats waiting. Of what it leaves there too long the rest is dropped."""
    before = {name: getattr(sys, name) for name in _STREAMS}
    streams = {name: _Detached(fd) for name, fd in _STREAMS.items() if _is_of_system(name)}
    _replace(streams)
    _waiting.extend(streams.values())
    try:
        yield
    finally:
        _waiting.clear()
        for name in streams:
            getattr(sys, name).flush()
            streams[name].waiting.put(None)
        until_s = time.monotonic() + _LAST_WORDS_S
        for stream in streams.values():
            stream.thread.join(max(0.0, until_s - time.monotonic()))
        for name in streams:
            _put(name, before[name])


async def passed_on(at_most_s: float) -> None:
    """Waits until what was printed has been passed on: what others write to the same place comes behind it then."""
    until_s = time.monotonic() + at_most_s
    while any(stream.given != stream.taken for stream in _waiting) and time.monotonic() < until_s:
        await asyncio.sleep(0.01)


class _Dropping(io.RawIOBase):
    """A file descriptor that takes everything; what cannot be written is lost."""

    def __init__(self, fd: int):
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return os.isatty(self.fd)

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        left = memoryview(data)
        with contextlib.suppress(OSError):
            while left:
                try:
                    left = left[os.write(self.fd, left) :]
                except BlockingIOError:  # another program that has this terminal made it so
                    select.select([], [self.fd], [])
        return len(data)


class _Detached(_Dropping):
    """The same, in a thread of its own."""

    def __init__(self, fd: int):
        super().__init__(fd)
        self.waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.given = self.taken = 0  # bytes; each is counted by one thread alone
        self.thread = threading.Thread(target=self._pass_on, daemon=True)
        self.thread.start()

    def write(self, data) -> int:
        if self.given - self.taken < _MOST_WAITING_BYTES:
            self.given += len(data)
            self.waiting.put(bytes(data))
        return len(data)

    def _pass_on(self) -> None:
        while (data := self.waiting.get()) is not None:
            super().write(data)
            self.taken += len(data)


def _is_of_system(name: str) -> bool:
    """Whether Python's stream is that of the system: not one that a notebook or a test has put in its place."""
    stream: TextIO | None = getattr(sys, name)
    try:
        return stream is None or stream.fileno() == _STREAMS[name]
    except (OSError, ValueError, AttributeError):
        return False


def _replace(files: dict[str, io.RawIOBase]) -> None:
    for name, file in files.items():
        old: TextIO | None = getattr(sys, name)
        if old is None:
            new = io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", errors="backslashreplace", line_buffering=True)
        else:
            with contextlib.suppress(OSError):
                old.flush()
            # without a buffer (python -u) where there was none
            new = io.TextIOWrapper(
                file if old.write_through else io.BufferedWriter(file), encoding=old.encoding, errors="backslashreplace",
                line_buffering=old.line_buffering, write_through=old.write_through,
            )  # fmt: skip
        _put(name, new)


def _put(name: str, stream: TextIO | None) -> None:
    """Where Python looks for it, and absl, which has looked already."""
    handler = logging.get_absl_handler().python_handler
    if handler.stream is getattr(sys, name):
        handler.setStream(stream)
    setattr(sys, name, stream)
