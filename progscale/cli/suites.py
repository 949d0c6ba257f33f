"""The commands `suite` and `contribution`: many runs, and what they come to."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progscale.cli.common import add_config_options, add_permission_options, command, quiet_libraries, read_config
from progscale.cli.machines import add_job_options
from progscale.cli.results import write_comparison, write_text
from progscale.errors import UserError
from progscale.registry import import_plugin
from progscale.signals import Signals

if TYPE_CHECKING:
    from progscale.contribution import Contribution
    from progscale.suite import Cell, State, Suite

# What is written of a comparison: for people, for a paper, for somebody's own statistics.
TABLES = {"html": "compare.html", "markdown": "compare.md", "latex": "compare.tex", "csv": "runs.csv", "json": "compare.json"}


def add_commands(commands: Any) -> None:
    """`suite`, `contribution`."""
    suite = command(
        commands,
        "suite",
        run_suite,
        help="models × tasks × methods × schedules × seeds from one file, ending in a comparison",
        description="Runs what is missing of a suite, goes on with what was cut off, and ends in a comparison. All configs are "
        "checked before the first run begins. The same command goes on after whatever stopped it.",
        examples="examples:\n  progscale suite configs/suites/small.json --set model.name=/models/MiniLM --set task.path=GLUE\n"
        "  progscale suite configs/suites/paper-table1.json --gpus 0,1,2,3      one run on each GPU\n"
        "  progscale suite configs/suites/paper-table1.json --slurm --gpus-per-node 1 --time 4:00:00      a job array\n"
        "  progscale suite my_suite.json --dry-run      what would be run",
    )
    suite.add_argument("file", metavar="FILE", help="JSON: see docs/reports.md, and configs/suites for examples")
    suite.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one config value for all runs")
    suite.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="as for train")
    add_permission_options(suite)
    suite.add_argument("--output", metavar="FOLDER", help="where runs and tables go; default: runs/suites/NAME")
    suite.add_argument("--dry-run", action="store_true", help="check all configs, show the runs and how far they are, and stop")
    suite.add_argument("--compare-only", action="store_true", help="run nothing: compare what is finished")
    here = suite.add_argument_group("on this machine")
    contribution = command(
        commands,
        "contribution",
        run_contribution,
        help="what each block contributes: the score with embeddings, head and one block trained, block by block",
        description="The paper's figure 1 for any model and task, with cheap proxies beside it (gradient norm, weight change "
        "after a few steps). Writes a table, a page and JSON, and weights for the schedule 'weighted'. The same command goes on "
        "after whatever stopped it.",
        examples="examples:\n  progscale contribution --config configs/models/bert-base.json --config configs/tasks/sst2.json\n"
        "  progscale contribution --config my_run.json --seeds 1 2 3 --gpus 0,1,2,3\n"
        "  progscale train --config my_run.json --config runs/contribution/weights.json      with the weights it found",
    )
    add_config_options(contribution)
    add_permission_options(contribution)
    contribution.add_argument(
        "--blocks", nargs="+", type=int, metavar="N", help="only these, from 0 for the lowest; default: all"
    )
    contribution.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: the config's own")
    contribution.add_argument(
        "--proxy-steps", type=int, default=20, metavar="N", help="steps that the proxies look at; 0: none; default: 20"
    )
    contribution.add_argument("--output", metavar="FOLDER", default="runs/contribution", help="default: runs/contribution")
    spread = contribution.add_argument_group("on this machine")
    for group in (here, spread):
        group.add_argument("--gpus", metavar="LIST", help="GPUs to spread runs over, e.g. 0,1,2,3; default: all that are there")
        group.add_argument("--workers", type=int, default=1, metavar="N", help="without GPUs: runs at a time; default: 1")
        group.add_argument("--processes", type=int, default=1, metavar="N", help="processes of each run; default: 1")
    slurm = suite.add_argument_group("on a cluster")
    slurm.add_argument("--slurm", action="store_true", help="queue what is missing as a job array, with the options below")
    slurm.add_argument("--yes", "-y", action="store_true", help="do not ask before submitting")
    add_job_options(suite)


def run_suite(options: argparse.Namespace) -> int:
    """The command `suite`."""
    for module in options.plugin:
        import_plugin(module)
    check_counts(options)
    from progscale.suite import read_suite, state_of

    suite = read_suite(options.file, options.set, options.output)
    todo = cells_to_do(suite)
    if options.dry_run:
        return 0
    if todo and options.slurm and not options.compare_only:
        check_for_slurm(suite, options)
        suite.write_configs()
        return submit_cells(todo, options)
    failed = {} if options.compare_only else run_here(suite, todo, options)
    try:
        compare_suite(suite, {cell.name: state_of(cell) for cell in suite.cells})
    finally:
        code = exit_code(failed)
    return code


def check_for_slurm(suite: Suite, options: argparse.Namespace) -> None:
    """Refuses what is for this machine alone, and folders that a job's options cannot name.

    Raises:
        UserError: naming the option.
    """
    for option, default in (("gpus", None), ("workers", 1), ("processes", 1)):
        if getattr(options, option) != default:
            raise UserError(f"--{option}: for runs on this machine; with --slurm give --gpus-per-node, --ranks-per-node, --nodes")
    if str(suite.folder).split() != [str(suite.folder)]:
        raise UserError(f"--output: '{suite.folder}' has a space, which a job's options cannot have; choose another")


def check_counts(options: argparse.Namespace) -> None:
    """Refuses numbers that are none."""
    for option in ("workers", "processes"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option}: {getattr(options, option)} is no number of them, from 1")


def cells_to_do(suite: Suite) -> list[Cell]:
    """Shows how far the runs are; returns those that have not ended.

    Raises:
        UserError: other runs lie in their folders.
    """
    from progscale.suite import state_of

    states = {cell.name: state_of(cell) for cell in suite.cells}
    show_states(suite, states)
    others = [cell for cell in suite.cells if states[cell.name] == "other"]
    if others:
        raise UserError(
            f"suite: {others[0].folder} holds a run of another config"
            + (f", and so do {len(others) - 1} more" if len(others) > 1 else "")
            + "; move the folder away, or choose another with --output"
        )
    return [cell for cell in suite.cells if states[cell.name] != "finished"]


def run_here(suite: Suite, cells: list[Cell], options: argparse.Namespace) -> dict[str, int]:
    """Runs cells on this machine; returns the exit codes of those that failed."""
    from progscale.suite import run_cells

    if not cells:
        return {}
    suite.write_configs()
    signals = Signals()
    signals.training = True
    with signals.listening():
        outcome = run_cells(
            suite,
            cells,
            signals=signals,
            workers=options.workers,
            gpus=gpus_of(options.gpus),
            processes=options.processes,
            extra=passed_on(options),
        )
    return outcome.failed


def exit_code(failed: dict[str, int]) -> int:
    """Of a command whose runs have failed, or not."""
    if failed:
        print(f"progscale: {len(failed)} runs failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def show_states(suite: Suite, states: dict[str, State]) -> None:
    """The runs by how far they are."""
    if suite.description:
        print(suite.description)
    counts = Counter(states.values())
    words: dict[State, str] = {
        "finished": "finished",
        "begun": "begun",
        "missing": "to run",
        "other": "of another config",
    }
    print(
        f"{suite.name}: {len(states)} runs in {suite.folder}: "
        + ", ".join(f"{counts[s]} {w}" for s, w in words.items() if counts[s])
    )
    for cell in suite.cells:
        point = ", ".join(f"{axis} {name}" for axis, name in cell.point.items())
        print(f"  {states[cell.name]:<9} {cell.name}  ({point})")


def gpus_of(text: str | None) -> list[str]:
    """Names of GPUs, as CUDA_VISIBLE_DEVICES takes them; by default all that NVIDIA's driver shows."""
    if text is not None:
        names = [name.strip() for name in text.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise UserError(f"--gpus: '{text}' is no list of GPUs; e.g. 0,1,2,3")
        return names
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    import pynvml

    try:
        pynvml.nvmlInit()
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []  # no driver: there are none


def passed_on(options: argparse.Namespace) -> list[str]:
    """What a run is told beside its config."""
    flags = [f"--{name.replace('_', '-')}" for name in ("allow_pickle", "trust_remote_code") if getattr(options, name)]
    return [*flags, *(word for module in options.plugin for word in ("--plugin", module))]


def submit_cells(cells: list[Cell], options: argparse.Namespace) -> int:
    """Queues runs as an array, each with its own config."""
    from progscale.submit.request import Request
    from progscale.submit.submission import submit

    own: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(Request) if hasattr(options, field.name)}
    own |= {"config": [], "set": [], "resume": "auto", "seeds": [], "array": None, "tasks": [str(cell.file) for cell in cells]}
    code = submit(Request(**own))
    words = [word for text in options.set for word in ("--set", text)] + passed_on(options)
    words += [] if options.output is None else ["--output", options.output]
    again = shlex.join(["progscale", "suite", options.file, *words])
    print(f"when the runs are done: {again} --compare-only")
    return code


