"""Becomes another program that dies with the process that started it. Run as a script, by its path, without site packages:

    python -S -E child.py FD PARENT_PID WAIT_S COMMAND ...

FD is the socket of a training process to its supervisor; empty for others.

The wish to be killed with the parent (PR_SET_PDEATHSIG, Linux) outlives exec. Setting it here rather than between fork
and exec of the parent keeps Python code out of a forked copy of a process with threads.
"""

import contextlib
import os
import signal
import sys
import time


def main(fd: str, parent_pid: str, wait_s: str, *command: str) -> None:
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent_pid):  # it died before the wish was made
        os._exit(140)
    time.sleep(float(wait_s))
    if fd:
        os.environ["TFDIST_SUPERVISOR"] = f"{fd}:{os.getpid()}"
    try:
        os.execvp(command[0], command)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(2, f"tfdist: cannot start {command[0]}: {error.strerror}\n".encode())
        os._exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
