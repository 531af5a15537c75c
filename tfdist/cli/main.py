"""Dispatch: `tfdist COMMAND --flags`. TensorFlow is imported by the commands only: help and usage errors are instant."""

import os
import re
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from tfdist import config, configs, errors, files
from tfdist.checkpoint.workdir import Workdir
from tfdist.cli import processes
from tfdist.cli.chatter import without_startup_chatter
from tfdist.cli.usage import OneLine, fail, failures_in_one_line, near
from tfdist.cluster.link import supervisor
from tfdist.cluster.resolve import resolve, supervisor_fd
from tfdist.cluster.spec import check_strategy
from tfdist.launch import output
from tfdist.verification.subject import DTYPES, NUM_STEPS, STRATEGIES

USAGE = """tfdist: distributed training for TensorFlow and Keras 3, the same answer on one device and on many

  tfdist train    --config=lm_tiny --workdir=runs/a              train, or go on where a run stopped
  tfdist eval     --workdir=runs/a                               exact loss, perplexity and bits per byte
  tfdist generate --workdir=runs/a --prompt='def '               sample from the model
  tfdist export   --workdir=runs/a --out=model.keras             the trained model as a Keras file
  tfdist data build --source=files:GLOB --out=FOLDER             tokenise a corpus once; data inspect FOLDER shows it
  tfdist data audit --config=lm_tiny --workers=4                 which worker reads what
  tfdist launch   --workers=2 -- train --config=...              a cluster of processes on this machine
  tfdist launch   --workers=2 -- python script.py                the same for any TensorFlow program
  tfdist supervise -- python script.py                           one task of a cluster (TF_CONFIG, Slurm, Kubernetes)
  tfdist verify   --config=lm_tiny                               is this machine's training the same on every strategy?
  tfdist doctor                                                  what this machine, cluster and installation can do

A config is a Python file with get_config(), or the name of one that comes with tfdist (`tfdist train --help`). Any value of
it can be given as --config.train.num_steps=500. `tfdist COMMAND --help` lists a command's flags."""

_MOST_CONFIG_BYTES = 1 << 20
_RUN_COMMANDS = ("train", "eval", "generate", "export", "verify")  # on a config or a workdir
_CONFIG_HELP = f"a Python file with get_config(), or a name ({', '.join(configs.names())})"
_CONFIG_COMMANDS = ("train", "verify", "audit")  # of a config file
_WORKS = (["train"], ["launch"], ["supervise"], ["data", "build"])  # what they print is not what they are for
_COMMANDS = (*_RUN_COMMANDS, "data", "launch", "supervise", "doctor")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in _WORKS or arguments[:2] in _WORKS:
        output.never_fail()
    if not arguments or arguments[0] in ("help", "-h", "-help", "--help", "--helpfull"):
        print(USAGE)
        sys.exit(errors.DONE if arguments else errors.USAGE)
    if arguments[0] == "--version":
        from tfdist import __version__

        print(__version__)
        sys.exit(errors.DONE)
    command, *rest = arguments
    if command not in _COMMANDS:
        fail(f"expected a command ({', '.join(_COMMANDS)}), found {command!r}{near(command, _COMMANDS)}")
    if command == "data":
        from tfdist.cli import data

        command, rest = (rest[0], rest[1:]) if rest else ("", [])
        if command not in data.COMMANDS:
            fail(f"data: expected {', '.join(data.COMMANDS)}, found {command!r}{near(command, data.COMMANDS)}")
        if command != "audit":
            data.main(command, rest)
    if command in (*_RUN_COMMANDS, "audit"):
        rest = _with_config_files(rest) if command in _CONFIG_COMMANDS else rest
        argv = [f"tfdist {command}", *rest]
        to_trust = _define_flags(command, argv)
        app.run(lambda _: _run(command, rest, to_trust), argv=argv, flags_parser=lambda args: _parse(command, args))
    else:
        processes.main(command, rest)


