"""TF_CONFIG in and out, Slurm, Kubernetes: tables, and any JSON, any mutation and any bytes."""

import copy
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import addresses, finish, run_forked_cluster, start

from tfdist.cluster import kubernetes, slurm
from tfdist.cluster.resolve import devices_per_worker, resolve
from tfdist.cluster.spec import Cluster, Task, TFConfigError, split_address
from tfdist.cluster.tf_config import from_tf_config
from tfdist.errors import UserError
from tfdist.launch.supervisor import from_launcher
from tfdist.strategies import joined

A, B = "localhost:2222", "localhost:2223"


def config(cluster=None, task=None, **more) -> str:
    cluster = {"worker": [A, B]} if cluster is None else cluster
    task = {"type": "worker", "index": 0} if task is None else task
    return json.dumps({"cluster": cluster, "task": task, **more})


def worker(address) -> str:
    return config({"worker": [address]})


BAD = {
    "2 empty": ("", "is empty"),
    "2b blank": ("  \n", "is empty"),
    "3 not JSON": ("{cluster:", "not JSON at column 2"),
    "4 list": ("[]", "must be an object, got list"),
    "5 null": ("null", "must be an object, got null"),
    "6 string": ('"x"', "must be an object, got string"),
    "6b number": ("3", "must be an object, got integer"),
    "8 no task": (json.dumps({"cluster": {"worker": [A]}}), "task: missing"),
    "9 no cluster": (json.dumps({"task": {"type": "worker", "index": 0}}), "cluster: missing"),
    "10 cluster is a list": (config([A]), "cluster: must be an object"),
    "11 no jobs": (config({}), "cluster: has no jobs"),
    "12 worker is a string": (config({"worker": A}), "cluster.worker: must be a list"),
    "13 no workers": (config({"worker": []}), "cluster.worker: empty"),
    "14 index beyond": (config({"worker": [A]}, {"type": "worker", "index": 1}), "1, but worker has 1 task (0…0)"),
    "15 index below": (config(task={"type": "worker", "index": -1}), "task.index: must be ≥ 0"),
    "16b index padded": (config(task={"type": "worker", "index": " 0"}), "must be an integer, got string"),
    "16c index signed": (config(task={"type": "worker", "index": "+0"}), "must be an integer, got string"),
    "16d index other digits": (config(task={"type": "worker", "index": "\u0661"}), "must be an integer, got string"),
    "17 index float": (config(task={"type": "worker", "index": 0.0}), "task.index: must be an integer, got float"),
    "18 index bool": (config(task={"type": "worker", "index": True}), "task.index: must be an integer, got bool"),
    "19 index null": (config(task={"type": "worker", "index": None}), "task.index: missing"),
    "19b index huge": (config(task={"type": "worker", "index": 10**4000}), "task.index: a very large number"),
    "19c index list": (config(task={"type": "worker", "index": [0]}), "task.index: must be an integer, got list"),
    "20 wroker": (config(task={"type": "wroker", "index": 0}), "unknown job 'wroker'; did you mean 'worker'?"),
    "20b Worker": (config(task={"type": "Worker", "index": 0}), "unknown job 'Worker'; did you mean 'worker'?"),
    "20c master": (config(task={"type": "master", "index": 0}), "unknown job 'master'; did you mean 'chief'?"),
    "21 type is no job here": (config(task={"type": "chief", "index": 0}), "task.type: the cluster has no chief"),
    "22 type missing": (config(task={"index": 0}), "task.type: missing"),
    "22b type is a number": (config(task={"type": 1, "index": 0}), "task.type: must be a string, got integer"),
    "23 task is a string": (config(task="worker"), "task: must be an object"),
    "24 same address": (config({"worker": [A, A]}), "cluster.worker[1] repeats worker[0]"),
    "24b same address, other case": (config({"worker": ["HOST:1", "host:1"]}), "cluster.worker[1] repeats worker[0]"),
    "24c same address, other job": (config({"chief": [A], "worker": [A]}), "cluster.worker[0] repeats chief[0]"),
    "24d same IPv6": (config({"worker": ["[::1]:1", "[0::1]:1"]}), "cluster.worker[1] repeats worker[0]"),
    "25 no port": (worker("localhost"), "cluster.worker[0]: needs host:port"),
    "25b empty port": (worker("localhost:"), "cluster.worker[0]: needs host:port"),
    "25c empty host": (worker(":2222"), "cluster.worker[0]: needs host:port"),
    "26 port 0": (worker("localhost:0"), "cluster.worker[0]: needs host:port"),
    "27 port 70000": (worker("localhost:70000"), "cluster.worker[0]: needs host:port"),
    "27b port with zeros": (worker("localhost:02222"), "cluster.worker[0]: needs host:port"),
    "28 port http": (worker("localhost:http"), "port is not a number"),
    "28b port in other digits": (worker("localhost:\u0661\u0661"), "port is not a number"),
    "29 URL": (worker("http://host:2222"), "give host:port, without http://"),
    "30 space": (worker("local host:2222"), "host has a space"),
    "30b newline": (worker("localhost:2222\n"), "host has a space"),
    "31 two chiefs": (config({"chief": [A, B]}), "at most one chief"),
    "32 two evaluators": (config({"worker": [A], "evaluator": ["c:1", "d:1"]}), "at most one evaluator"),
    "34 unknown job": (config({"workers": [A]}), "unknown job 'workers'; did you mean 'worker'?"),
    "35 servers only": (config({"ps": [A]}, {"type": "ps", "index": 0}), "has no worker and no chief"),
    "37 sparse": (config({"worker": {"5": A}}), "sparse cluster not supported"),
    "38 address is a number": (worker(2222), "cluster.worker[0]: must be a string, got integer"),
    "38b address is null": (worker(None), "cluster.worker[0]: must be a string, got null"),
    "39 deep": ("[" * 100_000, "too deep"),
    "39b deeper than 8": ("[" * 9 + "]" * 9, "too deep"),
    "39c large": ('{"job": "' + "x" * (1 << 20) + '"}', "is longer than"),
    "40 NaN": ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": NaN}}', "not JSON (NaN)"),
    "40b Infinity": ('{"task": -Infinity}', "not JSON (-Infinity)"),
    "41 shell": (worker("localhost:$(touch hacked)"), "host has a space"),
    "41b shell without space": (worker("localhost:$(id)"), "port is not a number"),
    "41c shell in host": (worker("`id`:2222"), "not a host name"),
    "42 bracket not closed": (worker("[::1:2222"), "write IPv6 as [::1]:2222"),
    "42b scope": (worker("[fe80::1%eth0]:22"), "not an IPv6 address"),
    "42c NUL": (worker("[::1\x00]:22"), "not an IPv6 address"),
    "42d any": (worker("0.0.0.0:22"), "not the address of one machine"),
    "42e any IPv6": (worker("[::]:22"), "not the address of one machine"),
    "42f multicast": (worker("224.0.0.1:22"), "not the address of one machine"),
    "42g no IPv4": (worker("256.1.1.1:22"), "not an IPv4 address"),
    "42h short IPv4": (worker("1.2.3:22"), "not an IPv4 address"),
    "42i empty label": (worker("a..b:22"), "not a host name"),
    "42j long label": (worker("a" * 64 + ":22"), "not a host name"),
    "42k same with a dot": (config({"worker": ["host.:1", "host:1"]}), "repeats worker[0]"),
    "42l many": (config({"worker": [f"h{i}:1" for i in range(5000)]}), "at most 4096 tasks"),
    "43 bare IPv6": (worker("::1:2222"), "write IPv6 as [::1]:2222"),
    "43b no IPv6": (worker("[zz]:2222"), "not an IPv6 address"),
    "45 unknown field": (config(clutser={}), "clutser: unknown field"),
    "45b unknown task field": (config(task={"type": "worker", "index": 0, "indx": 1}), "task.indx: unknown field"),
    "45c key twice": ('{"cluster": {"worker": ["a:1"]}, "cluster": {"worker": ["b:1"]}}', "stands twice"),
    "47 other protocol": (config(rpc_layer="mpi"), "rpc_layer: must be 'grpc'"),
    "48 many digits": ('{"task": ' + "9" * 5000 + "}", "TF_CONFIG"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tf_config_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, expected = BAD[name]
    with pytest.raises(TFConfigError) as caught:
        resolve({"TF_CONFIG": text})
    message = str(caught.value)
    assert expected in message and message.startswith("TF_CONFIG: ") and message.isprintable(), message
    assert len(message) < 300 and caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_good_ones():
    cluster = resolve({"TF_CONFIG": config(task={"type": "worker", "index": 1})})
    assert cluster.task == Task("worker", 1) and cluster.leader == Task("worker", 0) and not cluster.is_chief
    assert cluster.address(cluster.task) == B and cluster.source == "TF_CONFIG" and not cluster.is_local
    with_ps = json.dumps({
        "cluster": {"chief": ["h:1"], "worker": ["h:2", "h:3"], "ps": ["h:4"], "evaluator": ["h:5"]},
        "task": {"type": "chief", "index": 0}, "environment": "cloud", "rpc_layer": "grpc", "job": {"any": [1]},
    })  # fmt: skip
    cluster = resolve({"TF_CONFIG": with_ps})
    assert cluster.is_chief and [str(t) for t in cluster.tasks] == ["chief 0", "worker 0", "worker 1", "ps 0"]
    assert [str(t) for t in cluster.collective] == ["chief 0", "worker 0", "worker 1"]


def test_an_empty_object_is_a_single_worker_with_a_warning():
    cluster, warnings = from_tf_config("{}")
    assert cluster.is_local and cluster.is_chief and cluster.source == "TF_CONFIG"
    assert "single worker" in warnings[0]


def test_an_index_as_a_string_is_read_with_a_warning():
    cluster, warnings = from_tf_config(config(task={"type": "worker", "index": "1"}))
    assert cluster.task == Task("worker", 1) and "task.index" in warnings[0]


def test_an_evaluator_is_no_member():
    for jobs in ({"worker": [A]}, {"worker": [A], "evaluator": ["e:1"]}):
        cluster, _ = from_tf_config(config(jobs, {"type": "evaluator", "index": 0}))
        assert [str(t) for t in cluster.tasks] == ["worker 0"] and not cluster.is_chief
    assert cluster.identity() == from_tf_config(worker(A))[0].identity()


def test_nothing_set_is_a_process_alone():
    cluster = resolve({})
    assert cluster.is_local and cluster.is_chief and cluster.source == "nothing"


def test_addresses():
    assert split_address("[::1]:2222") == ("::1", 2222) and split_address("a.b:1") == ("a.b", 1)
    cluster, _ = from_tf_config(worker("[fe80::1]:80"))
    assert split_address(cluster.address(cluster.task)) == ("fe80::1", 80)


# ---- properties ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["cluster", "task", "worker", "chief", "ps", "type", "index", "x"]), inner, max_size=4
        )
    ),
    max_leaves=20,
)
VALID = {
    "cluster": {"chief": ["c:1"], "worker": ["a:1", "[::1]:2"], "ps": ["p-1.x:3"]},
    "task": {"type": "worker", "index": 1},
}


