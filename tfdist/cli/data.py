"""`tfdist data build` and `inspect`. No TensorFlow, but for a tfds: source."""

import os
import sys
from pathlib import Path

from absl import flags, logging
from rich import progress
from rich.console import Console

from tfdist import errors
from tfdist.cli.usage import OneLine, fail, near
from tfdist.config import DataConfig
from tfdist.data import build, corpus, inspect, shards
from tfdist.data.index import read as read_index

COMMANDS = ("build", "inspect", "audit")

_HELP = {
    "build": """tfdist data build --source='files:docs/**/*.md' --tokenizer=bpe:8192 --out=FOLDER

Tokenises a corpus once. The same input gives the same bytes, whatever the number of processes; a build that was stopped
goes on. Then: --config.data.source=shards:FOLDER""",
    "inspect": "tfdist data inspect FOLDER [--samples=2] [--plot=lengths.png]\n\nSizes, lengths of documents, samples.",
}


def main(command: str, arguments: list[str]) -> None:
    """Parses and runs `build` or `inspect`; ends the process."""
    given = _define(command)
    if {"--help", "-h", "-help", "--helpfull"} & set(arguments):
        print(_HELP[command], "", "flags:", *(f"  --{name}: {given[name].help}" for name in sorted(given)), sep="\n")
        sys.exit(errors.DONE)
    try:
        positional = given([f"tfdist data {command}", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        fail(f"unknown flag --{error.flagname}{near(error.flagname, list(given))}")
    except flags.Error as error:
        fail(" ".join(str(error).split()))
    logging.get_absl_handler().setFormatter(OneLine())
    try:
        {"build": _build, "inspect": _inspect}[command](given, positional)
    except errors.Failure as error:
        fail(" ".join(str(error).split()), error.exit_code)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on", errors.STOPPED)
    sys.exit(errors.DONE)


def _define(command: str) -> flags.FlagValues:
    given, defaults = flags.FlagValues(), DataConfig()
    if command == "build":
        flags.DEFINE_string("source", None, corpus.TEXTS, flag_values=given)
        flags.DEFINE_string("out", None, "the folder to make", flag_values=given)
        flags.DEFINE_string(
            "tokenizer", "bytes", "bytes | bpe:SIZE | file:tokenizer.json | ids:SIZE (of a bin: source)", flag_values=given
        )
        flags.DEFINE_string("text_key", defaults.text_key, "the feature of tfds:, the key of jsonl:", flag_values=given)
        flags.DEFINE_float("validation_fraction", defaults.validation_fraction, "of the documents", flag_values=given)
        flags.DEFINE_integer("processes", 0, "0: one for each core", lower_bound=0, flag_values=given)
        flags.DEFINE_enum("on_bad_record", "refuse", ["refuse", "skip"], "records that are none", flag_values=given)
        flags.DEFINE_integer("max_bad_records", defaults.max_bad_records, "to skip", lower_bound=0, flag_values=given)
        flags.DEFINE_integer(
            "max_record_mb", defaults.max_record_mb, "a longer line of jsonl: is a bad record", lower_bound=1,
            flag_values=given,
        )  # fmt: skip
    else:
        flags.DEFINE_integer("samples", 2, "documents of each split to show", lower_bound=0, flag_values=given)
        flags.DEFINE_string("plot", "", "a PNG file for the histogram of lengths", flag_values=given)
    return given


def _build(given: flags.FlagValues, positional: list[str]) -> None:
    for name in ("source", "out"):
        if not given[name].value:
            fail(f"expected --{name}=..., found none")
    if positional:
        fail(f"unexpected argument {positional[0]!r}; flags look like --name=value")
    if not 0 < given.validation_fraction < 1:
        fail(f"--validation_fraction: expected more than 0 and less than 1, found {given.validation_fraction}")
    out = Path(given.out).absolute()
    if not out.name:
        fail(f"--out: expected a new folder, found {given.out}")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        fail(f"--out: expected a new folder, found {out}; to use it: --config.data.source=shards:{out}")
    plan = corpus.plan(given.source, given.text_key, given.validation_fraction, given.on_bad_record, given.max_record_mb)
    processes = given.processes or os.cpu_count() or 1
    with progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(), disable=not sys.stderr.isatty(),
        console=Console(stderr=True),
    ) as bar:  # fmt: skip
        task = bar.add_task("tokenising", total=plan.size)
        build.build(
            plan, given.tokenizer, given.source, out, processes=processes, max_bad_records=given.max_bad_records,
            progress=lambda size: bar.advance(task, size), in_process=_one_thread,
        )  # fmt: skip
    _print_built(shards.read(out))


def _one_thread() -> None:
    """In each process of a build: the processes are the threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _print_built(dataset: shards.TokenDataset) -> None:
    index = read_index(dataset.path)
    for name, split in dataset.splits.items():
        print(f"{name}: {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards")
    not_utf8 = sum(split["not_utf8"] for split in index["splits"].values())
    if not_utf8:
        print(f"tfdist: warning: {not_utf8} parts of documents were not UTF-8: U+FFFD stands there now", file=sys.stderr)
    if index["bad_records"]:
        print(f"tfdist: warning: {index['bad_records']} bad records were left out", file=sys.stderr)
    own = "" if dataset.tokenizer == "bytes" else f" --config.data.tokenizer={dataset.tokenizer}"
    own += f" --config.model.vocab_size={dataset.vocab_size}" if dataset.vocab_size > 258 else ""
    print(f"next: tfdist train --config=lm_tiny --config.data.source=shards:{dataset.path}{own}")


def _inspect(given: flags.FlagValues, positional: list[str]) -> None:
    if len(positional) != 1:
        fail(f"expected one FOLDER of a tokenised dataset, found {' '.join(positional) or 'none'}")
    dataset = shards.read(Path(positional[0]))
    print(errors.printable(inspect.describe(dataset, given.samples)))
    if given.plot:
        try:
            inspect.plot(dataset, Path(given.plot))
        except (OSError, ValueError) as error:
            raise errors.UserError(f"--plot: cannot write {given.plot}: {error}") from error
        print(f"lengths of documents: {given.plot}")
