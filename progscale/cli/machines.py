"""The commands `doctor` and `submit`: this machine, and a cluster's."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from typing import Any

from progscale.cli.common import (
    add_config_options,
    add_permission_options,
    command,
    quiet_libraries,
    read_config,
    show,
)
from progscale.errors import LaunchError, NetworkError, UserError
from progscale.launcher import read_ranks
from progscale.registry import import_plugin


def add_commands(commands: Any) -> None:
    """`doctor`, `submit`."""
    doctor = command(
        commands,
        "doctor",
        run_doctor,
        help="what this machine and a config will do: versions, memory, disk, ranks, network",
        description="Looks at this machine before a run is started. Exit code 2 when something would keep the run from working.",
        examples="examples:\n  progscale doctor --config configs/zero2.json\n"
        "  accelerate launch -m progscale doctor --config configs/zero2.json      as a rank of a run sees it",
    )
    add_config_options(doctor)
    doctor.add_argument("--format", choices=["table", "json"], default="table", help="output format")
    doctor.add_argument(
        "--save", metavar="FILE", help="under a launcher of several ranks: write what was measured, for progscale plan --network"
    )
    doctor.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model's repository")
    submit = command(
        commands,
        "submit",
        run_submit,
        help="fill launch/slurm/train.sbatch for a config, see that the cluster can give it, and submit it",
        description="Submits a run, or an array of runs, to SLURM; what the cluster cannot give is refused before. The filled "
        "script is kept in logs/submitted and can be submitted again by sbatch.",
        examples="examples:\n  progscale submit --config my.json --nodes 2 --gpus-per-node 8 --time 12:00:00\n"
        "  progscale submit --config configs/models/bert-base.json --tasks mrpc rte --seeds 1 2 3 --gpus-per-node 1    six runs\n"
        "  progscale submit --config my.json --nodes 2 --sbatch constraint=a100 --dry-run",
    )
    add_submit_options(submit)


def run_doctor(options: argparse.Namespace) -> int:
    """The command `doctor`: one answer for each machine, 2 when there is a problem."""
    config = read_config(options)
    try:
        several = read_ranks(os.environ).world_size > 1
    except LaunchError:  # one of the answers
        several = False
    if options.save is not None and not several:
        raise UserError(
            "--save: what is saved is measured by several ranks; start them with accelerate launch -m progscale doctor"
        )
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if not several and not speaks:
        return 0
    quiet_libraries()
    from progscale.checks import Check
    from progscale.doctor import examine, render_checks

    checks, stuck = examine(config, trust_remote_code=options.trust_remote_code) if speaks else [], False
    if several:
        from progscale.joining import measure_ranks

        try:
            checks += measure_ranks(config, options.save)
        except NetworkError as error:
            checks.append(Check("network: ranks", "problem", str(error), "mend or leave out the nodes it names"))
            stuck = True
    if speaks:
        show([check._asdict() for check in checks], lambda _: render_checks(checks), options.format)
    code = 2 if speaks and any(check.status == "problem" for check in checks) else 0
    if stuck:
        # Leaving the ordinary way would wait for what is stuck.
        sys.stdout.flush()
        os._exit(code)
    return code


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """Options of `submit`: those of train that a job has a use for, and sbatch's under its own names."""
    add_config_options(parser)
    parser.add_argument("--resume", metavar="auto|never|must|PATH", help="as for train; default: auto")
    add_permission_options(parser)
    several = parser.add_argument_group("several runs, as a job array")
    several.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="one run for each seed")
    several.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="one run for each: a name, or a JSON layer; times seeds"
    )
    several.add_argument("--array", "-a", metavar="SPEC", help="sbatch's own: each element's number is its seed, e.g. 42-44%%2")
    add_job_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the whole script and ask the cluster, submit nothing")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask before submitting")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """What a job asks of the cluster, and what is done on its nodes."""
    job = parser.add_argument_group("the job, as sbatch has it")
    job.add_argument("--nodes", "-N", type=int, default=1, metavar="N", help="default: 1")
    job.add_argument("--gpus-per-node", metavar="[TYPE:]N", help="e.g. 8 or a100:8; default: none")
    job.add_argument("--ranks-per-node", type=int, metavar="N", help="default: one for each GPU, without GPUs one")
    job.add_argument("--cpus-per-rank", type=int, metavar="N", help="default: with GPUs their share of the node's CPUs, else 1")
    job.add_argument("--mem", metavar="SIZE[K|M|G|T]", help="memory of each node; 0: all of it; default: the cluster's")
    job.add_argument(
        "--time", "-t", metavar="LIMIT", help="e.g. 12:00:00; the run goes on in the next job; default: the partition's"
    )
    job.add_argument("--partition", "-p", metavar="NAME", help="default: the cluster's")
    job.add_argument("--account", "-A", metavar="NAME", help="whom the job is charged to")
    job.add_argument("--qos", "-q", metavar="NAME", help="quality of service")
    job.add_argument("--job-name", "-J", metavar="NAME", help="default: the run's name")
    job.add_argument(
        "--signal-seconds", type=int, default=300, metavar="N", help="save so long before the time limit; default: 300"
    )
    job.add_argument("--max-restarts", type=int, metavar="N", help="how often the job is queued again; default: 20")
    job.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more of its options: constraint=a100, exclusive, …"
    )
    nodes = parser.add_argument_group("on the nodes")
    nodes.add_argument("--setup", metavar="FILE", help="shell file that each node sources: modules, an environment, variables")
    nodes.add_argument("--container", metavar="IMAGE", help="run in an image of enroot's (pyxis)")
    nodes.add_argument("--apptainer", metavar="IMAGE", help="run in an image of Apptainer's")


def run_submit(options: argparse.Namespace) -> int:
    """The command `submit`."""
    for module in options.plugin:
        import_plugin(module)
    from progscale.submit.request import Request
    from progscale.submit.submission import submit

    return submit(Request(**{field.name: getattr(options, field.name) for field in fields(Request)}))
