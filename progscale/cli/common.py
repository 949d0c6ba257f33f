"""What several commands have in common: their options, reading a config, printing an answer."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from progscale.config import Config, load_config
from progscale.names import name_faults, with_options
from progscale.registry import import_plugin


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, help: str, description: str, examples: str = ""
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: what `add_subparsers` gave.
        name: of the command.
        run: does its work and returns the exit code.
        help: a line for the list of commands.
        description: what it does.
        examples: command lines, each with a word about it.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Options that give a config."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="JSON layer, also a bare DeepSpeed config; it may include others; later ones win",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one config value, e.g. optimizer.lr=3e-5"
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module of yours that registers families, schedules, …",
    )


def add_permission_options(parser: argparse.ArgumentParser) -> None:
    """What only the command line may allow a run."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="accept model weights that are no safetensors (they can run code)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model's repository")


def read_config(options: argparse.Namespace, extra: Sequence[str] = ()) -> Config:
    """The config of the given layers, all its faults at once; plug-in modules are imported first."""
    for module in options.plugin:
        import_plugin(module)
    return with_options(load_config(options.config, [*options.set, *extra], check=name_faults))


def show(content: Any, render: Any, form: str) -> int:
    """Prints JSON or a table."""
    if form == "json":
        print(json.dumps(content, indent=2))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 120).print(render(content))
    return 0


def is_error(record: logging.LogRecord) -> bool:
    """A filter of loggers."""
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Keeps notices of libraries that are no news to the user out of the output; warnings of ours stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # One bar of ours shows the run; a bar for each rank and file would break into it.
    shows_bars = os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if shows_bars else "1")
    import warnings

    logging.basicConfig(level=logging.WARNING, format="progscale: %(message)s")
    # What was chosen for the user, and what is odd in the data, is said once; what is wrong with a machine, once a machine.
    first, first_here = os.environ.get("RANK", "0") == "0", os.environ.get("LOCAL_RANK", "0") == "0"
    logging.getLogger("progscale").setLevel(logging.INFO if first else logging.WARNING if first_here else logging.ERROR)
    logging.getLogger("progscale.progress").setLevel(logging.INFO)
    for name in ("accelerate", "bitsandbytes", "peft", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(is_error)  # it sets its level itself when it is imported
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|accelerate|transformers)\.")
