"""What `progscale submit` was asked for, checked: the runs of a job, their configs, and what it wants of the cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import progscale
from progscale.config import Config, load_config, micro_batch_size
from progscale.errors import ConfigError, Fault, UserError
from progscale.names import metric_faults, name_faults
from progscale.slurm import ARRAY_LIMIT, Wanted, format_time, parse_array, parse_gpus, parse_memory, parse_time, plural

TEMPLATE = Path("launch", "slurm", "train.sbatch")
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
    option = "--array" if request.array else "--seeds" if request.seeds else "--tasks"
    folders = [run.folder for run in runs]
    twice = next((folder for index, folder in enumerate(folders) if folder in folders[:index]), None)
    named = [run.config.run.name for run in runs if run.folder == twice and run.config.run.name is not None]
    if named:
        many = f"'{named[0]}' would name {len(named) if len(named) < len(runs) else f'all {len(runs)}'} runs of {option}"
        return [Fault("run.name", f"{many}; set it to null, and each is called {{task}}-{{schedule}}-{{seed}}")]
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
