"""The commands `train`, `merge` and `checkpoint`: a run, and what it left."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from progscale.cli.common import add_config_options, add_permission_options, command, quiet_libraries, read_config, show
from progscale.config import describe_schema, dump_config
from progscale.errors import UserError
from progscale.launcher import read_ranks
from progscale.names import method_options
from progscale.registry import import_plugin
from progscale.signals import Signals

EXAMPLES = """examples:
  progscale train                                                    the built-in demo, in one process
  progscale train --config configs/models/bert-base.json --config configs/tasks/mrpc.json --set task.path=GLUE/MRPC
  accelerate launch launch/train.py --config configs/zero2.json      the same program under DeepSpeed ZeRO-2
  progscale train --config my_run.json --resume auto                 begin, or go on where it was stopped
  progscale plan --model bert-large-uncased --epochs 3               what a schedule saves, before any weight is loaded
"""


def add_commands(commands: Any) -> None:
    """`train`, `merge`, `checkpoint`."""
    train = command(
        commands,
        "train",
        run_train,
        help="fine-tune a model (one process; under accelerate launch use launch/train.py)",
        description="Fine-tunes a model; with no model and no task named it runs the built-in demo.",
        examples=EXAMPLES,
    )
    add_train_options(train)
    merge = command(
        commands,
        "merge",
        run_merge,
        help="turn an exported adapter into a plain model that needs neither PEFT nor progscale",
        description="Merges what lora or qlora trained into the base model, and writes a plain model with its tokenizer. "
        "With qlora it is the base model as it was computed with, in full precision.",
        examples="examples:\n  progscale merge runs/mrpc-progtuning-42/model merged\n"
        "  progscale merge runs/mrpc-progtuning-42/model merged --base /models/roberta-base",
    )
    merge.add_argument("folder", metavar="MODEL", help="the folder 'model' of a run")
    merge.add_argument("target", metavar="TARGET", help="folder to write; must not exist yet, or be empty")
    merge.add_argument("--base", metavar="NAME", help="hub id or folder of the base model; default: where it lay in the run")
    merge.add_argument("--allow-pickle", action="store_true", help="load the base model's weights from pickle files too")
    merge.add_argument("--trust-remote-code", action="store_true", help="run Python code from the base model's repository")
    checkpoint = commands.add_parser(
        "checkpoint",
        help="look into saved states",
        epilog="examples:\n  progscale checkpoint verify runs/demo-progtuning-42",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_checkpoint_commands(checkpoint)


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Options of `train`."""
    add_config_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="read config and data, print the plan and stop")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|must|PATH",
        help="go on from the newest valid checkpoint of the run's folder: auto begins anew where there is none, must fails then, "
        "and both leave a run that has ended as it is; or from the checkpoint or run folder at PATH; default: never, which moves "
        "an earlier run of that name aside",
    )
    parser.add_argument("--list-options", action="store_true", help="list every config key with its default and stop")
    add_permission_options(parser)


def run_train(options: argparse.Namespace) -> int:
    """The command `train`."""
    if options.list_options:
        for module in options.plugin:
            import_plugin(module)
        for row in [*describe_schema(), *method_options()]:
            print("  ".join(str(cell) for cell in row))
        return 0
    if options.print_config:
        print(json.dumps(dump_config(read_config(options)), indent=2))
        return 0
    signals = Signals()
    # Before plug-ins and torch are imported, which takes seconds.
    with signals.listening():
        read_ranks(os.environ)
        config = read_config(options)
        if not options.dry_run:
            signals.folder = Path(config.run.output_dir) / config.run_name
        quiet_libraries()
        from progscale.inputs import Permissions
        from progscale.run import run
        from progscale.setup import prepare

        permissions = Permissions(options.allow_pickle, options.trust_remote_code)
        if options.dry_run:
            prepare(config, permissions, dry_run=True)
            return 0
        return run(config, signals, resume=options.resume, permissions=permissions)


def run_merge(options: argparse.Namespace) -> int:
    """The command `merge`."""
    quiet_libraries()
    from progscale.export import merge_exported

    merge_exported(
        options.folder,
        options.target,
        base=options.base,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
    )
    print(f"merged into {options.target}")
    return 0


def add_checkpoint_commands(parser: argparse.ArgumentParser) -> None:
    """Commands of `checkpoint`."""
    commands = parser.add_subparsers(dest="checkpoint_command", metavar="COMMAND", required=True)
    verify = command(
        commands,
        "verify",
        run_verify,
        help="hash every file of a checkpoint, and check that every parameter is whole",
        description="Reads checkpoints from end to end; exit code 0 when all are valid, else 2.",
        examples="examples:\n  progscale checkpoint verify runs/demo-progtuning-42\n"
        "  progscale checkpoint verify runs/demo-progtuning-42/checkpoints/step-00000150 --format json",
    )
    verify.add_argument("path", metavar="PATH", help="folder of a checkpoint, or of a run: then all of its checkpoints")
    verify.add_argument("--format", choices=["table", "json"], default="table", help="output format")


def run_verify(options: argparse.Namespace) -> int:
    """The command `checkpoint verify`."""
    from progscale.verify import findings_table, verify_path

    findings = verify_path(Path(options.path))
    show([finding.to_json() for finding in findings], lambda _: findings_table(findings), options.format)
    return 0 if all(finding.reason is None for finding in findings) else UserError.exit_code
