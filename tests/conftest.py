"""Shared fixtures, and how the tests are dealt out. This process runs OneDevice only; other strategies run in processes of
their own (results.py)."""

import functools
import importlib
import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import pairs
import pytest
from processes import kill_what_is_left, session_folder

# later strategies are added here, and the tests of equality cover them; all but the first in the order of what they cost
STRATEGIES = ("mirrored:2", "multi_worker:2x1", "multi_worker:3x1", "mirrored:4", "multi_worker:2x2")
IN_ONE_PROCESS = 4  # cells
# modules whose tests mostly wait, for timeouts and for processes that start: they run beside those that compute
WAITING = (
    "test_launch", "test_output", "test_supervision", "test_preflight", "test_cluster_training", "test_parameter_server",
    "test_service", "test_doctor",
)  # fmt: skip
# fixtures that train: whoever uses one runs in one worker of pytest
DEAR = ("finished", "undisturbed")


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory) -> Path:
    """A token cache of this test session's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TFDIST_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    kill_what_is_left()


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> Path:
    """A small corpus: 30 files of English-like lines. `files:{folder}/*.txt`."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        lines = [f"{i} line {j}: the quick brown fox jumps over {i * j} lazy dogs\n" for j in range(20 + i)]
        (folder / f"{i:02}.txt").write_text("".join(lines))
    return folder


def computed_together(metafunc, columns: Mapping[pairs.Column, Sequence[str]]) -> None:
    """Parametrizes a test with every cell of the columns; those that one process computes go to one worker of pytest."""
    found = []
    for strategy, dtype, cell, together in pairs.in_parts(columns, IN_ONE_PROCESS):
        group = pytest.mark.together(f"{metafunc.module.__name__}-{strategy}-{dtype}-{together[0]}")
        found.append(pytest.param(strategy, dtype, cell, together, marks=group, id=f"{strategy}-{dtype}-{cell}"))
    metafunc.parametrize(("strategy", "dtype", "cell", "together"), found)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--matrix", action="store_true", help="every cell on every strategy in both precisions, not a choice")
    parser.addoption("--fuzz", action="store_true", help="the tests marked fuzz, which take many minutes")
    parser.addoption("--kills", type=int, default=0, help="how often the run of the restart test is killed")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell: programs would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    session_folder()  # the first process makes it; workers of pytest inherit its name


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput") and session_folder().name.endswith(f"-{os.getpid()}"):
        shutil.rmtree(session_folder(), ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for kind in ("slow", "fuzz"):
        if not config.getoption(f"--{kind}"):
            config.hook.pytest_deselected(items=[item for item in items if kind in item.keywords])
            items[:] = [item for item in items if kind not in item.keywords]
    for item in items:
        if set(DEAR) & set(item.fixturenames):
            item.add_marker(pytest.mark.together(item.module.__name__))
    if hasattr(config, "workerinput"):
        items[:] = _in_two_lanes(items)
        found = {item.nodeid: mark.args[0] for item in items if (mark := item.get_closest_marker("together"))}
        path = session_folder() / f"groups-{config.workerinput['workerid']}.json"
        path.write_text(json.dumps(found))


def _in_two_lanes(items):
    """Tests that wait, evenly spread between those that compute: workers of pytest take them in this order."""
    lanes = [[], []]
    for item in items:
        lanes[item.module.__name__ in WAITING].append(item)
    place = {id(item): (i + 0.5) / len(lane) for lane in lanes for i, item in enumerate(lane)}
    return sorted(items, key=lambda item: place[id(item)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests with one mark `together` go to one worker of pytest, in the order of `_in_two_lanes`."""
    from xdist.scheduler import LoadScopeScheduling

    class InGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return groups().get(nodeid, nodeid)

    @functools.cache
    def groups() -> dict[str, str]:  # as the workers, who have collected the tests, wrote them down
        return json.loads(next(session_folder().glob("groups-*.json")).read_text())

    config.option.loadscopereorder = False
    return InGroups(config, log)


def pytest_terminal_summary(terminalreporter):
    """Features by layouts, of the pairs that passed."""
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    for module, layouts, oracle in (
        ("test_support", STRATEGIES, "test_equality"),
        ("test_fit", ("mirrored:2", "multi_worker:2x1"), "test_fit"),
    ):
        found = [re.search(rf"{oracle}.py::test_every_cell\[([\w:]+)-float64-(\w+)\]", nodeid) for nodeid in passed]
        if done := {match.groups() for match in found if match}:
            features = importlib.import_module(module).FEATURES
            terminalreporter.section(f"{oracle}: features by layouts, cells that equal one device in float64")
            terminalreporter.write_line(pairs.table(done, layouts, features))