def check(text) -> None:
    from_tf_config("{}")
    started_s = time.thread_time()
    problem = None
    try:
        cluster, _ = from_tf_config(text)
    except TFConfigError as error:
        problem = str(error)
    if problem is not None:
        assert "\n" not in problem and problem.startswith("TF_CONFIG: ")
    else:
        assert isinstance(cluster, Cluster) and hash(cluster) is not None
        again, warnings = from_tf_config(cluster.to_tf_config())
        assert again == cluster and (not warnings or cluster.is_local)
    assert time.thread_time() - started_s < 0.05


# the clock of `check` is the deadline
ANY = settings(max_examples=300, deadline=None)


@ANY
@given(JSON)
def test_any_json(tree):
    check(json.dumps(tree))


@ANY
@given(st.data())
def test_any_mutation_of_a_good_one(data):
    tree = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        places = [(tree, name) for name in tree]
        for section in ("cluster", "task"):
            if isinstance(tree.get(section), dict):
                places += [(tree[section], name) for name in tree[section]]
                for job in tree[section].values():
                    places += [(job, i) for i in range(len(job))] if isinstance(job, list) else []
        if not places:
            break
        holder, name = data.draw(st.sampled_from(places))
        action = data.draw(st.sampled_from(["replace", "delete", "rename"]))
        if action == "delete":
            del holder[name]
        elif action == "rename" and isinstance(holder, dict):
            holder[data.draw(st.text(max_size=8))] = holder.pop(name)
        else:
            holder[name] = data.draw(JSON)
    check(json.dumps(tree))


