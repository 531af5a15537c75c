"""Files of the user and of others: what a command did not make it leaves alone, and what is read is what it must be."""

import concurrent.futures
import contextlib
import fnmatch
import glob
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run, tfdist

from tfdist import files
from tfdist.config import DataConfig
from tfdist.data import build, corpus, globs, shards
from tfdist.errors import DataError, one_line

IN_A_NAMESPACE = ["unshare", "-rpf"]
may_unshare = subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True).returncode == 0


def tree(folder: Path, without: str = "") -> dict[str, tuple]:
    """Everything below a folder: kind, inode, and content or where a link points to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if without and name.split("/")[0] == without:
            continue
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[name] = (status.st_mode, status.st_ino, content)
    return found


# ---- one line ----


SAID = [
    "plain",
    "two\nlines",
    "\x1b[31mred\x07",
    "x" * 10_000,
    "\udc80\u202e\x00" * 200,
    "a" * 400 + "\x00" * 400,
    " é ",
    "",
]


@pytest.mark.parametrize("text", SAID, ids=range(len(SAID)))
def test_what_strangers_say_is_one_printable_line(text):
    line = one_line(text)
    assert line.isprintable() and len(line) <= 480 and line == one_line(line)
    assert text[:20].isprintable() is False or line.startswith(text[:20].strip())


# ---- reading ----


def strange_files(folder: Path) -> list[str]:
    (folder / "inside").write_text("{}")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name, target in (("link", "inside"), ("loop", "loop"), ("zero", "/dev/zero"), ("gone", "nowhere"), ("up", ".")):
        (folder / name).symlink_to(target)
    links = ["link", "loop", "zero", "gone", "up"]
    return [*links, "folder", "pipe", "", ".", "..", "folder/../inside", "/etc/passwd", "in\0side", "\ud800", "x" * 300]


@pytest.mark.parametrize("mode", ["rb", "r+b", "a+b"])
def test_only_regular_files_directly_inside_a_folder_are_opened(tmp_path, mode):
    names = strange_files(tmp_path)
    before = tree(tmp_path)
    for name in names:
        with pytest.raises(OSError):
            files.open_inside(tmp_path, name, mode)
    with files.open_inside(tmp_path, "inside", mode) as file:
        file.seek(0)
        assert file.read() == b"{}"
    assert tree(tmp_path) == before


def test_json_is_read_up_to_a_size_and_a_depth(tmp_path):
    (tmp_path / "deep").write_bytes(b"[" * 1_000_000)
    with pytest.raises(ValueError, match="nested too deep"):
        files.read_json(tmp_path, "deep")
    with pytest.raises(OSError, match="expected at most 999999 bytes"):
        files.read_inside(tmp_path, "deep", 999_999)
    assert files.is_sealed(files.sealed({"b": [1, {"c": None}], "a": 0.1})) and not files.is_sealed({"a": 1})


# ---- writing at once ----


def test_processes_with_equal_numbers_write_one_file_at_once(tmp_path):
    """Threads have the number of their process, as processes of several containers may."""
    path, contents = tmp_path / "file", [bytes([i]) * 100_000 for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(files.write, path, content) for content in contents * 25]:
            done.result()
    assert path.read_bytes() in contents and [p.name for p in tmp_path.iterdir()] == ["file"]


OPEN = """
import os, sys, time
from pathlib import Path
from tfdist.config import DataConfig
from tfdist.data import shards
(Path(sys.argv[3]) / sys.argv[4]).touch()
while len(list(Path(sys.argv[3]).iterdir())) < 4:
    time.sleep(0.001)
