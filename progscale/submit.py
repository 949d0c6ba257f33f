"""`progscale submit`: launch/slurm/train.sbatch filled in for a config, and SLURM asked before the job is queued. No torch.

The filled script is whole: `sbatch FILE` submits the same job again, from any folder and any shell.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import progscale
from progscale.config import Config, load_config, micro_batch_size
from progscale.errors import ConfigError, Fault, UserError
from progscale.names import metric_faults, name_faults
from progscale.slurm import (
    ARRAY_LIMIT,
    Partition,
    Wanted,
    ask_partitions,
    clean_environment,
    format_time,
    missing_command,
    parse_array,
    parse_gpus,
    parse_memory,
    parse_time,
    plural,
    refusals,
    share_of_cpus,
    submit_script,
    try_script,
)

TEMPLATE = Path("launch", "slurm", "train.sbatch")
# What the template and the nodes read; those of the submitting shell go into the script, so that it is whole.
VARIABLES = (
    *("PROGSCALE_SETUP", "PROGSCALE_CONTAINER", "PROGSCALE_APPTAINER", "PROGSCALE_MOUNTS", "PROGSCALE_RANKS_PER_NODE"),
    *("PROGSCALE_MAX_RESTARTS", "PROGSCALE_JOIN_SECONDS", "PROGSCALE_HEAD_ADDRESS", "PROGSCALE_LOGS", "PROGSCALE_CACHE"),
)
# sbatch's own variables win over what stands in a script.
SBATCH_VARIABLES = {
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
    "qos": "SBATCH_QOS",
    "time": "SBATCH_TIMELIMIT",
    "mem": "SBATCH_MEM_PER_NODE",
    "gpus_per_node": "SBATCH_GPUS_PER_NODE",
}
# They would win too, and have no option here.
UNHEARD = ("SBATCH_JOB_NAME", "SBATCH_ARRAY_INX", "SBATCH_SIGNAL", "SBATCH_OUTPUT", "SBATCH_OPEN_MODE", "SBATCH_NO_REQUEUE")
# Options of sbatch that --sbatch does not take, and where they are given instead.
OWN = {
    **{name: f"give --{name}" for name in ("nodes", "gpus-per-node", "time", "partition", "account", "qos", "mem", "job-name")},
    **{name: "give --gpus-per-node" for name in ("gpus", "gpus-per-task", "gpus-per-socket")},
    "array": "give --array, --seeds or --tasks",
    "cpus-per-task": "give --cpus-per-rank",
    "signal": "give --signal-seconds",
    **{name: "the script starts one task on each node, and the ranks from there" for name in ("ntasks", "ntasks-per-node")},
    **{name: "the script is queued again by itself; --max-restarts 0 forbids it" for name in ("requeue", "no-requeue")},
    "chdir": "change to that folder before progscale submit",
    "wrap": "the script is launch/slurm/train.sbatch",
}
# sbatch takes no larger one.
MOST_SIGNAL_SECONDS = 65535
NAME_LETTERS = 100
SHOWN = 6


@dataclass(frozen=True)
class Request:
    """What `progscale submit` was asked for; names and values as on the command line.

    Attributes:
        config: layers, as for train.
        set: as for train.
        plugin: modules, imported already.
        resume: as for train; None: the script's own, auto.
        allow_pickle: as for train.
        trust_remote_code: as for train.
        nodes: how many.
        gpus_per_node: "8" or "a100:8".
        cpus_per_rank: CPUs.
        ranks_per_node: None: one for each GPU, else one.
        time: limit, as sbatch takes it.
        partition: one, or several behind commas.
        account: whom it is charged to.
        qos: quality of service.
        mem: memory of each node, as sbatch takes it.
        job_name: None: the run's.
        array: elements, each of which is a seed.
        seeds: one run for each.
        tasks: one run for each.
        setup: file that every node sources.
        container: image of enroot's, for pyxis.
        apptainer: image of Apptainer's.
        max_restarts: None: the script's own.
        signal_seconds: before the time limit the run is told to save.
        sbatch: more options of sbatch, "name=value".
        dry_run: show the script, queue nothing.
        yes: do not ask.
    """

    config: Sequence[str] = ()
    set: Sequence[str] = ()
    plugin: Sequence[str] = ()
    resume: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    nodes: int = 1
    gpus_per_node: str | None = None
    cpus_per_rank: int | None = None
    ranks_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    job_name: str | None = None
    array: str | None = None
    seeds: Sequence[int] = ()
    tasks: Sequence[str] = ()
    setup: str | None = None
    container: str | None = None
    apptainer: str | None = None
    max_restarts: int | None = None
    signal_seconds: int = 300
    sbatch: Sequence[str] = ()
    dry_run: bool = False
    yes: bool = False


@dataclass(frozen=True)
class Run:
    """One run of a job.

    Attributes:
        own: its own options of train, behind those of all.
        config: what they make.
    """

    own: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> str:
        """Where it leaves what it makes."""
        return os.path.join(self.config.run.output_dir, self.config.run_name)


@dataclass(frozen=True)
class Job:
    """A checked request.

    Attributes:
        name: for SLURM and for files.
        runs: one, or one for each element of an array.
        wanted: of the cluster.
        home: the checkout.
        has_lines: whether the array's elements take their options from a file of lines.
    """

    name: str
    runs: tuple[Run, ...]
    wanted: Wanted
    home: Path
    has_lines: bool = False

    @property
    def lines(self) -> str:
        """The file of lines: line N is what element N has of its own."""
        return "".join(" ".join(run.own) + "\n" for run in self.runs) if self.has_lines else ""


@dataclass(frozen=True)
class Line:
    """A line of the filled script, without its end, and whether the template lacks it; an argument may hold line ends."""

    text: str
    is_new: bool = False


def submit(request: Request) -> int:
    """Checks, fills, shows and submits; returns the exit code 0.

    Args:
        request: of the command line; plug-ins are imported.

    Raises:
        ConfigError: with all that is wrong with options and config, or else all that the cluster cannot give.
        UserError: there is no SLURM here, or it refuses the job.
    """
    request = from_environment(request, os.environ)
    job = check(request)
    path = free_path(Path(os.environ.get("PROGSCALE_LOGS") or "logs") / "submitted", job.name)
    if request.dry_run:
        return show_alone(request, job, path)
    if missing := missing_command():
        raise UserError(
            f"submit: no {missing} on this machine, so it is no login node of a SLURM cluster; on hosts without SLURM start "
            f"{job.home / 'launch' / 'launch.sh'} on each of them, and --dry-run shows the script"
        )
    job, started = ask_cluster(request, job, path)
    filled = fill_for(request, job, path)
    console = Console(soft_wrap=True, highlight=False)
    show_changes(console, filled, job, path)
    console.print(Text(started))
    if not (request.yes or agreed(console)):
        console.print("nothing was submitted")
        return 0
    write(path, text_of(filled), job.lines)
    try:
        number = submit_script(path, environment_for(request))
    except UserError:
        # What was not submitted is not kept among what was.
        path.unlink()
        path.with_suffix(".txt").unlink(missing_ok=True)
        raise
    show_job(console, request, number, job, path)
    return 0


def show_alone(request: Request, job: Job, path: Path) -> int:
    """What --dry-run does: the whole script to stdout, what the cluster says of it to stderr."""
    remark = None
    faults: list[Fault] = []
    try:
        missing = missing_command()
        partitions = None if missing else ask_partitions()
        if missing:
            remark = f"the cluster was not asked: no {missing} on this machine"
    except UserError as error:
        partitions, remark = None, f"the cluster was not asked: {error}"
    if partitions is not None:
        faults = refusals(job.wanted, partitions)
        job = with_share(job, partitions)
    filled = fill_for(request, job, path)
    console = Console(soft_wrap=True, highlight=False)
    for line in filled:
        console.print(Text(line.text, style="bold green" if line.is_new and console.is_terminal else ""))
    beside = Console(stderr=True, soft_wrap=True, highlight=False)
    if job.has_lines:
        beside.print(Text(f"{path.with_suffix('.txt')} would hold\n{job.lines.rstrip()}"))
    if faults:
        raise ConfigError(faults)
    if partitions is not None:
        remark = try_filled(request, job, filled)
    beside.print(Text(f"progscale: {remark}; nothing was submitted"))
    return 0


def from_environment(request: Request, environment: Mapping[str, str]) -> Request:
    """The request with what the variables of sbatch and of the script say where an option is not given."""
    found: dict[str, Any] = {key: environment[name] for key, name in SBATCH_VARIABLES.items() if environment.get(name)}
    ranks = environment.get("PROGSCALE_RANKS_PER_NODE", "")
    if ranks.isdecimal():
        found["ranks_per_node"] = int(ranks)
    return replace(request, **{key: value for key, value in found.items() if getattr(request, key) is None})


def environment_for(request: Request) -> dict[str, str]:
    """Of sbatch: without what would win over the script."""
    given = [name for key, name in SBATCH_VARIABLES.items() if getattr(request, key) is not None]
    return clean_environment(os.environ, [*given, *UNHEARD])


# -- what was asked for -----------------------------------------------------------------------------------------------


def check(request: Request) -> Job:
    """The request as a job, with the config of each of its runs.

    Raises:
        ConfigError: with every fault of options and configs.
        UserError: progscale is installed without the script.
    """
    home = find_home(os.environ)
    faults: list[Fault] = []
    wanted = check_wanted(request, faults)
    check_files(request, faults)
    faults += [fault for text in request.sbatch if (fault := check_extra(text)) is not None]
    runs = check_runs(request, wanted, home, faults)
    if faults:
        raise ConfigError(faults)
    name = request.job_name or job_name(request, runs)
    return Job(name, tuple(runs), wanted, home, has_lines=bool(request.seeds or request.tasks))


def find_home(environment: Mapping[str, str]) -> Path:
    """The checkout whose launch/ the nodes use: $PROGSCALE_HOME, or where this module lies.

    Raises:
        UserError: there is no train.sbatch in it.
    """
    home = Path(environment.get("PROGSCALE_HOME") or Path(progscale.__file__).parents[1]).absolute()
    if not (home / TEMPLATE).is_file():
        raise UserError(f"PROGSCALE_HOME: '{home}' has no {TEMPLATE}; name a checkout of progscale, which the nodes need too")
    return home


def check_wanted(request: Request, faults: list[Fault]) -> Wanted:
    """What the job asks of the cluster; what is no amount of anything is appended to `faults`."""
    counts = {"--nodes": request.nodes, "--cpus-per-rank": request.cpus_per_rank, "--ranks-per-node": request.ranks_per_node}
    faults += [
        Fault(option, f"{count} is no number of them, from 1")
        for option, count in counts.items()
        if count is not None and count < 1
    ]
    if request.max_restarts is not None and request.max_restarts < 0:
        faults.append(Fault("--max-restarts", f"{request.max_restarts} is no number of restarts, from 0"))
    seconds = gpus = memory = None
    try:
        seconds = None if request.time is None else parse_time(request.time)
    except ValueError:
        faults.append(Fault("--time", f"'{request.time}' is no time limit; e.g. 90 (minutes), 12:00:00 or 2-12:00:00"))
    try:
        gpus = None if request.gpus_per_node in (None, "0") else parse_gpus(request.gpus_per_node)
    except ValueError:
        faults.append(Fault("--gpus-per-node", f"'{request.gpus_per_node}' is no number of GPUs; e.g. 8 or a100:8"))
    try:
        memory = None if request.mem is None else parse_memory(request.mem)
    except ValueError:
        faults.append(Fault("--mem", f"'{request.mem}' is no amount of memory; e.g. 200G, or 0 for all of each node"))
    if not 0 <= request.signal_seconds <= MOST_SIGNAL_SECONDS:
        faults.append(Fault("--signal-seconds", f"{request.signal_seconds} is not between 0 and {MOST_SIGNAL_SECONDS}"))
    elif seconds is not None and request.signal_seconds >= seconds:
        message = f"{request.signal_seconds} s before the end is before the begin of a job of --time {format_time(seconds)}"
        faults.append(Fault("--signal-seconds", f"{message}; lower it, or give more time"))
    if gpus is not None and request.ranks_per_node is not None and request.ranks_per_node > gpus.count:
        message = f"{request.ranks_per_node} ranks on {gpus.count} GPUs of a node; a rank has one of its own"
        faults.append(Fault("--ranks-per-node", f"{message}, so at most {gpus.count}"))
    return Wanted(
        nodes=request.nodes,
        ranks=request.ranks_per_node or (gpus.count if gpus else 1),
        cpus_per_rank=request.cpus_per_rank,
        megabytes=memory,
        gpus=gpus,
        seconds=seconds,
        signal_seconds=request.signal_seconds,
        partitions=tuple(name for name in (request.partition or "").split(",") if name),
    )


def check_files(request: Request, faults: list[Fault]) -> None:
    """What is no text for a line of SLURM's, and files that are not there."""
    if request.container and request.apptainer:
        faults.append(Fault("--container", "given beside --apptainer; keep one"))
    for option, name, is_file in (
        ("--setup", request.setup, True),
        ("--container", request.container, (request.container or "").endswith(".sqsh")),
        ("--apptainer", request.apptainer, (request.apptainer or "").endswith(".sif")),
    ):
        if name is not None and is_file and not os.access(name, os.R_OK):
            faults.append(Fault(option, f"'{name}' cannot be read"))
    resume = request.resume
    if resume not in (None, "auto", "never", "must") and not Path(str(resume)).exists():
        faults.append(Fault("--resume", f"'{resume}' is none of auto, never, must, and no checkpoint or run folder"))
    texts = {"--partition": request.partition, "--account": request.account, "--qos": request.qos, "--job-name": request.job_name}
    for option, text in texts.items():
        if text is not None and not (text and text.isprintable()):
            faults.append(Fault(option, f"{text!r} is no name"))
    if request.job_name is not None and set(request.job_name) & set("/%"):
        faults.append(Fault("--job-name", f"'{request.job_name}' names the files of the job too: no '/' and no '%'"))
    words = [*request.config, *request.set, *request.plugin, *request.tasks, request.resume or ""]
    if odd := [word for word in words if word.encode(errors="replace").decode() != word]:
        faults.append(Fault("", f"submit: {odd[0]!a} is no text, which a script has to be; rename what it names"))
    if not os.getcwd().isprintable():
        faults.append(Fault("", f"submit: the folder {os.getcwd()!r} cannot be written into a script of SLURM's"))