@ANY
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes(raw):
    check(raw)


@ANY
@given(st.text(max_size=30), st.text(max_size=10))
def test_any_address(host, port):
    check(worker(f"{host}:{port}"))


@pytest.mark.parametrize(
    "text",
    [
        config({"worker": [f"[::{i:x}]:1" for i in range(4096)]}) + "x",
        config({"ps": [f"h{i}:1" for i in range(4096)]}),
        config(job=[{} for _ in range(300_000)]),
        config(task=[1.5] * 200_000),
        config(job=["" for _ in range(200_000)]),
        '"\\"' * 300_000,
        "[" * (1 << 20),
        "[]" * (1 << 19),
        "{" + '"a":' * 200_000,
        '{"' * 400_000,
    ],
)
@pytest.mark.timed
def test_hostile_ones_are_refused_quickly(text):
    with pytest.raises(TFConfigError):
        from_tf_config(text)
    best_s = min(timed(text) for _ in range(3))
    assert best_s < 0.05


def timed(text) -> float:
    started_s = time.perf_counter()
    with pytest.raises(TFConfigError):
        from_tf_config(text)
    return time.perf_counter() - started_s


# ---- Slurm ----


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-03,7],login", ["n01", "n02", "n03", "n7", "login"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1]-ib.cluster,b", ["a1-ib.cluster", "b"]),
    ],
)
def test_slurm_host_lists(text, hosts):
    assert slurm.expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[", "n]", "n[3-1]", "n[a-b]", "n[1-99999999]", "n[]", "a,,b", "n[[1]]"])
