"""`tfdist launch`, `tfdist supervise`, and the supervisor of `tfdist train` in a cluster. No TensorFlow."""

import os
import re
import stat
import sys
import tempfile
from pathlib import Path

from absl import flags, logging

from tfdist import cli, config, errors, programs
from tfdist.checkpoint.workdir import Workdir
from tfdist.cli.chatter import without_startup_chatter
from tfdist.cli.usage import OneLine, fail, failures_in_one_line, near
from tfdist.cluster.hello import versions
from tfdist.cluster.link import supervisor as supervisor_link
from tfdist.cluster.resolve import job_token, resolve
from tfdist.cluster.spec import Cluster
from tfdist.launch import launcher, supervisor
from tfdist.launch.assign import Group
from tfdist.launch.watchdog import Limits

_PROGRAM = programs.module("tfdist.cli")
_LOG = re.compile(r"(chief|worker|ps|evaluator|data-dispatcher|data-worker)(-\d+)?\.log")
_OWN_COMMANDS = ("train", "eval", "generate", "export", "doctor")

_HELP = {
    "launch": """tfdist launch --workers=N [flags] -- train --config=...
tfdist launch --workers=N [flags] -- python x.py

One cluster on this machine: a process for each task. Shown, with a prefix: what worker 0 (with --ps the chief, and an
evaluator) prints, and what any of them writes to stderr. Whole logs are in WORKDIR/logs. The first failure stops all of
them and is reported as the cause.""",
    "supervise": """tfdist supervise [flags] -- python x.py

One task of a cluster (TF_CONFIG, Slurm, Kubernetes): meets the others, runs the program, and ends it when it hangs or
another task is lost. `tfdist train` does this by itself. It outlives what started it, unless --with-parent is given.""",
    "doctor": """tfdist doctor [--json] [--workdir=FOLDER]

What this machine, cluster and installation can do. In every task of a cluster: how fast they reduce.""",
}


def main(command: str, arguments: list[str]) -> None:
    """Parses and runs; ends the process."""
    given = _define(command)
    own, program = _split(arguments)
    if {"--help", "-h", "-help", "--helpfull"} & set(own):
        print(
            _HELP[command], "", "flags:", *(f"  --{n.replace('_', '-')}: {given[n].help}" for n in sorted(given)), sep="\n"
        )
        sys.exit(errors.DONE)
    try:
        positional = given([f"tfdist {command}", *own])
    except flags.UnrecognizedFlagError as error:
        hint = "; the program to start comes after --" if command != "doctor" and "--" not in arguments else ""
        fail(f"unknown flag --{error.flagname}{near(error.flagname, list(given))}{hint}")
    except flags.Error as error:
        fail(" ".join(str(error).split()))
    if len(positional) > 1:
        fail(f"unexpected argument {positional[1]!r}; the program to start comes after --")
    logging.get_absl_handler().setFormatter(OneLine())
    try:
        with failures_in_one_line():
            sys.exit({"launch": _launch, "supervise": _supervise, "doctor": _doctor}[command](given, program))
    except KeyboardInterrupt:
        sys.exit(errors.STOPPED)


def _define(command: str) -> flags.FlagValues:
    given = flags.FlagValues()
    if command == "launch":
        flags.DEFINE_integer("workers", None, "how many worker processes", lower_bound=1, flag_values=given)
        flags.DEFINE_integer("ps", 0, "how many parameter servers; the chief is one more", lower_bound=0, flag_values=given)
        flags.DEFINE_bool("evaluator", False, "one more process, which evaluates every checkpoint", flag_values=given)
        flags.DEFINE_integer("devices_per_worker", 0, "GPUs (else logical CPU devices) of each worker; 0: an even share",
                             lower_bound=0, flag_values=given)  # fmt: skip
        flags.DEFINE_integer(
            "data_workers", 0, "processes of a data service (data.service=true)", lower_bound=0, flag_values=given
        )
        flags.DEFINE_integer("max_restarts", 0, "how often to start again after a failure", lower_bound=0, flag_values=given)
        flags.DEFINE_string(
            "log_dir", "", "folder of the logs; default: WORKDIR/logs of train, else a temporary one", flag_values=given
        )
        flags.DEFINE_bool("all_output", False, "show what every process prints",
                          flag_values=given)  # fmt: skip
    if command in ("launch", "supervise"):
        waiting = config.ClusterConfig()
        for name, what in (("start", "to come to the start"), ("step", "without a step"), ("heartbeat", "without a sign")):
            flags.DEFINE_float(f"{name}_timeout_s", getattr(waiting, f"{name}_timeout_s"), f"seconds {what}; overrides "
                               "that of the config of train", lower_bound=1.0, flag_values=given)  # fmt: skip
    if command == "supervise":
        flags.DEFINE_bool("with_parent", False, "end the program as soon as the process that started this one is gone",
                          flag_values=given)  # fmt: skip
    if command == "doctor":
        flags.DEFINE_bool("json", False, "one JSON object instead of a table", flag_values=given)
        flags.DEFINE_string("workdir", ".", "the folder whose disk is measured", flag_values=given)
        flags.DEFINE_float(
            "start_timeout_s", 60.0, "seconds to wait for the other tasks", lower_bound=1.0, flag_values=given
        )
    return given


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags before `--` (with - or _ in their names), the program after it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = []
    for argument in arguments[:end]:
        name, equals, value = argument.partition("=")
        own.append((name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name) + equals + value)
    return own, arguments[end + 1 :]


