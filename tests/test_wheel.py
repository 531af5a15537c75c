"""What `pip install .` leaves outside of the repository: a wheel, in an environment that has nothing else of tfdist."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tfdist.metrics.writers import read_rows

ROOT = Path(__file__).parent.parent
PIP = ["-m", "pip", "--disable-pip-version-check"]


def python(program: Path | str, *arguments: str, cwd: Path, limit_s: float = 200.0) -> str:
    """Runs without what this process found its own tfdist with. Returns its output."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "TFDIST_CACHE": str(cwd / "cache"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([program, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def installed(tmp_path) -> Path:
    """The `bin` of an environment with the wheel of these sources. TensorFlow and the rest are those of this process."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "tfdist", source / "tfdist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    python(sys.executable, *PIP, *build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env")
    env_bin = tmp_path / "env" / "bin"
    python(sys.executable, *PIP, "--python", str(env_bin / "python"), "install", "--no-deps", "--no-index", str(wheel),
           cwd=tmp_path)  # fmt: skip
    shutil.rmtree(source)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # a line of a .pth file makes a folder's packages importable, but not what its own .pth files (this tfdist) point to
    (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return env_bin


@pytest.mark.slow
def test_the_wheel_trains_a_config_by_its_name(installed, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    where = python(installed / "python", "-c", "import tfdist; print(tfdist.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(installed.parent)
    (folder / "text.txt").write_text("".join(f"{i}: the quick brown fox jumps over the lazy dog\n" for i in range(2000)))
    small = ["--config.train.num_steps=2", "--config.train.global_batch_size=2", "--config.eval.max_steps=1",
             "--config.data.source=files:text.txt", "--config.data.validation_fraction=0.1"]  # fmt: skip
    python(installed / "tfdist", "train", "--config=lm_tiny", *small, cwd=folder)
    rows = read_rows(folder / "runs/lm_tiny/metrics.jsonl", "train")
    assert [row["step"] for row in rows] == [1, 2]