def test_bad_slurm_host_lists(text):
    with pytest.raises(ValueError, match="Slurm|hosts"):
        slurm.expand_hosts(text)


STEP = {
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1",
}  # fmt: skip


def test_a_slurm_step():
    cluster = resolve(STEP)
    assert cluster.worker == ("n1:2222", "n1:2223", "n2:2222") and cluster.task == Task("worker", 2)
    assert cluster.source == "Slurm"
    assert resolve(STEP | {"TFDIST_PORT": "4000"}).worker[0] == "n1:4000"
    assert resolve(STEP | {"TF_CONFIG": "{}"}).source == "TF_CONFIG"
    assert slurm.expand_counts("2(x3),1") == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_PROCID": "3"},
        {"SLURM_PROCID": "x"},
        {"SLURM_STEP_TASKS_PER_NODE": "2"},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x"},
        {"SLURM_STEP_NODELIST": "n[1-3]"},
        {"SLURM_DISTRIBUTION": "cyclic"},
        {"TFDIST_PORT": "0"},
    ],
)
def test_a_slurm_step_that_does_not_add_up(change):
    with pytest.raises(UserError):
        resolve(STEP | change)


@pytest.mark.timed
def test_a_long_host_list_is_read_at_once():
    names = [f"n{i}x{i % 7}" for i in range(12_000)]
    started_s = time.perf_counter()
    assert slurm.expand_hosts(",".join(names)) == names
    assert slurm.expand_hosts("n[" + ",".join(map(str, range(12_000))) + "],m")[-2:] == ["n11999", "m"]
    with pytest.raises(ValueError, match="Slurm"):
        slurm.expand_hosts("[," * 50_000)
    seconds = time.perf_counter() - started_s
    assert seconds < 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TFDIST_PORT": "²"}, "TFDIST_PORT: must be a number of 1 to 65535, got '²'"),
        ({"TFDIST_PORT": "9" * 5000}, "TFDIST_PORT: must be a number"),
        ({"TFDIST_DEVICES_PER_WORKER": "٣"}, "TFDIST_DEVICES_PER_WORKER: must be a number"),
        ({"TFDIST_MAX_RESTARTS": "x"}, "TFDIST_MAX_RESTARTS: must be a number"),
        ({"TFDIST_LAUNCHER_FD": "abc"}, "TFDIST_LAUNCHER_FD: must be a number"),
        ({"TFDIST_LAUNCHER_FD": "0"}, "TFDIST_LAUNCHER_FD: expected a socket of tfdist launch, found 0"),
        ({"TFDIST_NUM_WORKERS": "2", "HOSTNAME": "a-1", "JOB_COMPLETION_INDEX": "1" * 5000}, "JOB_COMPLETION_INDEX"),
        ({"TFDIST_NUM_WORKERS": "²", "HOSTNAME": "a-1", "JOB_COMPLETION_INDEX": "1"}, "TFDIST_NUM_WORKERS"),
        ({**STEP, "SLURM_PROCID": "1" * 5000}, "Slurm"),
    ],
)
def test_bad_environment_values_are_one_line(environment, expected):
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        devices_per_worker(environment), resolve(environment), from_launcher(environment)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_bad_environment_value_ends_the_command_with_2():
    done = finish(start(["-m", "tfdist.cli", "supervise", "--", "true"], {"TFDIST_MAX_RESTARTS": "x"}), 20)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "TFDIST_MAX_RESTARTS" in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["launch --workers=200 -- python -c pass", "supervise -- true"])
