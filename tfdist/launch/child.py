"""Becomes another program that dies with its supervisor. Run as a script, by its path, without site packages:

    python -S -E child.py FD SUPERVISOR_PID WAIT_S COMMAND ...

The wish to be killed with the parent (PR_SET_PDEATHSIG, Linux) outlives exec. Setting it here rather than between fork
and exec of the supervisor keeps Python code out of a forked copy of a process with threads.
"""

import os
import signal
import sys
import time


def main(fd: str, supervisor_pid: str, wait_s: str, *command: str) -> None:
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(supervisor_pid):  # it died before the wish was made
        os._exit(140)
    time.sleep(float(wait_s))
    os.environ["TFDIST_SUPERVISOR"] = f"{fd}:{os.getpid()}"
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"tfdist: cannot start {command[0]}: {error.strerror}\n".encode())
        os._exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
