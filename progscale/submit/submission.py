"""A job shown, SLURM asked whether it can have it, and queued."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from progscale.errors import ConfigError, Fault, UserError
from progscale.slurm import (
    Partition,
    ask_partitions,
    clean_environment,
    missing_command,
    refusals,
    share_of_cpus,
    submit_script,
    try_script,
)
from progscale.submit.request import TEMPLATE, Job, Request, check
from progscale.submit.script import Line, directives_of, fill_for, free_path, text_of, write

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
SHOWN = 6


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