def check_extra(text: str) -> Fault | None:
    """What is wrong with an option that is handed to sbatch."""
    name = text.removeprefix("--").partition("=")[0]
    if not re.fullmatch(r"[a-z][a-z-]+", name) or not text.isprintable():
        return Fault("--sbatch", f"{text!r} is no long option of sbatch's; e.g. --sbatch constraint=a100 or --sbatch exclusive")
    if name in OWN:
        return Fault("--sbatch", f"'{text}': {OWN[name]}")
    if name == "gres" and "gpu" in text:
        return Fault("--sbatch", f"'{text}': {OWN['gpus']}")
    return None


def check_runs(request: Request, wanted: Wanted, home: Path, faults: list[Fault]) -> list[Run]:
    """The runs of the job; all that is wrong with their configs is appended to `faults`, each fault once."""
    seeds = check_seeds(request, faults)
    tasks = [task_layer(name, home, faults) for name in request.tasks]
    if len(set(request.tasks)) < len(request.tasks):
        faults.append(Fault("--tasks", f"{' '.join(request.tasks)} names a task twice"))
    if request.array is not None and (request.seeds or request.tasks):
        faults.append(Fault("--array", "given beside --seeds or --tasks, which make an array themselves; keep one"))
    runs: list[Run] = []
    found: list[tuple[Fault, str]] = []
    choices = tasks or [()]
    for index, task in enumerate(choices):
        shown = f" (--tasks {request.tasks[index]})" if tasks else ""
        try:
            config = config_of(request, task, seeds[0] if seeds else None)
        except ConfigError as error:
            found += [(fault, shown) for fault in error.faults]
            continue
        found += [(fault, shown) for fault in rank_faults(request, wanted, config)]
        each: Sequence[int | None] = seeds or [None]
        for seed in each:
            own = (*task, *(("--set", f"run.seed={seed}") if seed is not None else ()))
            run = config.run if seed is None else config.run.model_copy(update={"seed": seed})
            runs.append(Run(own, config.model_copy(update={"run": run})))
    for fault in dict.fromkeys(fault for fault, _ in found):
        where = [shown for other, shown in found if other == fault]
        # What is wrong whatever the task is the config's own.
        faults.append(fault if len(where) == len(choices) else Fault(fault.key, fault.message + where[0]))
    faults += same_names(request, runs)
    return runs