def _with_config_files(arguments: list[str]) -> list[str]:
    """`--config=lm_tiny` -> `--config=FOLDER/lm_tiny.py`, where that comes with tfdist."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config") and equals:
            argument = f"{name}={configs.file_of(value)}"
        elif before in ("--config", "-config"):
            argument = configs.file_of(argument)
        found.append(argument)
    return found


def _define_flags(command: str, argv: list[str]) -> str:
    """Returns what --trust is needed for, if it is."""
    for name in _given_overrides(argv):
        if name not in config.field_names():
            fail(f"unknown config key {name!r}{near(name, config.field_names())}")
    if command in ("verify", "audit"):
        config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, sys_argv=argv)
    if command == "audit":
        flags.DEFINE_integer("workers", 1, "how many workers read", lower_bound=1)
        flags.DEFINE_integer("steps", 100, "how many steps to read", lower_bound=1)
        flags.DEFINE_bool("json", False, "one JSON object, with all documents of each worker")
        return ""
    if command == "verify":
        flags.DEFINE_list(
            "strategies", list(STRATEGIES), "what to compare with one_device: mirrored:2, multi_worker:2x1, ..."
        )
        flags.DEFINE_integer("steps", NUM_STEPS, "how many steps to compare", lower_bound=1)
        flags.DEFINE_enum("dtype", "float64", DTYPES, "instead of model.dtype; own: as the config says")
        return ""
    flags.DEFINE_string("workdir", "" if command == "train" else None, "the folder of the run")
    if command == "train":
        config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, sys_argv=argv)
        flags.DEFINE_bool("fresh", False, "start at step 0; an earlier run in the workdir is kept in workdir/old-N")
        return ""
    try:
        stored, to_trust = _stored_config(argv)
    except errors.Failure as error:
        fail(str(error), error.exit_code)
    config_flags.DEFINE_config_dataclass("config", stored, "the run's config, with overrides", sys_argv=argv)
    flags.DEFINE_bool("trust", False, "read the data and the cache that a workdir of another user asks for")
    if command == "eval":
        flags.DEFINE_enum("split", "validation", ["validation", "train"], "which split")
    if command == "generate":
        flags.DEFINE_string("prompt", "", "the text to go on from")
        flags.DEFINE_integer(
            "num_tokens", None, "how many tokens to add; default: 200, or what the model can", lower_bound=1
        )
        flags.DEFINE_float("temperature", 0.8, "0 is greedy", lower_bound=0.0)
        flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0: all", lower_bound=0)
        flags.DEFINE_float("top_p", 1.0, "keep the smallest set of this probability", lower_bound=0.0, upper_bound=1.0)
        flags.DEFINE_integer("seed", 0, "the same seed gives the same text")
    if command == "export":
        flags.DEFINE_string("out", "model.keras", "the file to write")
    return to_trust


def _stored_config(argv: list[str]) -> tuple[config.Config, str]:
    """The config of the run that `--workdir` names, and what --trust is needed for where it is another user's."""
    given = [argument.split("=", 1)[1] for argument in argv if argument.startswith(("--workdir=", "-workdir="))]
    given += [value for name, value in zip(argv, argv[1:], strict=False) if name in ("--workdir", "-workdir")]
    if not given:
        return config.Config(), ""  # the missing flag, or --help, is dealt with when flags are parsed
    path = Workdir(given[-1]).config
    try:
        with files.open_inside(path.parent, path.name) as file:
            stored, owner = config.from_json(file.read(_MOST_CONFIG_BYTES).decode()), os.fstat(file.fileno()).st_uid
    except FileNotFoundError:
        raise errors.UserError(
            f"--workdir: expected the folder of a run ({path.name} in it), found none: {given[-1]}"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise errors.UserError(f"--workdir: cannot read {path}: {why}") from error
    if owner in _own_users():
        return stored, ""
    source, cache = (errors.one_line(repr(value), 120) for value in (stored.data.source, stored.data.cache_dir))
    asks = f"data.source={source} and {f'data.cache_dir={cache}' if stored.data.cache_dir else 'the usual cache'}"
    name = errors.one_line(path, 120)
    return stored, f"--workdir: {name} belongs to another user (number {owner}) and asks for {asks}; --trust reads them"


def _own_users() -> set[int]:
    """This one, and who became root with sudo."""
    sudo = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else ""
    return {os.geteuid(), *({int(sudo)} if re.fullmatch("[0-9]{1,10}", sudo) else ())}


def _parse(command: str, argv: list[str]) -> list[str]:
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in argv):
        print(_help(command))
        sys.exit(errors.DONE)
    given = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    if command in _CONFIG_COMMANDS and given and not os.path.isfile(given[-1]):
        fail(f"--config: expected {_CONFIG_HELP}, found no file {given[-1]!r}{near(Path(given[-1]).stem, configs.names())}")
    try:
        positional = flags.FLAGS(argv)
        if len(positional) > 1:
            fail(f"unexpected argument {positional[1]!r}; flags look like --name=value")
        if "workdir" in flags.FLAGS and flags.FLAGS.workdir is None:
            fail("expected --workdir=FOLDER, found none")
        if flags.FLAGS.config is None:
            fail("expected --config=FILE.py, found none; for example --config=lm_tiny")
        config.validate(flags.FLAGS.config)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        known = [*_own_flags(), *(f"config.{key}" for key in config.field_names())]
        fail(f"unknown flag --{name}{near(name, known)}")
    except Exception as error:  # the config file is the user's Python: whatever it raises is a config error
        fail(f"{' '.join(str(error).split())} ({type(error).__name__})")
    return positional


