"""SIGTERM and Ctrl-C ask the loop to stop after the steps in flight."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """`requested` turns True when a signal arrives. A second Ctrl-C raises `KeyboardInterrupt` at once."""

    def __init__(self):
        self.requested = False

    def _handle(self, number, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        # not print: it may have been interrupted in the middle of a write, and must not be entered twice
        os.write(2, f"\ntfdist: {name}: saving after the steps in flight (Ctrl-C again stops at once)\n".encode())

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Handles both signals inside, and puts the old handlers back. Elsewhere than in the main thread: nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
