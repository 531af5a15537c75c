"""A trained model as a `.keras` file."""

import os
import tempfile
from pathlib import Path

import keras

from tfdist.errors import UserError


def to_keras(model: keras.Model, out: Path) -> None:
    """Writes `out` (`.keras`), whole or not at all. Load it with `keras.saving.load_model` after importing
    `tfdist.models.transformer`."""
    try:
        with tempfile.TemporaryDirectory(dir=out.parent or ".", prefix=".export-") as folder:
            temporary = Path(folder) / out.name
            model.save(temporary)
            os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from error
