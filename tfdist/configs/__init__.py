"""The configs that come with tfdist, found by name where it is installed: `tfdist train --config=lm_tiny`. In the repository
`configs/` is a link to this folder."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Of what has a `get_config()`; `recommender_ps` is a program of its own."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if "\ndef get_config(" in path.read_text())


def file_of(given: str) -> str:
    """The file that `--config` means: a path as it is, else what comes with tfdist under this name."""
    return given if Path(given).is_file() or given not in names() else str(_FOLDER / f"{given}.py")