def check_seeds(request: Request, faults: list[Fault]) -> list[int]:
    """The seeds of the runs; none where the config's own is the only one."""
    if request.array is not None:
        try:
            elements = parse_array(request.array)
        except ValueError:
            faults.append(
                Fault(
                    "--array", f"'{request.array}' are no elements of a job array, {ARRAY_LIMIT} at most; e.g. 1-3 or 42,43,44%2"
                )
            )
            return []
        return elements
    if len(set(request.seeds)) < len(request.seeds):
        faults.append(Fault("--seeds", f"{' '.join(map(str, request.seeds))} names a seed twice"))
    # The first one is checked as part of the config.
    faults += [Fault("--seeds", f"{seed} is no seed, from 0 to 2^32 - 1") for seed in request.seeds[1:] if not 0 <= seed < 2**32]
    return list(request.seeds)


def task_layer(name: str, home: Path, faults: list[Fault]) -> tuple[str, ...]:
    """The options that make a run one of a task: its shipped layer, a file of the user's, or its name alone."""
    shipped = home / "configs" / "tasks" / f"{name}.json"
    is_file = "/" in name or name.endswith(".json")
    if not is_file and not shipped.is_file():
        return ("--set", f"task.name={name}")
    layer = name if is_file else str(shipped)
    if not is_file and shipped.is_relative_to(Path.cwd()):
        layer = str(shipped.relative_to(Path.cwd()))
    if layer.split() != [layer]:
        faults.append(Fault("--tasks", f"'{layer}': train.sbatch splits an element's options at spaces; name a path without"))
    return ("--config", layer)