print(os.getpid(), shards.open_source(DataConfig(source=sys.argv[1]), Path(sys.argv[2])).data_hash)
"""


@pytest.mark.skipif(not may_unshare, reason="this user may not make namespaces")
def test_processes_with_equal_numbers_open_one_cache_at_once(text_files, tmp_path, tmp_path_factory):
    ready = str(tmp_path_factory.mktemp("ready"))
    command = [
        *IN_A_NAMESPACE,
        "--kill-child",
        sys.executable,
        "-c",
        OPEN,
        f"files:{text_files}/*.txt",
        str(tmp_path),
        ready,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(i)], **pipes) for i in range(4)]
    try:
        found = [(process.communicate(timeout=60), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [code for _, code in found] == [0] * 4, found
    assert len({out for (out, _), _ in found}) == 1, found
    assert len(list(tmp_path.glob("*"))) == 2  # the dataset, and `sources`


MEMOS = [b"", b"no hash", b"../elsewhere", b"/etc", b"0" * 31, b"0" * 33, b"\xff" * 32, "pipe", "link"]


@pytest.mark.parametrize("memo", MEMOS, ids=range(len(MEMOS)))
def test_a_memo_that_is_no_hash_is_computed_anew_and_points_nowhere_else(text_files, tmp_path, memo):
    source, cache = DataConfig(source=f"files:{text_files}/*.txt"), tmp_path / "cache"
    first = shards.open_source(source, cache)
    (tmp_path / "other.txt").write_text("other text\n" * 99)
    other = shards.open_source(DataConfig(source=f"files:{tmp_path}/other.txt"), tmp_path / "others")
    shutil.copytree(other.path, tmp_path / "elsewhere")  # a good dataset, but not that of the source
    (path,) = (cache / "sources").iterdir()
    path.unlink()
    if memo == "pipe":
        os.mkfifo(path)
    elif memo == "link":
        path.symlink_to(next((tmp_path / "others" / "sources").iterdir()))
    else:
        path.write_bytes(memo)
    before = tree(tmp_path / "elsewhere")
    assert shards.open_source(source, cache) == first
    assert path.read_text() == first.path.name and not path.is_symlink()
    assert tree(tmp_path / "elsewhere") == before
    assert {p.name for p in cache.iterdir()} == {"sources", first.path.name}


# ---- what lies beside a build ----


def put(path: Path, kind: str, precious: Path) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("folder", "empty"):
        path.mkdir()
        names = ("plan.json", "piece-00000.json", "train-00000-000.npy", "notes.txt") if kind == "folder" else ()
        for name in names:
            (path / name).write_text("precious")
    else:
        path.symlink_to({"link to a file": precious / "notes.txt", "link to a folder": precious, "link": "nowhere"}[kind])


KINDS = ["file", "pipe", "folder", "empty", "link to a file", "link to a folder", "link"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["lock", "building"])
def test_what_lies_beside_a_build_is_left_alone(text_files, tmp_path, suffix, kind):
    """It is built where nothing is in the way, and else refused; a build that is broken off leaves it alone too."""
    (tmp_path / "precious").mkdir()
    for name in ("plan.json", "notes.txt"):
        (tmp_path / "precious" / name).write_text("precious")
    put(tmp_path / f"uv.{suffix}", kind, tmp_path / "precious")
    before = tree(tmp_path)
    arguments = (corpus.plan(f"files:{text_files}/*.txt", "text", 0.1), "bytes", "source", tmp_path / "uv")
    if suffix == "lock":
        build.build(*arguments)
        assert shards.read(tmp_path / "uv").splits["train"].documents == 27
    else:
        with pytest.raises(DataError, match="uv.building to be free, or of an earlier build, found something else"):
            build.build(*arguments)
        assert not (tmp_path / "uv").exists()
    assert tree(tmp_path, without="uv") == before


def test_a_build_beside_a_lock_of_the_users_ends_with_0(text_files, tmp_path):
    (tmp_path / "uv.lock").write_text("precious")
    done = tfdist("data", "build", f"--source=files:{text_files}/*.txt", f"--out={tmp_path}/uv")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "uv.lock").read_text() == "precious" and {p.name for p in tmp_path.iterdir()} == {"uv", "uv.lock"}


def test_what_a_user_put_into_the_folder_of_a_build_stays(text_files, tmp_path):
    """Also where the plan has changed since, and what was built is thrown away."""

    def stop(_):
        raise KeyboardInterrupt

    for fraction in (0.1, 0.2):
        found = corpus.plan(f"files:{text_files}/*.txt", "text", fraction)
        with pytest.raises(KeyboardInterrupt):
            build.build(found, "bytes", "source", tmp_path / "out", progress=stop)
        if fraction == 0.1:
            (tmp_path / "out.building" / "notes.txt").write_text("precious")
    build.build(found, "bytes", "source", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious" and shards.read(tmp_path / "out").splits


# ---- links in a corpus ----

READ = """
import json, sys
from tfdist.data import corpus
print(json.dumps(sorted(part.name for part in corpus.plan(sys.argv[1], "text", 0.1).documents() if part.begins)))
"""


@pytest.mark.parametrize("kind", ["files", "jsonl"])
def test_each_real_file_is_read_once_whatever_links_lie_there(tmp_path, kind):
    """To the folder itself, to those above, to one another, to files; twice of each would never end."""
    root, names = tmp_path / "corpus", []
    (tmp_path / "beside").mkdir()
    for i in range(30):
        folder = root / ["", "a", "a/deep", "b"][i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02}.txt").write_text('{"text": "text"}\n')
        names.append(str((folder / f"{i:02}.txt").relative_to(root)))
    (tmp_path / "beside" / "far.txt").write_text('{"text": "text"}\n')
    for link, target in (
        ("here", "."), ("again", "."), ("a/up", ".."), ("a/top", "../.."), ("b/over", "../a"), ("0over", "b"),
        ("00.link.txt", "00.txt"), ("b/self", "self"), ("beside", "../beside"),
    ):  # fmt: skip
        (root / link).symlink_to(target)
    done = run(["-c", READ, f"{kind}:{root}/**/*.txt"], limit_s=30)
    assert done.returncode == 0, done.stderr
    assert [name.partition("@")[0] for name in json.loads(done.stdout)] == sorted([*names, "beside/far.txt"])


def test_without_links_patterns_mean_what_they_mean_to_glob(tmp_path):
    chance, parts = random.Random(0), ["a", "b", "ab", ".h", "x.txt", "y.txt", "[z].txt"]
    for _ in range(80):
        path = tmp_path.joinpath(*(chance.choice(parts[:4]) for _ in range(chance.randrange(4))), chance.choice(parts[4:]))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    pieces = ["**", "*", "a*", "?", "a", ".h", ".*", "[ab]", "*.txt", "x.txt", "[[]z].txt", "**"]
    for _ in range(400):
        pattern = "/".join([str(tmp_path), *(chance.choice(pieces) for _ in range(chance.randrange(1, 5)))])
        expected = {os.path.realpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
        found, empty = globs.files_of([pattern])
        assert sorted(map(os.path.realpath, found)) == sorted(expected) and bool(empty) == (not expected), pattern
    assert fnmatch.fnmatch("[z].txt", "[[]z].txt")
