"""That the shortcuts of the tests change no number: forks for new processes, results of one run for later ones."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import results
from processes import finish, fork, run, run_forked, start

CELL = "several_inputs_and_outputs_with_their_own_weights"


@pytest.mark.parametrize("strategy", ["mirrored:2", "multi_worker:2x1"])
def test_a_cell_has_the_same_bits_in_forks_and_in_processes_of_the_launcher(tmp_path, strategy):
    program = [str(results.HERE / "cells.py"), strategy, "float64", str(tmp_path), CELL]
    if strategy.startswith("multi_worker"):
        program = ["-m", "tfdist.cli", "launch", "--workers=2", f"--log_dir={tmp_path}/logs", "--", "python", *program]
    done = run(program)
    assert done.returncode == 0, done.stderr
    found = results.results("cells.py", strategy, "float64", (CELL,))
    for worker, path in enumerate(sorted(tmp_path.glob("*.npz"))):
        with np.load(path) as arrays:
            assert [f"{CELL}|{key}" for key in arrays] == list(found)
            for key, value in arrays.items():
                expected = found[f"{CELL}|{key}"]
                one = expected[worker : worker + 1] if "var/" in key and strategy.startswith("multi") else expected
                if key not in ("losses", "tokens", "norms", "scales") or worker == 0:  # the chief writes the rows
                    np.testing.assert_array_equal(value, one, err_msg=key)


def test_a_fork_is_like_a_new_process(tmp_path):
    text = (
        "import json, os, sys\n"
        "print(json.dumps([__name__, sys.argv, os.environ.get('A'), os.getcwd(), sys.path[0]]))\n"
        "print('error', file=sys.stderr)\nsys.exit(7)"
    )
    (tmp_path / "script.py").write_text(text)
    for arguments in (["-c", text, "x"], [str(tmp_path / "script.py"), "x"]):
        one, other = run(arguments, {"A": "1"}), run_forked(arguments, {"A": "1"})
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
        assert json.loads(other.stdout)[2] == "1"
    assert run_forked(["-m", "json.tool", "--help"]).returncode == 0
    assert "ValueError: why" in run_forked(["-c", "raise ValueError('why')"]).stderr


def test_a_fork_that_does_not_end_is_killed_with_what_it_started():
    text = "import subprocess, time\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\ntime.sleep(600)"
    for begin in (start, fork):
        with pytest.raises(AssertionError, match="killed after 1.5 s") as killed:
            finish(begin(["-c", text]), 1.5)
        pid = int(str(killed.value).splitlines()[1])
        until_s = time.monotonic() + 10  # a process that was killed ends when it runs next
        while _state_of(pid) not in ("", "Z"):
            assert time.monotonic() < until_s, _state_of(pid)
            time.sleep(0.05)


def _state_of(pid: int) -> str:
    """As in /proc: R, S, Z; nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_what_is_read_at_import_needs_a_new_process():
    with pytest.raises(AssertionError, match="KERAS_BACKEND.*use processes.start"):
        fork(["-c", ""], {"KERAS_BACKEND": "jax"})


def test_a_cell_is_computed_once_and_an_error_is_kept_for_the_session(tmp_path, monkeypatch):
    runs = []

    def forked(command, **_):
        out, cells = command[3], command[4:]
        runs.append(cells)
        for cell in cells[: cells.index("bad") if "bad" in cells else None]:
            np.savez(f"{out}/{cell}.0.npz", x=len(runs))
        return run(["-c", f"import sys; sys.exit({int('bad' in cells)})"])

    monkeypatch.setattr(results, "run_forked", forked)
    monkeypatch.setattr(results, "_of_this_tree", lambda program: tmp_path / "tree")
    monkeypatch.setattr(results, "session_folder", lambda: tmp_path)
    assert results.results("p.py", "one_device", "float64", ("a", "b"))["b|x"] == 1
    with pytest.raises(AssertionError, match="bad on one_device in float64:\nexit code 1"):
        results.results("p.py", "one_device", "float64", ("a", "c", "bad", "d"))
    assert results.results("p.py", "one_device", "float64", ("a", "c", "d")).keys() == {"a|x", "c|x", "d|x"}
    assert runs == [["a", "b"], ["c", "bad", "d"], ["d"]]


def test_another_tree_has_other_results(monkeypatch, tmp_path):
    here = results._of_this_tree.__wrapped__("cells.py")
    assert here == results._of_this_tree("cells.py") != results._of_this_tree("fit_cells.py")
    monkeypatch.setattr(results, "KEPT", tmp_path)
    monkeypatch.setattr(results, "_version", lambda package: "0.0")
    assert results._of_this_tree.__wrapped__("cells.py").name != here.name
