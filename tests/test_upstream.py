"""The defects of stock Keras and TensorFlow that tfdist exists for. A failure here is good news: see what it makes
unnecessary in tfdist."""

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from processes import run_forked, run_forked_cluster
from stock import FOUND

pytestmark = [pytest.mark.upstream, pytest.mark.slow]


@functools.cache
def found(kind: str) -> dict[str, str]:
    with TemporaryDirectory() as folder:
        program = [str(Path(__file__).parent / "stock.py"), kind, f"{folder}/found"]
        done = run_forked_cluster(program, workers=2) if kind == "multi_worker" else [run_forked(program)]
        files = sorted(Path(folder).glob("found.*"))
        assert files, done[0].stderr[-4000:]
        return json.loads(files[0].read_text())


@pytest.mark.parametrize(("kind", "defect"), [(kind, fn.__name__) for kind, fns in FOUND.items() for fn in fns])
def test_stock_keras_still_has_this_defect(kind, defect):
    assert found(kind)[defect].startswith("defect"), found(kind)[defect]