def compare_suite(suite: Suite, states: dict[str, State]) -> None:
    """Shows and writes the comparison of what is finished."""
    from progscale.report import compare, read_run

    runs = [read_run(cell.folder) for cell in suite.cells if states[cell.name] == "finished"]
    missing = [name for name, state in states.items() if state != "finished"]
    if missing:
        print(f"not finished, and left out of the comparison: {', '.join(missing)}", file=sys.stderr)
    if len(runs) < 2:
        print("nothing to compare: fewer than two runs are finished")
        return
    wanted = suite.compare
    comparison = compare(
        runs, which=wanted.score, reference=wanted.reference, metric=wanted.metric, labels=labels_of(suite), strict=False
    )
    for form, name in TABLES.items():
        write_comparison(comparison, form, Path(suite.folder) / name)
    write_comparison(comparison, "text", None)


def labels_of(suite: Suite) -> dict[Path, tuple[str, str]]:
    """Model and task by the run's folder, where they are axes of the suite: two tables of one's own are two tasks."""
    return {cell.folder: (cell.point.get("models", ""), cell.point.get("tasks", "")) for cell in suite.cells}


def run_contribution(options: argparse.Namespace) -> int:
    """The command `contribution`."""
    check_counts(options)
    if options.proxy_steps < 0:
        raise UserError(f"--proxy-steps: {options.proxy_steps} is no number of steps, from 0")
    config = read_config(options)
    seeds = options.seeds or [config.run.seed]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: {' '.join(map(str, seeds))} names a seed twice")
    quiet_libraries()
    from progscale.contribution import cells_for, contribution_of, targets_of
    from progscale.contribution.proxies import proxies_of
    from progscale.inputs import Permissions
    from progscale.plan import Plan
    from progscale.report import read_run
    from progscale.setup import prepare

    permissions = Permissions(options.allow_pickle, options.trust_remote_code)
    folder = Path(options.output)
    # Data, model and method are looked at before the first of many runs.
    plan = prepare(
        cells_for(config, targets_of({"blocks": 0}), [seeds[0]], {"blocks": 0}, folder).cells[-1].config,
        permissions,
        dry_run=True,
    )
    assert isinstance(plan, Plan)
    targets = targets_of(plan.num_blocks, options.blocks)
    suite = cells_for(config, targets, seeds, plan.num_blocks, folder)
    todo = cells_to_do(suite)
    places = gpus_of(options.gpus)
    proxies = proxies_of(config, options.proxy_steps, folder, passed_on(options), places[:1]) if options.proxy_steps else None
    failed = run_here(suite, todo, options)
    if failed:
        return exit_code(failed)
    runs = {
        target.name: [read_run(cell.folder) for cell in suite.cells if cell.point["target"] == target.name] for target in targets
    }
    found = contribution_of(runs, targets, plan.num_blocks, proxies)
    length = f"{config.train.epochs:g} epochs, seeds {', '.join(map(str, seeds))}"
    about = f"{plan.model} on {config.task.name}, method {plan.method}, {length}."
    write_contribution(found, f"What each block contributes: {config.task.name}", about, folder)
    return 0


def write_contribution(found: Contribution, title: str, about: str, folder: Path) -> None:
    """Shows the table, and writes page, JSON and the layer with the weights."""
    from rich.console import Console

    from progscale.contribution import contribution_table, render_contribution
    from progscale.contribution.cells import to_layer

    Console(width=None if sys.stdout.isatty() else 120).print(contribution_table(found))
    for name, value in found.to_json()["rank_correlation"].items():
        if value is not None:
            print(f"rank correlation of the {name.replace('_', ' ')} with what a block adds: {value:+.2f}")
    written = {
        "contribution.json": json.dumps(found.to_json(), indent=2),
        "contribution.html": render_contribution(found, title, about),
    }
    weights = found.weights
    if weights is not None:
        written["weights.json"] = to_layer(weights)
        print(f"block weights: {json.dumps(weights)}")
    elif len(found.blocks) == sum(found.num_blocks.values()):
        print("no block adds anything to embeddings and head alone: there are no weights to give")
    for name, content in written.items():
        write_text(folder / name, content)
        print(folder / name)
