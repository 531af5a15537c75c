"""What the README and the pages of docs/ say is so: their tables, programs, commands, links and pictures."""

import ast
import json
import re
from pathlib import Path

import pytest
from processes import run, tfdist

from tfdist import errors
from tfdist.cli import processes
from tfdist.cli.main import _COMMANDS
from tfdist.config import field_names
from tfdist.strategies import support

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
SMALL_ENOUGH_BYTES = 100_000


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def rows_of(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[1:]]


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def ran(folder: Path, program: str) -> str:
    """What a program prints. Its folder is the current one, and is imported from."""
    path = folder / "program.py"
    path.write_text(f"import os\nos.chdir({str(folder)!r})\n{program}")
    done = run([str(path)])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- the first screen ----


def test_the_readme_is_short_and_begins_with_a_command():
    lines = README.splitlines()
    assert len(lines) <= 120
    first = lines.index("```sh") + 1
    assert first < 15 and lines[first].startswith("make demo"), "within the first 15 lines"


def test_each_row_about_stock_keras_links_to_its_two_tests():
    links = re.findall(r'\]\((tests/\w+\.py) "(\w+)"\)', README)
    rows = rows_of(README.split("\n<p>")[0])
    assert len(rows) == 6 and len(links) == 12
    for path, name in links:
        assert f"\ndef {name}(" in text_of(path), f"{path} has no {name}"
    assert all(path == "tests/stock.py" for path, _ in links[::2])
    assert all(path != "tests/stock.py" for path, _ in links[1::2])


