"""What the README says is so: its table, its program, its commands."""

import re
from pathlib import Path

from processes import run

from tfdist.cli.main import _COMMANDS
from tfdist.config import field_names
from tfdist.strategies import support

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_support_table_is_the_one_in_the_code():
    shown = README.split("<!-- support table -->\n")[1].split("\n<!-- end of support table -->")[0]
    assert shown == support.markdown(), f"put this into the README:\n{support.markdown()}"


def test_the_program_runs_and_goes_on(tmp_path):
    program = re.search(r"```python\n(import.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "program.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{program}")
    first, second = (run([str(tmp_path / "program.py")]) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "checkpoint at step 200" in first.stderr and float(first.stdout.split()[-1]) < 1
    assert "restore at step 200" in second.stderr and first.stdout == second.stdout


def test_the_commands_and_keys_exist():
    for command in re.findall(r"^tfdist (\w+)", README, re.MULTILINE):
        assert command in _COMMANDS
    for key in re.findall(r"--config\.([\w.]+)=", README):
        assert key in field_names()
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()
    for path in re.findall(r"(configs/\w+\.py|notebooks/\w+\.ipynb|docs/\w+\.md|tfdist/\w+\.py)", README):
        assert (ROOT / path).exists(), path


def test_the_page_about_fit_names_tests_that_are_there(tmp_path):
    page = (ROOT / "docs" / "keras.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    rows = [row.rpartition(" | ")[2] for row in re.findall(r"^\| .*\|$", page, re.MULTILINE)[1:]]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(rows) == 15 and len(names) > 20
    for name in names:
        assert f"def {name}(" in tests, name
    program = re.findall(r"```python\n(import.*?)```", page, re.DOTALL)[0]
    (tmp_path / "program.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{program}")
    done = run([str(tmp_path / "program.py")])
    assert done.returncode == 0 and float(done.stdout.split()[-1]) < 1, done.stderr
