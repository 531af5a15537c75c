"""A process that has imported TensorFlow, Keras and tfdist and has run no operation: it forks a child for each program of
the tests, which begins after 0.1 s instead of 3. `processes.fork` asks for one, and starts this on its first use:

    python tests/zygote.py SOCKET OWNER_PID

It has no threads of its own (a fork copies the one that calls it) and ends with its owner, the first process of pytest.
What the children share: the seed of hashes, and what is read from the environment by imports (`AT_IMPORT`).
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

# what only a new process can have another way
AT_IMPORT = ("PYTHON", "LD_", "OMP_", "OPENBLAS_", "MKL_", "KERAS_", "TF_CPP_", "TF_USE_", "TF_ENABLE_", "XLA_FLAGS")
# not the rest of tfdist: stock Keras, which is an oracle, runs in such children too
IMPORTS = ("numpy", "tensorflow", "keras", "tfdist")
MAX_BYTES = 1 << 17


def serve(path: str, owner_pid: int) -> dict:
    """Forks children until the owner ends. Returns in the children alone: what to run."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # whoever sees it may connect
    children: dict[int, socket.socket] = {}  # a child's process group -> who waits for it
    events, owner = selectors.DefaultSelector(), os.pidfd_open(owner_pid)
    events.register(listener, selectors.EVENT_READ, "listener")
    events.register(owner, selectors.EVENT_READ, "owner")
    while True:
        for key, _ in events.select():
            if key.data == "owner":
                for pid in children:
                    _kill(pid)
                os._exit(0)
            if key.data == "listener":
                client, _ = listener.accept()
                message, fds, _, _ = socket.recv_fds(client, MAX_BYTES, 2)
                if not message:  # it went away
                    client.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    events.close()
                    for connection in (listener, client, *children.values()):
                        connection.close()
                    os.close(owner)
                    return json.loads(message) | {"fds": fds}
                children[pid] = client
                for fd in fds:
                    os.close(fd)
                client.send(str(pid).encode())
                events.register(os.pidfd_open(pid), selectors.EVENT_READ, ("ended", pid))
                events.register(client, selectors.EVENT_READ, ("left", pid))
            elif key.data[1] not in children:  # its end and its caller's came at once
                continue
            elif key.data[0] == "left":  # nobody waits for it any more
                events.unregister(key.fileobj)
                _kill(key.data[1])
            elif key.data[0] == "ended":
                events.unregister(key.fileobj)
                os.close(key.fileobj)
                pid = key.data[1]
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                client = children.pop(pid)
                with contextlib.suppress(KeyError):
                    events.unregister(client)
                with contextlib.suppress(OSError):
                    client.send(str(code).encode())
                client.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def become(arguments: Sequence[str], env: dict[str, str], cwd: str, fds: Sequence[int]) -> None:
    """Turns a child into `python ARGUMENTS...`: a script, `-m MODULE` or `-c TEXT`."""
    os.setsid()
    for fd, number in zip(fds, (1, 2), strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    faulthandler.enable(file=2)
    for name in set(os.environ) - set(env):
        del os.environ[name]
    os.environ.update(env)
    os.chdir(cwd)
    random.seed()
    sys.modules["numpy"].random.seed()
    first, *rest = arguments
    if first == "-m":
        sys.path[0], sys.argv = cwd, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for module in IMPORTS:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else the first collection of each child would copy every page
    become(**serve(sys.argv[1], int(sys.argv[2])))
