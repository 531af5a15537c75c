"""The house rules, read from the source: which way imports point, where TensorFlow and the environment may be used."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tfdist"
FILES = sorted(ROOT.rglob("*.py"))

# from the top of the house down: a room imports only from rooms below it (or itself)
FLOORS = [
    {"cli"},
    {"verification", "doctor", "configs"},
    {"launch", "fit", "infer"},
    {"train"},
    {"checkpoint", "metrics", "optim", "data", "models"},
    {"strategies"},
    {"files", "cluster", "patches", "programs"},
    {"config", "errors", "__init__"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TENSORFLOW = ["__init__.py", "config.py", "errors.py", "models/count.py", "cli/main.py", "cluster/", "launch/",
                      "checkpoint/", "metrics/writers.py", "metrics/report.py", "files.py", "programs.py", "data/build.py",
                      "data/corpus.py", "data/documents.py", "data/pieces.py", "data/shards.py", "data/shard_writer.py",
                      "data/tokenizer.py", "data/build_folder.py", "data/globs.py", "data/index.py", "data/npy.py",
                      "data/verified.py", "configs/__init__.py",
                      "verification/run.py", "verification/compare.py", "verification/subject.py"]  # fmt: skip
ENVIRONMENT_ALLOWED = ("cli/", "cluster/resolve.py", "launch/", "programs.py")


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Dotted names of everything imported."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = room(path)
    for name in imports(path):
        if not name.startswith("tfdist."):
            continue
        other = name.split(".")[1]
        other = other if other in FLOOR else "__init__"
        same_floor = FLOOR[other] == FLOOR[mine]
        allowed = other == mine or FLOOR[other] > FLOOR[mine] or same_floor
        assert allowed, f"{path.relative_to(ROOT)} imports {name}: {mine} may not import {other}"
        if mine in ("models", "optim"):
            assert other != "strategies", f"{path.relative_to(ROOT)} imports {name}"
        if mine == "launch":
            assert other in ("launch", "cluster", "config", "errors", "files", "programs", "__init__"), name


@pytest.mark.parametrize("part", WITHOUT_TENSORFLOW)
def test_rooms_without_tensorflow(part):
    paths = [p for p in FILES if str(p.relative_to(ROOT)).startswith(part)]
    for path in paths:
        heavy = [n for n in imports(path, top_level_only=True) if n.split(".")[0] == "tensorflow"]
        if part != "checkpoint/":  # names Keras types only
            heavy += [n for n in imports(path, top_level_only=True) if n.split(".")[0] == "keras"]
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_environment_is_used_in_four_places_only():
    for path in FILES:
        if str(path.relative_to(ROOT)).startswith(ENVIRONMENT_ALLOWED):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            used = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            assert not used, f"{path.relative_to(ROOT)}:{node.lineno} uses the environment"


def test_private_names_of_keras_and_tensorflow_stay_in_patches():
    for path in FILES:
        if room(path) == "patches":
            continue
        private = [n for n in imports(path) if n.startswith(("keras.src", "tensorflow.python"))]
        assert not private, f"{path.relative_to(ROOT)} imports {private}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                own = own or ast.unparse(node) == "os._exit"
                assert own, f"{path.relative_to(ROOT)}:{node.lineno}: .{node.attr} is private"


DOCUMENTS = re.compile(
    r"\b(?:FACTS|DESIGN|STYLE|CASES|NOTES|PLAN|ROADMAP|TODO|README|CHANGELOG|CONTRIBUTING|SECURITY|LICENSE)\b"
    r"|(?<![\w/.:*-])[\w-]+(?:/[\w-]+)*\.md\b"  # a path of this repository, not the end of a longer one
)


def prose(path: Path) -> list[str]:
    """Every comment and docstring."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, nodes)]
    with open(path, "rb") as lines:
        comments = [token.string for token in tokenize.tokenize(lines.readline) if token.type == tokenize.COMMENT]
    return docstrings + comments


def test_documents_that_are_named_are_in_this_repository():
    root = ROOT.parent
    for path in [*FILES, *sorted((root / "tests").glob("*.py"))]:
        for name in DOCUMENTS.findall("\n".join(prose(path))):
            there = (root / name).is_file() or (root / f"{name}.md").is_file()
            assert there, f"{path.relative_to(root)} names {name}, which is not in this repository: say the thing itself"


def test_modules_are_loaded_by_name_in_two_places_only():
    """The public names, and the one arrow that points up: a scope makes models train with `fit`, which stands above it."""
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found.setdefault(str(path.relative_to(ROOT)), []).append(ast.unparse(node.args[0]))
    allowed = {"strategies/base.py": ["'tfdist.fit'"], "__init__.py": found["__init__.py"]}
    assert {name: args for name, args in found.items() if any("tfdist" in one for one in args)} | allowed == allowed, found
    assert found["strategies/base.py"] == allowed["strategies/base.py"]


def test_no_drawer_for_everything():
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "misc")]


def test_the_loop_stays_small():
    text = (ROOT / "train" / "loop.py").read_text()
    assert len(text.splitlines()) < 150
    whiles = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.While)]
    assert len(whiles) == 1 and "strategy is" not in text and "isinstance" not in text


ROOMY = {  # tests with a limit that is many times what it takes: other tests beside them do no harm
    "test_every_step_is_counted_once_and_evaluation_is_exact",
}


def test_tests_with_a_time_limit_have_the_machine_to_themselves():
    """Or other tests, which run beside them, would make them fail."""
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name not in ROOMY:
                body = "\n".join(map(ast.unparse, node.body))
                has_limit = "measured(" in body or re.search(r"assert .*(time\.monotonic\(\) - \w+|best_s|seconds) <", body)
                assert not has_limit or "pytest.mark.timed" in ast.unparse(node), f"{path.name}: {node.name}: mark it timed"