def config_of(request: Request, task: Sequence[str], seed: int | None) -> Config:
    """The config of a run, as train reads it.

    Raises:
        ConfigError: with every fault.
    """
    files, sets = list(request.config), list(request.set)
    if task:
        (files if task[0] == "--config" else sets).append(task[1])
    if seed is not None:
        sets.append(f"run.seed={seed}")

    def more_faults(config: Config) -> list[Fault]:
        return [*name_faults(config), *metric_faults(config, trust_remote_code=request.trust_remote_code)]

    return load_config(files, sets, check=more_faults)


def rank_faults(request: Request, wanted: Wanted, config: Config) -> list[Fault]:
    """What a config cannot be on so many ranks."""
    if wanted.nodes < 1 or wanted.ranks < 1:
        return []
    try:
        micro_batch_size(config, wanted.nodes * wanted.ranks)
    except ConfigError as error:
        each = "" if request.ranks_per_node or wanted.gpus else ", as neither --gpus-per-node nor --ranks-per-node is given"
        ranks = f"{wanted.nodes} {plural(wanted.nodes, 'node')} × {wanted.ranks} {plural(wanted.ranks, 'rank')}{each}"
        return [Fault(fault.key, f"{fault.message} ({ranks})") for fault in error.faults]
    return []


def same_names(request: Request, runs: Sequence[Run]) -> list[Fault]:
    """Runs of one array that would write to the same folder."""
    named = [run.config.run.name for run in runs if run.config.run.name is not None]
    option = "--array" if request.array else "--seeds" if request.seeds else "--tasks"
    if len(runs) > 1 and named:
        many = f"'{named[0]}' would name all {len(runs)} runs of {option}"
        return [Fault("run.name", f"{many}; set it to null, and each is called {{task}}-{{schedule}}-{{seed}}")]
    folders = [run.folder for run in runs]
    twice = next((folder for index, folder in enumerate(folders) if folder in folders[:index]), None)
    # Elements or seeds that are given twice have a fault of their own.
    if twice is not None and len(set(request.seeds)) == len(request.seeds) and len(set(request.tasks)) == len(request.tasks):
        return [Fault(option, f"two of the runs would be '{twice}'; leave one of them out")]
    return []