def test_the_picture_is_there_for_light_and_dark_pages():
    names = re.findall(r'(?:srcset|src)="(docs/images/[\w-]+\.png)"', README)
    assert len(names) == 2 and 'media="(prefers-color-scheme: dark)" srcset="docs/images/clipping-dark.png"' in README
    for name in names:
        data = (ROOT / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < SMALL_ENOUGH_BYTES, name
    losses = json.loads(text_of("docs/images/losses.json"))
    said = re.search(r"end at ([\d.]+), .* ends at ([\d.]+)\.", README).groups()
    assert said == (f"{losses['tfdist'][-1]:.2f}", f"{losses['stock'][-1]:.2f}")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_picture_shows_what_happens(tmp_path):
    """Three epochs of its three runs: tfdist is on the line of one device, stock Keras leaves it."""
    done = run([str(ROOT / "docs" / "clipping.py"), "--epochs=3", f"--out={tmp_path}"], limit_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert {path.name for path in tmp_path.glob("*.png")} == {"clipping-light.png", "clipping-dark.png"}
    one, ours, stock = (losses[name] for name in ("one_device", "tfdist", "stock"))
    assert ours == pytest.approx(one, rel=1e-5) and stock[-1] > 1.1 * one[-1]


BEFORE = """
import keras, numpy
keras.utils.set_random_seed(0)
x = numpy.random.default_rng(0).normal(size=(200, 3))
y = x.sum(1, keepdims=True)
def build_model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
"""
AFTER = """
print(*model.history.history["loss"])
"""


def test_the_two_lines_keep_the_losses_of_a_keras_program(tmp_path):
    """Stock Keras without the two lines that are added, and two workers with them."""
    (diff,) = blocks(README, "diff")
    lines = diff.splitlines()
    kept = [line[1:] for line in lines if not line.startswith("+")]
    assert len(lines) - len(kept) == 2
    stock = ran(tmp_path, BEFORE + "\n".join(line.strip() for line in kept) + AFTER)
    (tmp_path / "program.py").write_text(BEFORE + "\n".join(line[1:] for line in lines) + AFTER)
    launched = tfdist("launch", "--workers=2", f"--log_dir={tmp_path}", "--", "python", str(tmp_path / "program.py"))
    assert launched.returncode == 0, launched.stderr[-3000:]
    one, two = ([float(loss) for loss in printed.split()[-3:]] for printed in (stock, launched.stdout))
    assert two == pytest.approx(one, rel=1e-5) and one[2] < one[0]


def test_what_doctor_prints_is_what_the_readme_shows():
    (shown,) = [block for block in blocks(README, "") if "$ tfdist doctor" in block]
    printed = tfdist("doctor").stdout
    for line in shown.splitlines()[1:]:
        if line not in ("...", "0 problems, 0 warnings"):
            *_, name = re.match(r"(\w+)? +(\w+)", line).groups()
            assert re.search(rf"^(\w+)? +{name} ", printed, re.MULTILINE), line
    assert re.search(r"^\d+ problems, \d+ warnings$", printed, re.MULTILINE)


def test_ten_rows_of_what_works_where_are_those_of_the_support_table():
    head, *rows = [line.strip("|").split("|") for line in section("What works where").splitlines() if line.startswith("|")]
    names, rows = [name.strip() for name in head[1:]], rows[1:]
    assert len(rows) == 10
    for feature, *cells in ([cell.strip() for cell in row] for row in rows):
        (known,) = [name for name in support.TABLE if name.startswith(feature)]
        for name, cell in zip(names, cells, strict=True):
            assert cell in ("yes", "no", "in part")
            assert (cell == "yes") == (support.TABLE[known][name] == support.YES), (feature, name)


# ---- the pages ----


def test_the_support_table_is_the_one_in_the_code():
    page = text_of("docs/support.md")
    shown = page.split("<!-- support table -->\n")[1].split("\n<!-- end of support table -->")[0]
    assert shown == support.markdown(), f"put this into docs/support.md:\n{support.markdown()}"


def test_every_exit_code_is_in_its_table():
    codes = {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    table = text_of("docs/command_line.md").split("## Exit codes")[1]
    assert codes and codes == {int(row[0]) for row in rows_of(table) if row[0].isdigit()}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_paths_lead_somewhere(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^)\s#]+)", text):
        assert link.startswith("https://") or (ROOT / page.parent / link).exists(), link
    for path in re.findall(r"\b((?:configs|notebooks|examples|benchmarks|docs|tests|tfdist)/[\w/]+\.(?:py|ipynb|md))", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text, re.MULTILINE):
        assert f"\n{''.join(target)}:" in text_of("Makefile"), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_flags_and_keys_exist(page):
    text = text_of(page)
    for command in re.findall(r"^\$? *tfdist (\w+)", "\n".join(blocks(text, r"(?:sh)?")), re.MULTILINE):
        assert command in _COMMANDS, command
    for key in re.findall(r"--config\.(\w[\w.]*\w)=", text):
        assert key in field_names(), key
    for name in re.findall(r"--config=(\w+)(?![\w./])", text):
        assert (ROOT / "configs" / f"{name}.py").exists(), name
    for command in ("launch", "supervise", "doctor"):
        known = processes._define(command)
        for given in re.findall(rf"\btfdist {command} ([^\n]*?)(?:-- |#|\n)", text):
            for flag in re.findall(r"(?<!\S)--([\w-]+)", given):
                assert flag.replace("-", "_") in known, f"tfdist {command} --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_on_the_pages_can_be_parsed(page):
    for block in blocks(text_of(page), "python"):
        ast.parse(block)


def test_the_program_of_the_trainer_runs_and_goes_on(tmp_path):
    (program,) = blocks(text_of("docs/trainer.md"), "python")
    (tmp_path / "program.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{program}")
    first, second = (run([str(tmp_path / "program.py")]) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "checkpoint at step 200" in first.stderr and float(first.stdout.split()[-1]) < 1
    assert "restore at step 200" in second.stderr and first.stdout == second.stdout


@pytest.mark.slow
def test_the_program_that_verifies_says_equal(tmp_path):
    model, program = blocks(text_of("docs/verify.md"), "python")
    (tmp_path / "my_model.py").write_text(model)
    printed = ran(tmp_path, program)
    assert printed.count(" equal") == 3 and "DIFFERS" not in printed, printed


def test_the_page_about_fit_names_tests_that_are_there(tmp_path):
    page = text_of("docs/keras.md")
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    names = [name for row in rows_of(page) for name in re.findall(r"`(\w+)`", row[-1])]
    assert len(rows_of(page)) == 15 and len(names) > 20
    for name in names:
        assert f"def {name}(" in tests, name
    assert float(ran(tmp_path, blocks(page, "python")[0]).split()[-1]) < 1