def test_running_out_of_file_descriptors_is_one_line(command, tmp_path):
    """Of a launcher with too many processes; of a task that has too many to meet."""
    cluster = {"worker": [f"localhost:{20_000 + i}" for i in range(200)]}
    env = {} if command.startswith("launch") else {"TF_CONFIG": config(cluster)}
    few = "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = finish(start(["-c", f"import os, resource, sys; {few}", "-m", "tfdist.cli", *command.split()], env), 30)
    lines = [line for line in done.stderr.splitlines() if "the output of every process" not in line]
    assert done.returncode == 2 and len(lines) == 1 and "ulimit -n" in lines[0], done.stderr[-2000:]


def test_a_batch_script_without_srun_is_alone():
    assert resolve({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"}).is_local
    with pytest.raises(UserError, match="SLURM_PROCID"):
        resolve({k: v for k, v in STEP.items() if k != "SLURM_PROCID"})


# ---- Kubernetes ----

POD = {"JOB_COMPLETION_INDEX": "1", "TFDIST_NUM_WORKERS": "2", "HOSTNAME": "lm-1", "TFDIST_SERVICE": "lm"}


def test_a_kubernetes_indexed_job():
    cluster = resolve(POD)
    assert cluster.worker == ("lm-0.lm:2222", "lm-1.lm:2222") and cluster.task == Task("worker", 1)
    assert cluster.source == "Kubernetes" and kubernetes.cluster({}, 1) is None
    assert resolve({"JOB_COMPLETION_INDEX": "1"}).is_local


@pytest.mark.parametrize(
    "change",
    [
        {"JOB_COMPLETION_INDEX": ""},
        {"JOB_COMPLETION_INDEX": "2"},
        {"TFDIST_NUM_WORKERS": "x"},
        {"HOSTNAME": "elsewhere"},
        {"HOSTNAME": "-1"},
    ],
)
def test_a_pod_that_does_not_add_up(change):
    with pytest.raises(UserError):
        resolve(POD | change)


def test_a_job_that_is_not_indexed_does_not_train_alone():
    with pytest.raises(UserError, match="completionMode: Indexed"):
        resolve({"TFDIST_NUM_WORKERS": "2", "HOSTNAME": "lm-x7f"})


# ---- one cluster a process ----


def test_a_second_cluster_in_a_process_is_refused_and_the_same_one_is_there():
    other = config({"worker": addresses(2)})
    for done in run_forked_cluster(["tests/second_cluster.py", other], workers=2, limit_s=60):
        assert done.returncode == 0 and done.stdout.endswith("all is well\n"), done.stderr[-3000:]


def test_a_cluster_that_was_joined_in_part_or_closed_is_not_joined_again(monkeypatch):
    monkeypatch.setattr(joined, "_joined", [])
    monkeypatch.setattr(joined, "_lost", [])
    strategy, cluster = object(), Cluster()
    assert joined.before(strategy, cluster, {}) is None
    joined.begin()  # and TensorFlow raises
    with pytest.raises(UserError, match="found one that could not be joined whole; start a new process"):
        joined.before(strategy, cluster, {})
    joined.remember(strategy, cluster, {})
    assert joined.before(object(), cluster, {}) is strategy
    joined.leave()
    with pytest.raises(UserError, match="found one that was closed; start a new process"):
        joined.before(strategy, cluster, {})
