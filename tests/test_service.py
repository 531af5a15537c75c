"""The data service: real processes, real servers."""

import os
import signal
import time

import numpy as np
import pytest
from processes import finish, start
from test_data import places, settings

from tfdist.cluster.resolve import DATA_SERVICE
from tfdist.data import input, shards
from tfdist.errors import UserError
from tfdist.launch.data_service import DataService
from tfdist.strategies.base import InputContext


@pytest.fixture(scope="module")
def dataset(text_files, cache_dir):
    return shards.open_source(settings(f"files:{text_files}/*.txt").data, cache_dir)


def test_no_service_is_one_line(dataset):
    with pytest.raises(UserError, match="expected a data service, found none; tfdist launch .*--data_workers"):
        places(dataset, settings(service=True), 1)


@pytest.mark.slow
def test_each_sample_is_handed_out_once(dataset, tmp_path, monkeypatch):
    """Two pipelines with other numbers of rows share the samples of an epoch; the order is that of nobody."""
    service = DataService(2, tmp_path)
    try:
        monkeypatch.setenv(DATA_SERVICE, service.address)
        monkeypatch.setattr(input, "_CHUNK", 16)  # what is fetched ahead is a small part of an epoch
        config = settings(service=True, train__global_batch_size=5)
        number = (dataset.splits["train"].tokens - 1) // 16
        steps = number // 5 // 2
        before_s = [cpu_s(process.pid) for process in list(service.processes.values())[1:]]
        found = [places(dataset, config, steps, InputContext(w, 2)) for w in range(2)]
        assert sorted(share.shape[1] for share in found) == [2, 3]
        seen = np.concatenate([share.ravel() for share in found])
        assert len(set(seen)) == len(seen) and set(seen) <= set(np.arange(number) * 16)
        assert service.failure() == ""
        after_s = [cpu_s(process.pid) for process in list(service.processes.values())[1:]]
        assert all(after - before > 0.02 for after, before in zip(after_s, before_s, strict=True)), "both work"
        os.killpg(service.processes["data-worker-1"].pid, signal.SIGKILL)
        service.processes["data-worker-1"].wait(5)
        assert service.failure() == "data-worker-1 was killed by signal 9 (SIGKILL)"
    finally:
        service.close()


@pytest.mark.slow
def test_a_lost_data_worker_ends_the_group(text_files, tmp_path):
    """One line, exit code 140, nobody left."""
    workdir = tmp_path / "run"
    train = ["train", "--config=tests/tiny.py", f"--workdir={workdir}", f"--config.data.source=files:{text_files}/*.txt"]
    more = ["--config.data.service=true", "--config.train.num_steps=100000"]
    process = start(["-m", "tfdist.cli", "launch", "--workers=2", "--data_workers=1", "--", *train, *more])
    until_s = time.monotonic() + 120
    while not (workdir / "checkpoints" / "step-00000010").exists() and time.monotonic() < until_s:
        time.sleep(0.1)
    (worker,) = [int(p) for p in os.listdir("/proc") if p.isdigit() and is_data_worker(p, process.pid)]
    os.kill(worker, signal.SIGKILL)
    done = finish(process, 60)
    assert done.returncode == 140, done.stderr[-2000:]
    assert "the data service is lost: data-worker-0 was killed by signal 9 (SIGKILL)" in done.stderr
    assert not [p for p in os.listdir("/proc") if p.isdigit() and is_data_worker(p, process.pid, 2)]


def cpu_s(pid: int) -> float:
    """Of a process, by now."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_data_worker(pid: str, parent: int, arguments: int = 3) -> bool:
    """Whether a process is `python -m tfdist.data.service PARENT PORT DISPATCHER`."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode().split("\0")
    except OSError:
        return False
    return "tfdist.data.service" in words and str(parent) in words and len(words) - words.index(str(parent)) > arguments
