"""The processes of TensorFlow's data service, which `tfdist launch --data_workers=N` starts beside those that train."""

import os
from pathlib import Path

from tfdist import programs
from tfdist.cluster import ports
from tfdist.launch.member import open_log
from tfdist.launch.process import OwnProcess, tied
from tfdist.launch.watchdog import describe_exit

_MODULE = "tfdist.data.service"


class DataService:
    """A dispatcher and so many workers, each a process in a group of its own that ends with this one."""

    def __init__(self, num_workers: int, log_dir: Path):
        self.processes: dict[str, OwnProcess] = {}
        reserved = [ports.reserve() for _ in range(num_workers + 1)]
        dispatcher, *workers = (sock.getsockname()[1] for sock in reserved)
        for sock in reserved:
            sock.close()
        self.address = f"localhost:{dispatcher}"
        self._start("data-dispatcher", log_dir, dispatcher)
        for i, port in enumerate(workers):
            self._start(f"data-worker-{i}", log_dir, port, self.address)

    def _start(self, name: str, log_dir: Path, port: int, *dispatcher: str) -> None:
        with open_log(log_dir / f"{name}.log") as log:
            command = [*programs.module(_MODULE), str(os.getpid()), str(port), *dispatcher]
            self.processes[name] = OwnProcess(tied(command), stdout=log, stderr=log)

    def failure(self) -> str:
        """What became of the first process that is gone; empty while all are there."""
        for name, process in self.processes.items():
            code = process.poll()
            if code is not None:
                return f"{name} {describe_exit(code)}"
        return ""

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
