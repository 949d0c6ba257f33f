"""The command `progscale`: plan, train, submit, merge. Nothing heavy is imported before a command's own work begins."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from progscale import __version__
from progscale.config import Config, describe_schema, dump_config, load_config, micro_batch_size
from progscale.config.schema import LANGUAGE_TASKS, SQUAD_TASKS
from progscale.cost.cluster import GPUS
from progscale.errors import ConfigError, DataError, Fault, LaunchError, ModelError, NetworkError, ProgscaleError, UserError
from progscale.launcher import read_ranks
from progscale.models.family import HeadKind
from progscale.names import method_options, name_faults, with_options
from progscale.signals import Signals

if TYPE_CHECKING:
    from progscale.plan import Plan

# How long a rank that leaves the message to another one stays. The launcher ends it as soon as that one has left.
SILENT_SECONDS = 5.0
EXAMPLES = """examples:
  progscale train                                                    the built-in demo, in one process
  progscale train --config configs/models/bert-base.json --config configs/tasks/mrpc.json --set task.path=GLUE/MRPC
  accelerate launch launch/train.py --config configs/zero2.json      the same program under DeepSpeed ZeRO-2
  progscale train --config my_run.json --resume auto                 begin, or go on where it was stopped
  progscale plan --model bert-large-uncased --epochs 3               what a schedule saves, before any weight is loaded
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for a rank that is gone or files that cannot be written, 2 for a mistake in the
    input, 3 for a run stopped by its own checks, 75 for one that was told to stop and can be resumed.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except ProgscaleError as error:
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        # All ranks meet the same mistake, and one of them says it; but files may be missing on one node alone.
        is_own = isinstance(error, LaunchError) or (
            local_rank == "0" and isinstance(error, DataError | ModelError | NetworkError)
        )
        if rank == "0" or is_own:
            print(f"progscale: {'' if rank == '0' else f'[rank {rank}] '}{error}", file=sys.stderr)
        elif isinstance(error, UserError | NetworkError):
            # The launcher kills the others when the first one leaves; that should not be one that has said nothing.
            time.sleep(SILENT_SECONDS)
        if isinstance(error, NetworkError):
            # Leaving the ordinary way would wait for what is stuck.
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        # Leaving the ordinary way would wait for the other ranks in NCCL's teardown; the launcher ends them.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="progscale",
        description="Fine-tunes Transformer encoders in stages that train fewer blocks each, exactly, under DDP and ZeRO.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"progscale {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="fine-tune a model (one process; under accelerate launch use launch/train.py)",
        description="Fine-tunes a model; with no model and no task named it runs the built-in demo.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_train_options(train)
    train.set_defaults(run=run_train)
    plan = commands.add_parser(
        "plan",
        help="stages, parameters and updated volume of a schedule, before any weight is loaded",
        description="Shows what a schedule trains and saves. Works offline for well-known architectures.",
        epilog="examples:\n  progscale plan --model bert-large-uncased --epochs 3 --format json\n  progscale plan --paper\n"
        "  progscale plan --config my.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_plan_options(plan)
    plan.set_defaults(run=run_plan)
    doctor = commands.add_parser(
        "doctor",
        help="what this machine and a config will do: versions, memory, disk, ranks, network",
        description="Looks at this machine before a run is started. Exit code 2 when something would keep the run from working.",
        epilog="examples:\n  progscale doctor --config configs/zero2.json\n"
        "  accelerate launch -m progscale doctor --config configs/zero2.json      as a rank of a run sees it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_config_options(doctor)
    doctor.add_argument("--format", choices=["table", "json"], default="table", help="output format")
    doctor.add_argument(
        "--save", metavar="FILE", help="under a launcher of several ranks: write what was measured, for progscale plan --network"
    )
    doctor.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model's repository")
    doctor.set_defaults(run=run_doctor)
    submit = commands.add_parser(
        "submit",
        help="fill launch/slurm/train.sbatch for a config, see that the cluster can give it, and submit it",
        description="Submits a run, or an array of runs, to SLURM; what the cluster cannot give is refused before. The filled "
        "script is kept in logs/submitted and can be submitted again by sbatch.",
        epilog="examples:\n  progscale submit --config my.json --nodes 2 --gpus-per-node 8 --time 12:00:00\n"
        "  progscale submit --config configs/models/bert-base.json --tasks mrpc rte --seeds 1 2 3 --gpus-per-node 1    six runs\n"
        "  progscale submit --config my.json --nodes 2 --sbatch constraint=a100 --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_submit_options(submit)
    submit.set_defaults(run=run_submit)
    merge = commands.add_parser(
        "merge",
        help="turn an exported adapter into a plain model that needs neither PEFT nor progscale",
        description="Merges what lora or qlora trained into the base model, and writes a plain model with its tokenizer. "
        "With qlora it is the base model as it was computed with, in full precision.",
        epilog="examples:\n  progscale merge runs/mrpc-progtuning-42/model merged\n"
        "  progscale merge runs/mrpc-progtuning-42/model merged --base /models/roberta-base",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    merge.add_argument("folder", metavar="MODEL", help="the folder 'model' of a run")
    merge.add_argument("target", metavar="TARGET", help="folder to write; must not exist yet, or be empty")
    merge.add_argument("--base", metavar="NAME", help="hub id or folder of the base model; default: where it lay in the run")
    merge.add_argument("--allow-pickle", action="store_true", help="load the base model's weights from pickle files too")
    merge.add_argument("--trust-remote-code", action="store_true", help="run Python code from the base model's repository")
    merge.set_defaults(run=run_merge)
    checkpoint = commands.add_parser("checkpoint", help="look into saved states", allow_abbrev=False)
    add_checkpoint_commands(checkpoint)
    return parser


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
    verify = commands.add_parser(
        "verify",
        help="hash every file of a checkpoint, and check that every parameter is whole",
        description="Reads checkpoints from end to end; exit code 0 when all are valid, else 2.",
        epilog="examples:\n  progscale checkpoint verify runs/demo-progtuning-42\n"
        "  progscale checkpoint verify runs/demo-progtuning-42/checkpoints/step-00000150 --format json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verify.add_argument("path", metavar="PATH", help="folder of a checkpoint, or of a run: then all of its checkpoints")
    verify.add_argument("--format", choices=["table", "json"], default="table", help="output format")
    verify.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    """The command `checkpoint verify`."""
    from progscale.verify import findings_table, verify_path

    findings = verify_path(Path(options.path))
    show([finding.to_json() for finding in findings], lambda _: findings_table(findings), options.format)
    return 0 if all(finding.reason is None for finding in findings) else UserError.exit_code


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Options of `train`."""
    add_config_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="read config and data, print the plan and stop")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|must|PATH",
        help="go on from the newest valid checkpoint of the run's folder: auto begins anew where there is none, must fails then; "
        "or from the checkpoint or run folder at PATH; a run that has ended is left as it is; default: never",
    )
    parser.add_argument("--list-options", action="store_true", help="list every config key with its default and stop")
    add_permission_options(parser)


def add_permission_options(parser: argparse.ArgumentParser) -> None:
    """What only the command line may allow a run."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="accept model weights that are no safetensors (they can run code)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model's repository")


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """Options of `submit`: those of train that a job has a use for, and sbatch's under its own names."""
    add_config_options(parser)
    parser.add_argument("--resume", metavar="auto|never|must|PATH", help="as for train; default: auto")
    add_permission_options(parser)
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
    several = parser.add_argument_group("several runs, as a job array")
    several.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="one run for each seed")
    several.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="one run for each: a name, or a JSON layer; times seeds"
    )
    several.add_argument("--array", "-a", metavar="SPEC", help="sbatch's own: each element's number is its seed, e.g. 42-44%%2")
    nodes = parser.add_argument_group("on the nodes")
    nodes.add_argument("--setup", metavar="FILE", help="shell file that each node sources: modules, an environment, variables")
    nodes.add_argument("--container", metavar="IMAGE", help="run in an image of enroot's (pyxis)")
    nodes.add_argument("--apptainer", metavar="IMAGE", help="run in an image of Apptainer's")
    parser.add_argument("--dry-run", action="store_true", help="show the whole script and ask the cluster, submit nothing")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask before submitting")


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


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    add_config_options(parser)
    parser.add_argument("--model", metavar="NAME", help="hub id, local folder or well-known architecture (short for model.name)")
    parser.add_argument("--epochs", type=float, metavar="N", help="short for train.epochs")
    parser.add_argument("--stages", type=int, metavar="T", help="short for schedule.stages")
    parser.add_argument("--schedule", metavar="NAME", help="short for schedule.name")
    parser.add_argument("--embeddings", metavar="WHEN", help="short for schedule.embeddings: always, first_stage, never")
    parser.add_argument(
        "--head",
        choices=get_args(HeadKind),
        help="the model's head; default: that of the config's task, else sequence_classification",
    )
    parser.add_argument(
        "--num-labels", type=int, metavar="N", help="outputs of a classification head; default: the task's, else 2"
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks, for bytes of each; default: 1")
    scale = parser.add_argument_group("on a cluster", "memory, traffic and time of each stage there, reckoned from bandwidths")
    scale.add_argument("--nodes", type=int, metavar="N", help="nodes of the cluster")
    scale.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of each; default: 8")
    scale.add_argument("--gpu", default="a100-80gb", metavar="NAME", help=f"{', '.join(GPUS)}; default: a100-80gb")
    scale.add_argument(
        "--between-gbits", type=float, default=200.0, metavar="X", help="network of a node, in Gbit/s, all cards; default: 200"
    )
    scale.add_argument(
        "--efficiency",
        type=float,
        default=0.4,
        metavar="X",
        help="share of a GPU's operations that training has; default: 0.4",
    )
    scale.add_argument("--latency-us", type=float, default=20.0, metavar="X", help="of a message between nodes; default: 20")
    scale.add_argument("--network", metavar="FILE", help="measured figures instead: what progscale doctor --save wrote")
    parser.add_argument("--paper", action="store_true", help="the paper's figures beside those computed from real architectures")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="output format")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model's repository")


def read_config(options: argparse.Namespace, extra: Sequence[str] = ()) -> Config:
    """The config of the given layers, all its faults at once; plug-in modules are imported first."""
    for module in options.plugin:
        import_plugin(module)
    return with_options(load_config(options.config, [*options.set, *extra], check=name_faults))


def import_plugin(module: str) -> None:
    """Imports a user's module by name, from the working directory too."""
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"--plugin {module}: no name of a module; give it as in an import, e.g. --plugin my_encoder")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise ConfigError(f"--plugin {module}: no such module in the working directory or the environment") from error
        raise


def run_train(options: argparse.Namespace) -> int:
    """The command `train`."""
    if options.list_options:
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


def run_plan(options: argparse.Namespace) -> int:
    """The command `plan`."""
    quiet_libraries()
    if options.paper:
        from progscale.paper import paper_table, render_paper

        return show(paper_table(), render_paper, options.format)
    short = {"model.name": options.model, "train.epochs": options.epochs, "schedule.stages": options.stages}
    short |= {"schedule.name": options.schedule, "schedule.embeddings": options.embeddings}
    config = read_config(options, [f"{key}={json.dumps(value)}" for key, value in short.items() if value is not None])
    if config.model.name is None:
        raise ConfigError("plan: no model named; give --model NAME (e.g. bert-base-uncased), or --paper")
    from rich.console import Group

    from progscale.estimate import render_costs, stage_costs
    from progscale.plan import render_plan
    from progscale.setup import optimizer_of

    if options.world_size < 1:
        raise ConfigError(f"--world-size: {options.world_size} is no number of ranks, from 1")
    if options.nodes is not None:
        return run_scale(config, options)
    plan = plan_of(config, options)
    costs = stage_costs(plan, config, options.world_size, optimizer_of(config).state_bytes_per_element)
    content = {**plan.to_json(), "world_size": options.world_size, "costs": [cost.to_json() for cost in costs]}
    tables = Group(render_plan(plan), "", render_costs(plan, costs, config, options.world_size))
    return show(content, lambda _: tables, options.format)


def run_scale(config: Config, options: argparse.Namespace) -> int:
    """The command `plan` with `--nodes`."""
    from rich.console import Group

    from progscale.plan import render_plan
    from progscale.scale import make_cluster, render_scale, scale_plan, with_rows
    from progscale.setup import optimizer_of

    cluster = make_cluster(
        config,
        nodes=options.nodes,
        gpus=options.gpus_per_node,
        gpu=options.gpu,
        between_gbits=options.between_gbits,
        efficiency=options.efficiency,
        latency_microseconds=options.latency_us,
        network=options.network,
    )
    if options.world_size not in (1, cluster.world_size):
        raise ConfigError(f"--world-size: {options.world_size}, but --nodes and --gpus-per-node make {cluster.world_size}")
    config = with_rows(config, cluster.world_size)
    micro_batch_size(config, cluster.world_size)
    plan = plan_of(config, options)
    scale = scale_plan(plan, config, cluster, optimizer_of(config).state_bytes_per_element)
    content = {**plan.to_json(), "world_size": cluster.world_size, "scale": scale.to_json()}
    content["costs"] = [stage.cost.to_json() for stage in scale.stages]
    return show(content, lambda _: Group(render_plan(plan), "", render_scale(scale, options.gpu)), options.format)


def run_submit(options: argparse.Namespace) -> int:
    """The command `submit`."""
    for module in options.plugin:
        import_plugin(module)
    from progscale.submit.request import Request
    from progscale.submit.submission import submit

    return submit(Request(**{field.name: getattr(options, field.name) for field in fields(Request)}))


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


def plan_of(config: Config, options: argparse.Namespace) -> Plan:
    """The plan of a config's model and schedule, with a nominal number of steps for each epoch."""
    from progscale.plan import plan_for, schedule_options

    for key, value in (("train.max_steps", config.train.max_steps), ("schedule.starts", config.schedule.starts)):
        if value is not None:
            raise ConfigError(
                Fault(key, f"{value} counts optimizer steps, which depend on the data: progscale train --dry-run shows that plan")
            )
    if options.num_labels is not None and options.num_labels < 1:
        raise ConfigError(f"--num-labels: {options.num_labels} is no number of outputs, from 1")
    head, num_labels = head_of(config)
    return plan_for(
        str(config.model.name),
        schedule=config.schedule.name,
        stages=config.stages,
        epochs=config.train.epochs,
        embeddings=config.schedule.embeddings,
        method=config.method.name,
        method_options=config.method.options,
        num_labels=options.num_labels or num_labels,
        head=options.head or head,
        overrides=config.model.overrides,
        options=schedule_options(config),
        family=config.model.family,
        revision=config.model.revision,
        trust_remote_code=options.trust_remote_code,
        checkpointing=config.train.gradient_checkpointing,
    )


def head_of(config: Config) -> tuple[HeadKind, int]:
    """Head and outputs that the config's task gives the model, without reading its data."""
    from progscale.tasks.glue import GLUE

    task = config.task
    if task.name in SQUAD_TASKS:
        return "question_answering", 2
    if task.name in LANGUAGE_TASKS:
        return ("seq2seq_lm" if task.name == "summarization" else "causal_lm"), 2
    if task.name in GLUE:
        return "sequence_classification", len(GLUE[task.name].classes) or 1
    return "sequence_classification", 1 if task.problem_type == "regression" else len(task.labels or ()) or 2


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


if __name__ == "__main__":
    sys.exit(main())