def job_name(request: Request, runs: Sequence[Run]) -> str:
    """The run's name, or what the runs of an array have in common; only letters that any file system and SLURM take."""
    name = runs[0].config.run_name
    if len(runs) > 1:
        tasks = list(dict.fromkeys(run.config.task.name for run in runs))
        name = f"{tasks[0] if len(tasks) == 1 else f'{len(tasks)}-tasks'}-{runs[0].config.schedule.name}"
    return re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII)[:NAME_LETTERS]


# -- the script -------------------------------------------------------------------------------------------------------


def fill_for(request: Request, job: Job, path: Path) -> list[Line]:
    """The script of a job that is to lie at `path`."""
    template = (job.home / TEMPLATE).read_text(encoding="utf-8")
    head = [
        f"# {TEMPLATE}, filled in by progscale submit {progscale.__version__}. Again, with more options of train's if need be:",
        f"#   sbatch {shlex.quote(str(path.absolute()))}",
        "# launch/slurm/README.md tells how it works.",
    ]
    return fill(template, head, directives_of(request, job), exports_of(request, job), arguments_of(request, job, path))


def fill(
    template: str, head: Sequence[str], directives: Mapping[str, str | None], exports: Sequence[str], arguments: Sequence[str]
) -> list[Line]:
    """The template with lines of its own.

    Args:
        template: text of train.sbatch.
        head: comments behind the first line, instead of the template's.
        directives: sbatch's long options; a value of None stands for none. They replace those of the template.
        exports: lines of shell.
        arguments: of the run, each a quoted text; what sbatch gets behind the file's name comes after them.
    """
    first, *old = template.splitlines()
    old = old[next(index for index, text in enumerate(old) if text.startswith("#SBATCH")) :]
    lines = [Line(first), *(Line(text, is_new=True) for text in head)]
    left = dict(directives)
    last = max(index for index, text in enumerate(old) if text.startswith("#SBATCH"))
    for index, text in enumerate(old):
        name = text.removeprefix("#SBATCH --").partition("=")[0] if text.startswith("#SBATCH --") else None
        if name in left:
            made = directive(name, left.pop(name))
            lines.append(Line(made, is_new=made != text))
        else:
            lines.append(Line(text))
        if index == last:
            lines += [Line(directive(*item), is_new=True) for item in left.items()]
        if text == "set -euo pipefail":
            lines += [Line(text, is_new=True) for text in (*exports, " \\\n  ".join(["set --", *arguments, '"$@"']))]
    return lines


