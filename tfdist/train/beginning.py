"""Where a run begins: after its newest checkpoint, or at step 0, and then alone in its files."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tfdist import files
from tfdist.checkpoint import store
from tfdist.checkpoint.workdir import Workdir
from tfdist.errors import CheckpointError, UserError
from tfdist.metrics import writers


def find(workdir: Workdir) -> store.Checkpoint | None:
    """The newest good checkpoint. None: the run starts at step 0, and what one that never saved had logged is set aside.

    Raises `CheckpointError` where there should be a checkpoint that can be used, and is none.
    """
    found = store.latest(workdir.checkpoints)
    if found is None:
        check_nothing_lost(workdir)
        if any(row.get("name") != "start" for row in writers.read_all(workdir.metrics)):
            workdir.set_aside(workdir.metrics, workdir.tensorboard)
    return found


def check_writable(workdir: Workdir, *folders: Path) -> None:
    """Makes the folders of checkpoints and these. Raises `CheckpointError` or `UserError` where the run could not write
    later: before there is anything to lose."""
    store.check_writable(workdir.checkpoints)
    with cannot_write(workdir):
        for folder in (workdir.path, *folders):
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        for file in (workdir.metrics, workdir.report):
            with contextlib.suppress(FileNotFoundError):
                files.open_inside(workdir.path, file.name, "r+b").close()


@contextlib.contextmanager
def cannot_write(workdir: Workdir) -> Iterator[None]:
    """Inside, an `OSError` is a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"workdir: cannot write to {error.filename or workdir.path}: {error.strerror or error}; mend that or use "
            "another folder"
        ) from error


def check_nothing_lost(workdir: Workdir) -> None:
    """Raises `CheckpointError` when the run in the workdir has saved, and no checkpoint is there any more."""
    if store.steps(workdir.checkpoints):
        return
    try:
        events = [row for row in writers.read_all(workdir.metrics) if row["kind"] == "event"]
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot read {workdir.metrics}: {error.strerror}") from error
    saved = [row["step"] for row in events if row.get("name") == "checkpoint"]
    if saved:
        raise CheckpointError(
            f"checkpoint: expected that of step {saved[-1]} (says {workdir.metrics}), found none in {workdir.checkpoints}; "
            "put the folder back, or start at step 0 with --fresh or in another workdir"
        )
