"""The commands `report` and `completion`: what a run shows, and what the shell knows of the commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from progscale.cli.common import command
from progscale.errors import ReportError


def add_commands(commands: Any) -> None:
    """`report`, `completion`."""
    report = command(
        commands,
        "report",
        run_report,
        help="one HTML file that shows a run: what was frozen when, curves, memory, ledger, audit",
        description="Writes report.html into the run's folder, as each run does itself at its end. The file opens offline and "
        "needs no other. A run that has not ended can be looked at too.",
        examples="examples:\n  progscale report runs/mrpc-progtuning-42\n"
        "  progscale report runs/mrpc-progtuning-42 --output mrpc.html",
    )
    report.add_argument("run_folder", metavar="RUN", help="folder of a run")
    report.add_argument("--output", metavar="FILE", help="file to write; default: report.html in the run's folder")
    completion = command(
        commands,
        "completion",
        run_completion,
        help="print what makes a shell complete progscale's commands and options",
        description="Prints a completion script for a shell.",
        examples="examples:\n  progscale completion bash > ~/.local/share/bash-completion/completions/progscale\n"
        "  progscale completion zsh > ~/.zfunc/_progscale",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="which shell")


def run_report(options: argparse.Namespace) -> int:
    """The command `report`."""
    from progscale.report import write_report

    target = None if options.output is None else Path(options.output).expanduser()
    try:
        path = write_report(Path(options.run_folder).expanduser(), target)
    except OSError as error:
        raise ReportError(f"'{error.filename}' cannot be written ({error.strerror}); choose another with --output") from error
    print(path)
    return 0


def run_completion(options: argparse.Namespace) -> int:
    """The command `completion`."""
    import shtab

    from progscale.cli import build_parser

    parser = build_parser()
    mark_files(parser, {"FILE": shtab.FILE, "RUN": shtab.DIRECTORY, "MODEL": shtab.DIRECTORY, "PATH": shtab.FILE})
    print(shtab.complete(parser, shell=options.shell))
    return 0


def mark_files(parser: argparse.ArgumentParser, kinds: dict[str, Any]) -> None:
    """Tells the completion which arguments are files, by the word that stands for their value."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                mark_files(inner, kinds)
        elif isinstance(action.metavar, str) and action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