def text_of(lines: Sequence[Line]) -> str:
    """What goes into the file."""
    return "".join(line.text + "\n" for line in lines)


def directive(name: str, value: str | None) -> str:
    """A line for sbatch, which takes quotes as a shell does."""
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={shlex.quote(value)}"


def directives_of(request: Request, job: Job) -> dict[str, str | None]:
    """The options of sbatch."""
    wanted = job.wanted
    found: dict[str, str | None] = {"job-name": job.name, "nodes": str(wanted.nodes)}
    if wanted.gpus is not None:
        found["gpus-per-node"] = str(wanted.gpus)
    # Without GPUs and a number SLURM's default, one, is that of a rank.
    if wanted.cpus_per_rank is not None or wanted.ranks > 1:
        found["cpus-per-task"] = str((wanted.cpus_per_rank or 1) * wanted.ranks)
    for name in ("mem", "time", "partition", "account", "qos"):
        value = getattr(request, name)
        if value is not None:
            found[name] = value
    if job.has_lines or request.array is not None:
        found["array"] = request.array or f"1-{len(job.runs)}"
        found["output"] = "%x-%A_%a.out"
    found["signal"] = f"B:USR1@{request.signal_seconds}"
    # Paths of the config are relative to it, wherever the file is submitted from.
    found["chdir"] = os.getcwd()
    for text in request.sbatch:
        name, given, value = text.removeprefix("--").partition("=")
        found[name] = value if given else None
    return found


