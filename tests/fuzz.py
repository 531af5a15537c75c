"""Checkpoints and datasets, damaged in every way that a seed gives, and opened as the package opens them. A program:

    python tests/fuzz.py manifests|fits|datasets COUNT SEED

Prints JSON: how the cases ended ("good", "older", or an exit code), and what of them was not a printable line of at most 500
characters with code 2, 3 or 4, within seconds.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import logging as absl_logging

from tfdist import files
from tfdist.data import build, corpus, index, inspect, shards
from tfdist.errors import CheckpointError, DataError, UserError

LIMIT_S, LIMIT_CPU_S = 60.0, 10.0  # other programs may run beside this one
MOST_BYTES = 4 << 30
STRANGE = (
    None, True, False, -1, 0, 1, 7, 1.5, float("nan"), 1 << 62, 1 << 70, 10**400, "", "x", "²", "7", "\x1b[31m\n", "\ud800",
    "..", "../../etc/passwd", "values-00000.bin/..", "float32", "object", "<U4", "O", [], {}, [[]], [0], [-1],
    [1 << 40, 1 << 40], {"x": 1}, "y" * 200_000, list(range(5000)),
)  # fmt: skip


# ---- damage ----


def damage_tree(chance: random.Random, tree: dict) -> dict:
    """One place of a JSON value deleted, of another type, nested, or huge."""
    tree = copy.deepcopy(tree)
    holder, key = place_in(chance, tree)
    how = chance.choice(("delete", "retype", "retype", "nest", "deep", "huge", "twice"))
    if how == "delete":
        del holder[key]
    elif how == "retype":
        holder[key] = copy.deepcopy(chance.choice(STRANGE))
    elif how == "nest":
        holder[key] = chance.choice(([holder[key]], {"x": holder[key]}, {str(key): holder[key]}))
    elif how == "deep":
        holder[key] = "DEEP"
    elif how == "huge":
        holder[key] = chance.choice((1 << 31, 1 << 40, 10**15, (1 << 63) - 1, 10**3000, 1e308, -(10**18)))
    elif isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[f"{key}2"] = copy.deepcopy(holder[key])
    return tree


def place_in(chance: random.Random, tree: dict) -> tuple[dict | list, str | int]:
    """One of all places, those deep inside as likely as those at the top."""
    holder, key = tree, chance.choice(sorted(tree))
    while isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.8:
        holder = holder[key]
        key = chance.choice(sorted(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    return holder, key


def text_of(chance: random.Random, tree: dict) -> bytes:
    """Its checksum made anew; sometimes cut short."""
    with contextlib.suppress(ValueError):  # half a surrogate pair, or too many digits
        tree = files.sealed(tree)
    sys.set_int_max_str_digits(0)
    text = json.dumps(tree).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    sys.set_int_max_str_digits(4300)
    return text[: chance.randrange(len(text))].encode() if chance.random() < 0.05 else text.encode()


def damage_file(chance: random.Random, path: Path) -> None:
    """Another kind of file in its place, or other bytes."""
    how = chance.choice(
        ("missing", "pipe", "zero", "loop", "folder", "up", "short", "long", "hole", "byte", "empty", "beside")
    )
    content = path.read_bytes()
    if how in ("short", "long", "byte", "empty"):
        at = chance.randrange(min(len(content), 200)) if chance.random() < 0.7 else chance.randrange(len(content))
        changed = bytes([content[at] ^ (1 << chance.randrange(8))])
        made = {"short": content[:at], "long": content * 3, "byte": content[:at] + changed + content[at + 1 :], "empty": b""}
        path.write_bytes(made[how])
        return
    if how == "hole":
        os.truncate(path, 1 << 40)
        return
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "beside":
        path.with_name("beside").write_bytes(content)
        path.symlink_to("beside")
    elif how != "missing":
        path.symlink_to({"zero": "/dev/zero", "loop": path.name, "up": ".."}[how])


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def put(source: Path, path: Path) -> None:
    remove(path)
    shutil.copytree(source, path)


# ---- what is damaged ----


class Manifests:
    """Of checkpoints of a `Trainer`: an older good one, and a damaged newest one."""

    def __init__(self, folder: Path):
        import keras

        import tfdist
        from tfdist.train.state import averaged

        self.averaged, self.workdir = averaged, folder / "run"
        strategy = tfdist.OneDevice()
        with strategy.scope():
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
            optimizer = keras.optimizers.AdamW(1e-3, use_ema=True)
        self.trainer = tfdist.Trainer(strategy, model, optimizer, loss=lambda y, p: (y - p) ** 2, writers=[])
        self.trainer.restore(self.workdir)
        for step in (5, 9):
            self.trainer.state.step.assign(step)
            self.trainer.save()
        self.newest = self.workdir / "checkpoints" / "step-00000009"
        shutil.copytree(self.newest, folder / "good")
        self.good = folder / "good"

    def damage(self, chance: random.Random) -> None:
        put(self.good, self.newest)
        kind = chance.random()
        manifest = self.newest / "manifest.json"
        if kind < 0.8:
            tree = json.loads(manifest.read_text())
            for _ in range(chance.choice((1, 1, 1, 2))):
                tree = damage_tree(chance, tree) if tree else tree
            manifest.write_bytes(text_of(chance, tree))
        elif kind < 0.97:
            damage_file(chance, chance.choice((manifest, self.newest / "values-00000.bin")))
        else:
            shutil.rmtree(self.newest)
            chance.choice(
                (lambda: os.mkfifo(self.newest), lambda: self.newest.symlink_to("."), lambda: self.newest.touch())
            )()

    def open(self) -> str:
        step = self.trainer.restore(self.workdir)
        self.averaged(self.trainer_checkpoint().arrays(), "this one")
        assert all(np.isfinite(weight.numpy()).all() for weight in self.trainer.model.weights)
        return {5: "older", 9: "good"}[step]

    def trainer_checkpoint(self):
        from tfdist.checkpoint import store

        return store.latest(self.workdir / "checkpoints")


class Fits(Manifests):
    """The same of `tfdist.fit.Checkpoint`, in the middle of an epoch."""

    def __init__(self, folder: Path):
        self.workdir, self.newest, self.good = folder / "fit", folder / "fit" / "step-00000006", folder / "good"
        with contextlib.suppress(InterruptedError):
            self.fit(stop_at=6)
        shutil.copytree(self.newest, self.good)
        self.saved = folder / "saved"
        shutil.copytree(self.workdir, self.saved)

    def fit(self, stop_at: int = 0) -> None:
        import keras

        import tfdist

        class Stop(keras.callbacks.Callback):
            ended = 0

            def on_train_batch_end(self, batch, logs=None):
                self.ended += 1
                if self.ended == stop_at + 1 and stop_at:  # before the next one begins, this one's checkpoint is written
                    raise InterruptedError

        rows = np.arange(32, dtype="float32").reshape(-1, 1) / 32
        with tfdist.OneDevice().scope():
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2), keras.layers.Dense(1)])
            model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse", metrics=["mae"], jit_compile=False)
        fit_checkpoint = tfdist.fit.Checkpoint(self.workdir, every_steps=1)
        others = [
            keras.callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau("loss", patience=2), keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        ]  # fmt: skip
        model.fit(rows, rows, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[*others, fit_checkpoint, Stop()])

    def open(self) -> str:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            self.fit()
        return "good" if "goes on after step 6" in said.getvalue() else "older"

    def damage(self, chance: random.Random) -> None:
        for path in self.workdir.glob("step-*"):
            remove(path)
        for path in self.saved.glob("step-*"):
            put(path, self.workdir / path.name)
        super().damage(chance)
        tree = json.loads((self.good / "manifest.json").read_text())
        if chance.random() < 0.6 and self.newest.is_dir():  # what `fit` keeps besides is a small part of a manifest
            tree["fit"] = damage_tree(chance, tree["fit"])
            put(self.good, self.newest)
            (self.newest / "manifest.json").write_bytes(text_of(chance, tree))


class Datasets:
    """Of bytes and of subwords, with several shards."""

    def __init__(self, folder: Path):
        build.SHARD_TOKENS = 3000
        (folder / "texts").mkdir()
        for i in range(24):
            lines = [f"{i} line {j}: the quick brown fox\n" for j in range(20 + i)]
            (folder / "texts" / f"{i:02}.txt").write_text("".join(lines))
        self.good = [folder / spec for spec in ("bytes", "bpe:300")]
        for path in self.good:
            build.build(corpus.plan(f"files:{folder}/texts/*.txt", "text", 0.1), path.name, "files", path)
            shards.read(path)
        self.path = folder / "damaged"

    def damage(self, chance: random.Random) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(chance.choice(self.good), self.path)
        target, kind = self.path / index.INDEX, chance.random()
        tree = json.loads(target.read_text())
        if kind < 0.6:
            for _ in range(chance.choice((1, 1, 1, 2))):
                tree = damage_tree(chance, tree) if tree else tree
            target.write_bytes(text_of(chance, hashed(tree) if chance.random() < 0.5 else tree))
            return
        path = chance.choice(sorted(p for p in self.path.iterdir() if kind < 0.9 or p.suffix == ".json"))
        damage_file(chance, path)
        for split in tree["splits"].values():
            for shard in split["shards"]:
                for key, name in (("sha256", shard["file"]), ("documents_sha256", index.documents_of(shard["file"]))):
                    if name == path.name and path.is_file() and path.stat().st_size < 1 << 30:
                        shard[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path != target and path.is_file():
            target.write_bytes(json.dumps(files.sealed(hashed(tree))).encode())

    def open(self) -> str:
        dataset = shards.read(self.path)
        inspect.describe(dataset, 2)
        return "good"


def hashed(tree: dict) -> dict:
    with contextlib.suppress(Exception):
        tree["data_hash"] = index.data_hash(tree["splits"], tree["tokenizer_hash"])
    return tree


# ---- the run ----


TIMERS = ((signal.ITIMER_REAL, signal.SIGALRM, LIMIT_S), (signal.ITIMER_PROF, signal.SIGPROF, LIMIT_CPU_S))


class Late(BaseException):
    """Not within seconds. No `OSError`, which would be taken for one of the file that is waited for."""


def outcome(opened: Callable[[], str]) -> tuple[str, str]:
    """(how it ended, what is wrong with that)."""

    def late(*_):
        raise Late

    for timer, number, limit_s in TIMERS:
        signal.signal(number, late)
        signal.setitimer(timer, limit_s)
    try:
        return opened(), ""
    except (CheckpointError, DataError, UserError) as error:
        line = f"tfdist: {error}"
        wrong = "" if line.isprintable() and len(line) <= 500 and error.exit_code in (2, 3, 4) else f"no line: {line!r}"
        return str(error.exit_code), wrong
    except BaseException:
        return "1", traceback.format_exc()[-1500:]
    finally:
        for timer, *_ in TIMERS:
            signal.setitimer(timer, 0)


class Heard(logging.Handler):
    """What was logged: one printable line each, too."""

    def __init__(self):
        super().__init__()
        self.wrong: list[str] = []
        self.lines = 0

    def emit(self, record):
        line = record.getMessage()
        self.lines += 1
        if not line.isprintable() or len(line) > 550:
            self.wrong.append(line[:600])


def main(kind: str, count: int, seed: int) -> None:
    heard, ended, wrong, slowest_s = Heard(), Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        subject = {"manifests": Manifests, "fits": Fits, "datasets": Datasets}[kind](Path(folder))
        absl = absl_logging.get_absl_logger()
        absl.handlers[:], absl.propagate = [heard], False
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory + MOST_BYTES, resource.RLIM_INFINITY))
        for i in range(count):
            chance = random.Random(f"{seed}-{i}")
            subject.damage(chance)
            started_s = time.perf_counter()
            how, why = outcome(subject.open)
            slowest_s = max(slowest_s, time.perf_counter() - started_s)
            ended[how] += 1
            wrong += [f"case {i}: {text}" for text in (why, *heard.wrong) if text]
            heard.wrong.clear()
    print(
        json.dumps(
            {
                "ended": ended,
                "heard": heard.lines,
                "wrong": wrong[:20],
                "num_wrong": len(wrong),
                "slowest_s": round(slowest_s, 2),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
