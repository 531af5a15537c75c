"""SIGTERM and Ctrl-C ask the loop to stop after the step in flight."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator


class StopRequest:
    """`on_request` is called in a thread when a signal arrives, also while the main thread is inside TensorFlow, where
    Python handlers do not run. A second Ctrl-C raises `KeyboardInterrupt` in the main thread."""

    def __init__(self, on_request: Callable[[], None]):
        self.on_request, self.requested = on_request, False
        self._interrupts = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Handles both signals inside, and puts the old handlers back. Elsewhere than in the main thread: nothing.

        To be called after the strategy is made: TensorFlow installs a C handler that swallows SIGTERM.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        listener = threading.Thread(target=self._listen, args=(ours,), daemon=True)
        listener.start()
        fd_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            theirs.close()
            listener.join()
            ours.close()

    def _handle(self, number, _frame) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _listen(self, numbers: socket.socket) -> None:
        """The system writes the number of each signal, at once."""
        while received := numbers.recv(64):
            for number in received:
                if number in (signal.SIGINT, signal.SIGTERM) and not self.requested:
                    self.requested = True
                    name = signal.Signals(number).name
                    self.on_request()
                    said = f"\ntfdist: {name}: saving after the step in flight (Ctrl-C again stops at once)\n"
                    with contextlib.suppress(OSError):  # nobody can read it
                        os.write(2, said.encode())