def exports_of(request: Request, job: Job) -> list[str]:
    """The lines by which the script finds the checkout and whatever the nodes need."""
    values = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    given: dict[str, str | int | None] = {
        "PROGSCALE_SETUP": absolute(request.setup),
        "PROGSCALE_CONTAINER": absolute(request.container),
        "PROGSCALE_APPTAINER": absolute(request.apptainer),
        "PROGSCALE_RANKS_PER_NODE": request.ranks_per_node,
        "PROGSCALE_MAX_RESTARTS": request.max_restarts,
    }
    if request.apptainer is not None:
        values["PROGSCALE_CONTAINER"] = ""  # it would win, and the job inherits this shell's
    values |= {name: str(value) for name, value in given.items() if value is not None}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in {"PROGSCALE_HOME": str(job.home), **values}.items()]
    own = Path(sys.executable).parent
    # The nodes take `accelerate` from the path: it is to be this environment's, from whichever shell the file is submitted.
    if (own / "accelerate").exists() and not {"PROGSCALE_SETUP", "PROGSCALE_CONTAINER", "PROGSCALE_APPTAINER"} & set(values):
        lines.append(f'export PATH={shlex.quote(str(own))}:"$PATH"')
    return lines


def absolute(name: str | None) -> str | None:
    """A file's absolute path; the name of an image in a registry stays as it is."""
    return os.path.abspath(name) if name is not None and os.path.exists(name) else name


def arguments_of(request: Request, job: Job, path: Path) -> list[str]:
    """The arguments of train.sbatch, an option with its value in one quoted text."""
    pairs: list[tuple[str, ...]] = []
    if job.has_lines:
        # The script reads it where it stands first.
        pairs.append(("--each", str(path.with_suffix(".txt").absolute())))
    pairs += [("--config", name) for name in request.config]
    pairs += [("--set", text) for text in request.set]
    pairs += [("--plugin", module) for module in request.plugin]
    if request.resume is not None:
        pairs.append(("--resume", request.resume))
    pairs += [("--allow-pickle",)] * request.allow_pickle + [("--trust-remote-code",)] * request.trust_remote_code
    return [shlex.join(pair) for pair in pairs]


def free_path(folder: Path, name: str) -> Path:
    """A name for the script that no file has, nor any beside it."""
    stem = f"{re.sub('[^A-Za-z0-9._+-]', '-', name)}-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while any((folder / f"{stem}{ending}").exists() for ending in (".sbatch", ".txt")):
        number += 1
        stem = f"{stem.removesuffix(f'.{number - 1}')}.{number}"
    return folder / f"{stem}.sbatch"