def _own_flags() -> dict[str, flags.Flag]:
    """This command's flags, without the many that absl adds."""
    return {flag.name: flag for flag in flags.FLAGS.flags_by_module_dict().get(__name__, [])} | {
        name: flags.FLAGS[name] for name in ("config", "workdir") if name in flags.FLAGS
    }


def _help(command: str) -> str:
    own = [f"  --{name}: {flag.help}" for name, flag in sorted(_own_flags().items())]
    keys = [f"  --config.{key}={value}" for key, value in config.flatten(config.Config()).items()]
    return "\n".join([USAGE.splitlines()[0], "", f"flags of tfdist {command}:", *own, "", "config keys, defaults:", *keys])


def _run(command: str, arguments: list[str], to_trust: str) -> None:
    """Runs the command; every failure that a user can act on is one line and its exit code."""
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        fail(f"KERAS_BACKEND: expected tensorflow, found {backend!r}; unset it")
    if to_trust and not flags.FLAGS.trust:
        fail(to_trust)
    logging.get_absl_handler().setFormatter(OneLine())
    # before and after `Trainer.train`, which has its own way: leave through the `finally` blocks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(errors.STOPPED))
    try:
        with failures_in_one_line():
            cluster = resolve()
            if command == "train":
                check_strategy(cluster, flags.FLAGS.config.strategy.kind)
                if supervisor_fd() is None and (cluster.tasks or cluster.task.type == "evaluator"):
                    sys.exit(processes.supervise_training(cluster, flags.FLAGS.config, arguments))
            supervisor()  # from here on it beats
            with without_startup_chatter():
                from tfdist.cli import commands

            getattr(commands, command)(flags.FLAGS)
    except KeyboardInterrupt:
        fail("stopped; the checkpoints in the workdir are as they were", errors.STOPPED)


def _given_overrides(argv: list[str]) -> list[str]:
    """`--config.a.b=1`, `--noconfig.a.b` -> `a.b`."""
    names = [argument.lstrip("-").split("=", 1)[0] for argument in argv[1:] if argument.startswith("-")]
    return [name.removeprefix("no").removeprefix("config.") for name in names if name.startswith(("config.", "noconfig."))]
