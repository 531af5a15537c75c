"""Shared fixtures. This process runs OneDevice only; other strategies run in processes of their own (see oracle.py)."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import pytest
from processes import kill_what_is_left

# later strategies are added here, and every test of equality covers them
STRATEGIES = ("mirrored:2", "mirrored:4", "multi_worker:2x1", "multi_worker:2x2", "multi_worker:3x1")


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


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--kills", type=int, default=0, help="how often the run of the restart test is killed")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if "slow" not in item.keywords]
