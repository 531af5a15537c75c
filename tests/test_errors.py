"""How failures look, and the exit codes of programs that do not catch them."""

import json
import sys

import pytest
from processes import tfdist

from tfdist import errors


def test_an_uncaught_failure_ends_with_its_code(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: shown.append(what[1]))
    errors.exit_with_codes()
    errors.exit_with_codes()
    for failure in (errors.UserError("?"), errors.DataError("?"), errors.PeerLost("?")):
        with pytest.raises(SystemExit) as end:
            sys.excepthook(type(failure), failure, None)
        assert end.value.code == failure.exit_code and shown.pop() is failure and not shown
    bug = ValueError("?")
    sys.excepthook(ValueError, bug, None)
    assert shown == [bug]


def test_an_interactive_session_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda *what: None)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    errors.exit_with_codes()
    sys.excepthook(errors.UserError, errors.UserError("?"), None)


def test_a_failure_has_no_control_characters():
    for kind in (errors.UserError, errors.PeerLost, errors.NotFiniteError):
        assert str(kind("a\x1b[2J\x07\u202eb\r\x9b\udc9bc\td\ne")) == r"a\x1b[2J\x07\u202eb\r\x9b\udc9bc" "\td\ne"


def test_names_and_texts_of_files_reach_no_terminal_as_they_are(tmp_path):
    """A file's name, a record's keys; texts that `data inspect` shows."""
    hostile = "\x1b]0;renamed\x07\x1b[2J"
    bad, good = tmp_path / f"{hostile[:8]}.jsonl", tmp_path / "good.jsonl"
    bad.write_text(json.dumps({hostile: 1}))
    done = tfdist("data", "build", f"--source=jsonl:{tmp_path}/*ren*", f"--out={tmp_path}/out")
    lines = done.stderr.splitlines()
    assert done.returncode == 3 and len(lines) == 1 and lines[0].isprintable() and "renamed" in lines[0], done.stderr
    good.write_text("\n".join(json.dumps({"text": f"{hostile} document {i}"}) for i in range(30)))
    assert tfdist("data", "build", f"--source=jsonl:{good}", f"--out={tmp_path}/out").returncode == 0
    shown = tfdist("data", "inspect", f"{tmp_path}/out", "--samples=20")
    assert shown.returncode == 0 and r"\x1b]0;renamed\x07\x1b[2J document" in shown.stdout
    assert all(line.isprintable() for line in shown.stdout.split("\n")), shown.stdout