def write(path: Path, script: str, lines: str) -> None:
    """Writes the script, and beside it the lines of an array; never over a file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in ((path.with_suffix(".txt"), lines), (path, script)):
            if text:
                with file.open("x", encoding="utf-8", errors="surrogateescape") as out:
                    out.write(text)
    except OSError as error:
        raise UserError(f"submit: {error.filename} cannot be written ({error.strerror})") from error


# -- the cluster, and what is shown -----------------------------------------------------------------------------------


def ask_cluster(request: Request, job: Job, path: Path) -> tuple[Job, str]:
    """The job with what only the cluster decides, and when SLURM would start it.

    Raises:
        ConfigError: with all that the cluster cannot give.
        UserError: SLURM refuses it, or does not answer.
    """
    partitions = ask_partitions()
    if faults := refusals(job.wanted, partitions):
        raise ConfigError(faults)
    job = with_share(job, partitions)
    return job, try_filled(request, job, fill_for(request, job, path))


def try_filled(request: Request, job: Job, filled: Sequence[Line]) -> str:
    """When SLURM would start the script.

    Raises:
        UserError: it refuses it.
    """
    try:
        return try_script(text_of(filled), environment_for(request))
    except UserError as error:
        chosen = job.wanted.cpus_per_rank if request.cpus_per_rank is None else None
        hint = f"; --cpus-per-rank {chosen} was chosen for you, a node's share: fewer may do" if chosen else ""
        raise UserError(f"{error}{hint}") from error


def with_share(job: Job, partitions: Sequence[Partition]) -> Job:
    """The job with CPUs for the ranks, where none were asked for and GPUs were."""
    if job.wanted.cpus_per_rank is not None:
        return job
    return replace(job, wanted=replace(job.wanted, cpus_per_rank=share_of_cpus(job.wanted, partitions)))


def agreed(console: Console) -> bool:
    """Whether the person at the terminal says yes; where there is none, nobody is asked."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    try:
        return console.input("submit it? [y/N] ", markup=False).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return False


def show_changes(console: Console, filled: Sequence[Line], job: Job, path: Path) -> None:
    """What the script has and the template has not."""
    console.print(Text(f"{TEMPLATE} with", style="bold"))
    for line in filled:
        if line.is_new and not line.text.startswith("# "):
            console.print(Text("  " + line.text.replace("\n", "\n  "), style="green"))
    if job.has_lines:
        rows = job.lines.splitlines()
        console.print(Text(f"and line N of {path.with_suffix('.txt')} for element N:", style="bold"))
        for number, row in enumerate(rows[:SHOWN], start=1):
            console.print(Text(f"  {number}: {row}", style="green"))
        if len(rows) > SHOWN:
            console.print(f"  … {len(rows)} in all")


def show_job(console: Console, request: Request, number: str, job: Job, path: Path) -> None:
    """The job, its files, and the commands to look after it."""
    output = str(directives_of(request, job).get("output", "%x-%j.out"))
    for sign, value in (("%x", job.name), ("%j", number), ("%A", number), ("%a", "*")):
        output = output.replace(sign, value)
    several = len(job.runs) > 1
    logs = path.parent.parent / ("NUMBER" if several or "*" in output else number)
    folders = [run.folder for run in job.runs]
    more = f", … {len(folders)} in all" if len(folders) > SHOWN else ""
    rows = {
        "script": f"{path}    (sbatch submits it again)",
        "output": f"{output}, of each node {logs}/NODE.log" + (" (the output has the element's NUMBER)" if several else ""),
        "runs" if several else "run": ", ".join(folders[:SHOWN]) + more,
        "state": f"squeue --job {number}",
        "follow": f"tail -F {shlex.quote(output) if '*' not in output else output}",
        "save, queue again": f"scancel --signal=USR1 {number}",
        "cancel": f"scancel {number}",
    }
    console.print(Text(f"job {number} is queued", style="bold"))
    for name, text in rows.items():
        console.print(Text(f"  {name:<18} {text}"))
