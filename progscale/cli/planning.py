"""The command `plan`: what a schedule trains and saves, before any weight is loaded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, get_args

from progscale.cli.common import add_config_options, command, quiet_libraries, read_config, show
from progscale.config import Config, micro_batch_size
from progscale.config.schema import LANGUAGE_TASKS, SQUAD_TASKS
from progscale.cost.cluster import GPUS
from progscale.errors import ConfigError, Fault
from progscale.models.family import HeadKind

if TYPE_CHECKING:
    from progscale.plan import Plan


def add_commands(commands: Any) -> None:
    """`plan`."""
    plan = command(
        commands,
        "plan",
        run_plan,
        help="stages, parameters and updated volume of a schedule, before any weight is loaded",
        description="Shows what a schedule trains and saves. Works offline for well-known architectures.",
        examples="examples:\n  progscale plan --model bert-large-uncased --epochs 3 --format json\n  progscale plan --paper\n"
        "  progscale plan --config my.json",
    )
    add_plan_options(plan)


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
