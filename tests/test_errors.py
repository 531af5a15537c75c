"""Exit codes of programs that do not catch a failure."""

import sys

import pytest

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
