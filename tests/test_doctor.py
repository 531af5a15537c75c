"""`tfdist doctor`: its checks, its exit code, and its JSON, alone and on a cluster."""

import json

import pytest
from processes import finish, start, tfdist

from tfdist import doctor
from tfdist.cluster.spec import Cluster, Task


def checks(text: str) -> dict[tuple[str, str], dict]:
    return {(check["section"], check["name"]): check for check in json.loads(text)["checks"]}


def test_a_sound_machine(tmp_path):
    done = tfdist("doctor", "--json", f"--workdir={tmp_path}")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = checks(done.stdout)
    assert found["versions", "tensorflow"]["status"] == "ok" and json.loads(done.stdout)["ok"] is True
    assert "MB/s" in found["disk", str(tmp_path)]["found"] and "alone" in found["cluster", "none"]["found"]
    assert {section for section, _ in found} == {"versions", "machine", "disk", "cluster", "support"}
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_cannot_be_is_a_problem_and_code_7(tmp_path):
    missing = {"cluster": {"worker": ["localhost:1", "localhost:2"]}, "task": {"type": "wroker", "index": 0}}
    done = finish(start(["-m", "tfdist.cli", "doctor", f"--workdir={tmp_path}/new"], {"TF_CONFIG": json.dumps(missing)}))
    assert done.returncode == 7 and "did you mean" in done.stdout and "PROBLEM" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 problem, ")


@pytest.mark.slow
def test_a_missing_peer_is_a_problem(tmp_path):
    missing = {"cluster": {"worker": ["localhost:29871", "localhost:1"]}, "task": {"type": "worker", "index": 0}}
    command = ["-m", "tfdist.cli", "doctor", "--json", "--start-timeout-s=3", f"--workdir={tmp_path}"]
    done = finish(start(command, {"TF_CONFIG": json.dumps(missing)}), 60)
    found = checks(done.stdout)["cluster", "reachability"]
    assert done.returncode == 7 and found["status"] == "problem" and "worker 1 (localhost:1" in found["hint"]


@pytest.mark.slow
def test_on_all_tasks_it_measures_the_all_reduce(tmp_path):
    command = ["-m", "tfdist.cli", "launch", "--workers=2", f"--log-dir={tmp_path}", "--", "doctor", "--json"]
    done = finish(start([*command, f"--workdir={tmp_path}"]), 60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[worker 0] {")]
    found = checks(lines[0].removeprefix("[worker 0] "))
    for dtype in ("float32", "bfloat16"):
        assert float(found["cluster", f"all-reduce {dtype}"]["found"].split()[0]) > 0.01
    assert found["cluster", "reachability"]["found"] == "all 2 tasks have met"


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("keras", "3.15.1", "ok"),
        ("keras", "3.10.0", "ok"),
        ("keras", "3.9.2", "warning"),
        ("tensorflow", "2.22.0", "warning"),
        ("tensorflow", "2.19.1", "ok"),
        ("python", "3.14.0", "warning"),
    ],
)
def test_versions_outside_of_the_tested_range_are_a_warning(name, version, status):
    assert doctor.version_check(name, version).status == status


def test_a_disk_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    assert [check.status for check in doctor.disk(tmp_path / "file" / "workdir")] == ["problem"]


def test_public_addresses_are_a_warning():
    cluster = Cluster(worker=("8.8.8.8:2222", "10.0.0.1:2222"), task=Task("evaluator", 0), source="TF_CONFIG")
    found = {check.name: check for check in doctor.cluster_facts(cluster)}
    assert found["addresses"].status == "warning" and "8.8.8.8:2222" in found["addresses"].found
    private = Cluster(worker=("10.0.0.2:2222", "10.0.0.1:2222"), task=Task("evaluator", 0), source="TF_CONFIG")
    assert "addresses" not in {check.name for check in doctor.cluster_facts(private)}
