"""Text from TensorFlow Datasets.

A first use downloads. `tfds` retries for minutes where there is no network, so an unprepared dataset is fetched by a
child process that is given up once nothing has arrived for a while.
"""

import difflib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tfdist import programs
from tfdist.cluster.link import supervisor
from tfdist.errors import DataError

_STALL_S = 10.0  # nothing written for this long: the download is given up
_POLL_S = 0.25
_PREPARE = "import sys, tensorflow_datasets as tfds; tfds.builder(sys.argv[1]).download_and_prepare()"


def prepare(name: str, text_key: str) -> tuple[Path, dict[str, int]]:
    """The folder of a dataset, downloaded if need be, and how many examples its train split, and its validation (else
    test) split if it has one, have. `TFDS_DATA_DIR` says where datasets lie."""
    import tensorflow_datasets as tfds

    if not _prepared(tfds, name):
        _check_known(tfds, name)
        _download(tfds, name)
    # the files alone are enough from here on; building by name would ask the network for metadata
    folder = _prepared(tfds, name)
    info = tfds.builder_from_directory(folder).info
    if text_key not in info.features:
        raise DataError(
            f"data.text_key: expected a feature of tfds:{name} ({', '.join(sorted(info.features))}), found {text_key!r}"
        )
    if info.features[text_key].dtype not in (str, "string", bytes, object):
        raise DataError(f"data.text_key: expected text in feature {text_key!r}, found {info.features[text_key].dtype}")
    if "train" not in info.splits:
        raise DataError(f"data.source: expected a train split in tfds:{name}, found {', '.join(info.splits)}")
    held_out = [split for split in ("validation", "test") if split in info.splits][:1]
    return folder, {split: info.splits[split].num_examples for split in ("train", *held_out)}


def read(folder: str, split: str, text_key: str, start: int, end: int) -> Iterator[bytes]:
    """The texts of examples [start, end) of a split, in on-disk order."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    part = tfds.core.ReadInstruction(split, from_=start, to=end, unit="abs")
    for row in builder.as_dataset(split=part, shuffle_files=False, read_config=in_order).as_numpy_iterator():
        yield row[text_key]


def _data_dir(tfds) -> Path:
    return Path(tfds.core.constants.DATA_DIR).expanduser()


def _prepared(tfds, name: str) -> Path | None:
    """The folder of the newest prepared version of `name[/config][:version]`, if there is one."""
    name, _, version = name.partition(":")
    root = _data_dir(tfds) / name
    found = [p.parent for p in root.glob("**/dataset_info.json") if not version or p.parent.name == version]
    return max(found, key=lambda path: _version_key(path.name), default=None)


def _version_key(version: str) -> tuple:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))


def _check_known(tfds, name: str) -> None:
    known, base = tfds.list_builders(with_community_datasets=False), name.partition(":")[0].partition("/")[0]
    if base not in known:
        near = difflib.get_close_matches(base, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise DataError(f"data.source: unknown TensorFlow dataset {base!r}{hint}")


def _download(tfds, name: str) -> None:
    folder = _data_dir(tfds)
    with tempfile.TemporaryFile("w+") as messages:  # a file: nobody reads a pipe meanwhile, and a full one stops the child
        child = subprocess.Popen(
            [*programs.code(_PREPARE), name],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=messages,
        )  # fmt: skip
        _wait_while_it_grows(child, name, folder)
        messages.seek(0)
        if child.returncode:
            last = (messages.read().strip().splitlines() or ["no message"])[-1]
            raise DataError(f"data.source: cannot download tfds:{name}: {last[:300]}")


def _wait_while_it_grows(child: subprocess.Popen, name: str, folder: Path) -> None:
    size, since = -1, time.monotonic()
    while child.poll() is None:
        now = _folder_bytes(folder)
        if now != size:
            size, since = now, time.monotonic()
            supervisor().tick()
        elif time.monotonic() - since > _STALL_S:
            child.kill()
            child.wait()
            raise DataError(
                f"data.source: cannot download tfds:{name}: nothing arrived for {_STALL_S:.0f} s; is there a network? "
                f"A dataset that is prepared elsewhere can be copied to {folder}"
            )
        time.sleep(_POLL_S)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # it was renamed meanwhile
    return total
