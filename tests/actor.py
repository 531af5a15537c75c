"""A program for tests of the launcher, without TensorFlow: beats like a training process and does what it is told.

    python tests/actor.py [TASK:BEHAVIOUR ...]

A task ("worker1") without a behaviour trains until `STEPS` steps, or until it is told to stop.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

from tfdist.cluster.link import supervisor
from tfdist.cluster.resolve import resolve

STEPS = int(os.environ.get("ACTOR_STEPS", "1000000"))
STEP_S = 0.02


def main(*behaviours: str) -> None:
    cluster = resolve()
    me = f"{cluster.task.type}{cluster.task.index}"
    mine = dict(b.split(":", 1) for b in behaviours).get(me, "train")
    step = 0
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    if mine not in ("silent_program", "slow_program"):
        link = supervisor()
        link.watch(lambda: (step, step))
        link.phase("train", 0)
    print(f"{me} pid {os.getpid()} {mine}", flush=True)
    if mine == "orphan":  # a grandchild that would stay
        print("grandchild", subprocess.Popen(["sleep", "600"]).pid, flush=True)
    steps = {"forever": 10**9, "longer": STEPS + 150}.get(mine, STEPS)
    while step < steps and not told.is_set():
        time.sleep(STEP_S)
        step += 1
        if step == 20:
            if mine == "exit3":
                print("the reason", file=sys.stderr)
                sys.exit(3)
            if mine == "exit1_once" and not os.path.exists(os.environ["ACTOR_FILE"]):
                open(os.environ["ACTOR_FILE"], "w").close()
                sys.exit(1)
            if mine == "lost":
                sys.exit(140)
            if mine == "exit1":
                sys.exit("always the same")
            if mine == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if mine in ("freeze", "silent_freeze"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if mine == "stuck":
                time.sleep(600)
    if mine == "deaf":  # does not stop when told to
        time.sleep(600)
    if told.is_set():
        time.sleep(7 if mine == "slow_program" else 0.3)
        print("saved", flush=True)
        sys.exit(4 if mine == "save_fails" else 143)
    if mine == "environment":
        print("a warning", file=sys.stderr)
        print("environment", json.dumps({name: os.environ.get(name) for name in ("TF_CONFIG", "CUDA_VISIBLE_DEVICES")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
