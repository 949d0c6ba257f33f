"""The commands `report`, `compare`, `export` and `completion`: what a run shows, and what the shell knows of the commands."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progscale.cli.common import command, show
from progscale.errors import ReportError, UserError

if TYPE_CHECKING:
    from progscale.report import Comparison


def add_commands(commands: Any) -> None:
    """`report`, `compare`, `export`, `completion`."""
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
    compare = command(
        commands,
        "compare",
        run_compare,
        help="runs side by side: mean, standard deviation, paired test, cost",
        description="Sets finished runs side by side, by task and by what differs between them; runs that differ by the seed "
        "alone are averaged. What cannot be compared is refused, with the reason.",
        examples="examples:\n  progscale compare runs/mrpc-none-42 runs/mrpc-progtuning-42\n"
        "  progscale compare runs --format html --output compare.html      all runs below a folder, as a page\n"
        "  progscale compare runs --format latex > table.tex",
    )
    compare.add_argument("run_folders", metavar="RUN", nargs="+", help="folders of runs, or folders that hold such")
    add_comparison_options(compare)
    export = command(
        commands,
        "export",
        run_export,
        help="a run's model or adapter with a model card, and on request to the hub",
        description="Writes the model of a finished run, as from_pretrained loads it, with a model card (task, scores, stages, "
        "ledger, cost, config, command) and its report. Nothing goes to the hub unless you say so.",
        examples="examples:\n  progscale export runs/mrpc-progtuning-42 mrpc-bert\n"
        "  progscale export runs/mrpc-progtuning-42 mrpc-bert --push-to-hub me/mrpc-bert --private",
    )
    export.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    export.add_argument("target", metavar="TARGET", help="folder to write; must not exist yet, or be empty")
    export.add_argument("--push-to-hub", metavar="REPOSITORY", help="upload it there: NAME or OWNER/NAME")
    export.add_argument("--private", action="store_true", help="with --push-to-hub: a new repository is private")
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


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """How runs are set side by side, and what comes of it."""
    parser.add_argument(
        "--format", choices=["text", "markdown", "csv", "latex", "json", "html"], default="text", help="default: text"
    )
    parser.add_argument("--output", metavar="FILE", help="file to write; default: the terminal, for html compare.html")
    parser.add_argument("--score", choices=["last", "best"], default="last", help="of the last step, or the best evaluation")
    parser.add_argument("--metric", metavar="NAME", help="default: the one that decides in these runs")
    parser.add_argument(
        "--reference", metavar="NAME", help="arm that others are measured against; default: the method's own without stages"
    )


def run_compare(options: argparse.Namespace) -> int:
    """The command `compare`."""
    from progscale.report import compare, find_runs, read_run

    found, unfinished = find_runs(options.run_folders)
    if unfinished:
        print(f"left out, not finished: {', '.join(map(str, unfinished))}", file=sys.stderr)
    runs = [read_run(path) for path in found]
    comparison = compare(runs, which=options.score, reference=options.reference, metric=options.metric)
    write_comparison(comparison, options.format, None if options.output is None else Path(options.output).expanduser())
    return 0


def run_export(options: argparse.Namespace) -> int:
    """The command `export`."""
    from progscale.publish import export_run, push

    if options.private and options.push_to_hub is None:
        raise UserError("--private: given without --push-to-hub")
    target = export_run(options.run_folder, options.target)
    print(target)
    if options.push_to_hub is not None:
        print(push(target, options.push_to_hub, private=options.private))
    return 0


def write_comparison(comparison: Comparison, form: str, target: Path | None) -> None:
    """To a file, or the terminal.

    Raises:
        ReportError: the file cannot be written.
    """
    from progscale.report import render_comparison
    from progscale.report.tables import FORMATS, as_text

    if form == "text" and target is None:
        show(None, lambda _: as_text(comparison), "table")
        return
    if form == "text":
        from rich.console import Console

        console = Console(width=240, record=True, file=io.StringIO())
        console.print(as_text(comparison))
        content = console.export_text()
    else:
        content = render_comparison(comparison) if form == "html" else FORMATS[form](comparison)
    if target is None and form != "html":
        print(content)
        return
    target = target or Path("compare.html")
    write_text(target, content)
    print(target)


def write_text(target: Path, content: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        ReportError: it cannot be written.
    """
    from progscale.report.run_page import write_page

    try:
        write_page(target, content)
    except OSError as error:
        raise ReportError(f"'{target}' cannot be written ({error.strerror}); choose another with --output") from error


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
