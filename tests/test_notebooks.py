from pathlib import Path

import pytest
from processes import run

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_from_top_to_bottom(path):
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", str(path)])
    assert done.returncode == 0, done.stdout[-3000:]