# ---- launch ----


def _launch(given: flags.FlagValues, program: list[str]) -> int:
    if given.workers is None:
        fail("expected --workers=N, found none; for example tfdist launch --workers=2 -- train --config=lm_tiny")
    if not program:
        fail("expected a program after --, found none; for example -- train --config=lm_tiny, or -- python x.py")
    if "TF_CONFIG" in os.environ:
        fail("TF_CONFIG: expected none (launch makes a cluster on this machine), found one; unset it, or start the program "
             "itself in each task")  # fmt: skip
    is_train = program[0] == "train"
    names = [f"{name}_timeout_s" for name in ("start", "step", "heartbeat")]
    if is_train:  # its limits are in its config
        command = [
            *_PROGRAM,
            *program,
            *(f"--config.cluster.{name}={given[name].value}" for name in names if given[name].present),
        ]
    else:
        command = [*_PROGRAM, "supervise", *(f"--{name}={given[name].value}" for name in names), "--", *program]
    if is_train:
        Workdir(workdir_of(program)).check_free()
    all_output = given.all_output or program[0] == "doctor"  # whose processes each print their own problems
    return launcher.run(Group(
        command, given.workers, given.ps, given.evaluator, given.devices_per_worker, given.max_restarts,
        _log_dir(given, program), given.data_workers, all_output,
    ))  # fmt: skip


def _log_dir(given: flags.FlagValues, program: list[str]) -> Path:
    """The folder of the logs, made. A temporary one is said: nobody would find it."""
    if not given.log_dir and program[0] != "train":
        folder = Path(tempfile.mkdtemp(prefix="tfdist-logs-"))
        print(f"tfdist: the output of every process: {folder}", file=sys.stderr, flush=True)
        return folder
    folder = Path(given.log_dir) if given.log_dir else workdir_of(program) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--log_dir: cannot write to {folder}: {error.strerror}")
    for log in sorted(folder.glob("*.log")):
        if _LOG.fullmatch(log.name) and not stat.S_ISREG(log.lstat().st_mode):
            fail(f"expected regular files in {folder}, the logs, found {log.name}, a link or a pipe; move it away")
    return folder


def workdir_of(arguments: list[str]) -> Path:
    """The workdir of a `train` command line: --workdir, else runs/<name of the config>."""

    def last(name: str) -> str:
        values = [a.split("=", 1)[1] for a in arguments if a.startswith((f"--{name}=", f"-{name}="))]
        values += [b for a, b in zip(arguments, arguments[1:], strict=False) if a in (f"--{name}", f"-{name}")]
        return values[-1] if values else ""

    return Path(last("workdir") or f"runs/{Path(last('config') or 'run').stem}")


# ---- one task ----


def supervise_training(cluster: Cluster, settings: config.Config, arguments: list[str]) -> int:
    """Runs `tfdist train` with the same arguments as a supervised child. Returns its exit code."""
    limits = Limits(**{name: getattr(settings.cluster, name) for name in Limits.__dataclass_fields__})
    if cluster.is_chief:
        Workdir(workdir_of(arguments)).check_free()
    facts = versions() | config.cluster_facts(settings)
    return _run(cluster, [*_PROGRAM, "train", *arguments], facts, limits, must_beat=True)


def _supervise(given: flags.FlagValues, program: list[str]) -> int:
    if not program:
        fail("expected a program after --, found none; for example tfdist supervise -- python x.py")
    limits = Limits(**{name: given[name].value for name in Limits.__dataclass_fields__})
    command = [*_PROGRAM, *program] if program[0] in _OWN_COMMANDS else program
    parent_pid = cli.STARTED_BY if given.with_parent else 0
    return _run(resolve(), command, versions(), limits, must_beat=False, parent_pid=parent_pid)


def _run(
    cluster: Cluster, command: list[str], facts: dict, limits: Limits, must_beat: bool, parent_pid: int = 0
) -> int:  # fmt: skip
    own = supervisor.from_launcher() | {"parent_pid": parent_pid}
    return supervisor.run(supervisor.Job(cluster, job_token(cluster), command, facts, limits, must_beat, **own))


# ---- doctor ----


def _doctor(given: flags.FlagValues, program: list[str]) -> int:
    if program:
        fail(f"unexpected argument {program[0]!r}")
    with without_startup_chatter():
        from tfdist import doctor

    supervisor_link()  # beats from here on
    try:
        cluster, problem = resolve(), ""
    except errors.Failure as error:
        cluster, problem = Cluster(), str(error)
    return doctor.run(cluster, given.workdir, given.json, problem, given.start_timeout_s)
