"""A plan on a cluster that is not there: memory, traffic and time of each stage, what fits, and where communication takes over.

The model is that of `progscale.cost.cluster`. Bytes are checked against what ranks really send (tests/contract/test_costs.py,
tests/cluster/test_traffic.py); the seconds are arithmetic over bandwidths that a data sheet or `progscale doctor --save` gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progscale.config import Config, Engine, micro_batch_size
from progscale.cost import GPUS, Cluster, StepTime, step_time
from progscale.errors import ConfigError, UserError, nearest
from progscale.estimate import StageCost, engine_name, rank_state, stage_costs, zero
from progscale.plan import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType

# Of a GPU's memory: the rest is CUDA's, and lost between tensors.
USABLE = 0.92
# DDP's own.
DDP_BUCKET = 25 * 2**20
# What DeepSpeed takes where the config does not say.
ZERO_BUCKET, MAX_LIVE = 5 * 10**8, 10**9
MOST_NODES = 4096
DEFAULT_ROWS = 8


@dataclass(frozen=True)
class StageScale:
    """What a stage costs on a cluster.

    Attributes:
        cost: without it.
        time: of a step.
        bytes: on a GPU at the peak: state, activations of a micro-batch (where they are known), gathered weights.
        fits: whether a GPU has room for them.
    """

    cost: StageCost
    time: StepTime
    bytes: int
    fits: bool


@dataclass(frozen=True)
class Scale:
    """A plan on a cluster.

    Attributes:
        cluster: which.
        config: of the run, with the batch and engine that were reckoned with.
        stages: in order.
        engines: by name, bytes on a GPU in the stage that needs most, whether they fit, and time of the first stage's step.
        sweep: by number of nodes, with the same global batch, the time of the first stage's step.
        takes_over: nodes from which on communication takes longer than computing; None where it never does.
        most_blocks: of the largest model of this width that fits; 0 where not even one block does.
        most_parameters: elements of that model.
    """

    cluster: Cluster
    config: Config
    stages: tuple[StageScale, ...]
    engines: Mapping[str, tuple[int, bool, StepTime]]
    sweep: Mapping[int, StepTime]
    takes_over: int | None
    most_blocks: int
    most_parameters: int

    def to_json(self) -> dict[str, Any]:
        """As plain data; bytes, seconds, and operations a second."""
        return {
            "cluster": asdict(self.cluster),
            "global_batch_size": self.config.train.global_batch_size,
            "stages": [
                {"stage": stage.cost.stage, "bytes": stage.bytes, "fits": stage.fits, "seconds": stage.time.to_json()}
                for stage in self.stages
            ],
            "engines": {
                name: {"bytes": size, "fits": fits, "seconds": time.to_json()}
                for name, (size, fits, time) in self.engines.items()
            },
            "by_nodes": {str(nodes): time.to_json() for nodes, time in self.sweep.items()},
            "communication_dominates_from_nodes": self.takes_over,
            "largest_model": {"blocks": self.most_blocks, "parameters": self.most_parameters},
        }


def make_cluster(
    config: Config,
    *,
    nodes: int,
    gpus: int,
    gpu: str,
    between_gbits: float,
    efficiency: float,
    latency_microseconds: float,
    network: str | None = None,
) -> Cluster:
    """The cluster that the options describe.

    Args:
        config: of the run; its precision decides how fast a GPU computes.
        nodes: how many.
        gpus: of each.
        gpu: a key of GPUS.
        between_gbits: network of a node, in 10^9 bits a second.
        efficiency: share of the data sheet's operations a second that training reaches.
        latency_microseconds: of a message between nodes.
        network: file of `progscale doctor --save`, whose measured figures take the place of the data sheet's.

    Raises:
        UserError: an option that cannot be, naming it.
    """
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus)):
        if not 1 <= value <= MOST_NODES:
            raise UserError(f"{name}: {value}; 1 to {MOST_NODES} are allowed")
    for name, number in (("--between-gbits", between_gbits), ("--efficiency", efficiency)):
        if not 0 < number < math.inf:
            raise UserError(f"{name}: {number}; more than 0 is needed")
    if efficiency > 1:
        raise UserError(f"--efficiency: {efficiency}; it is a share of the data sheet's operations, 1 at most")
    if not 0 <= latency_microseconds < math.inf:
        raise UserError(f"--latency-us: {latency_microseconds}; 0 or more is needed")
    if gpu not in GPUS:
        raise UserError(f"--gpu: '{gpu}' is not known; {', '.join(GPUS)}{nearest(gpu, GPUS)}")
    card = GPUS[gpu]
    peak = card.flops_32 if config.train.precision == "fp32" else card.flops_16
    within, between, latency = card.link, between_gbits * 1e9 / 8, latency_microseconds * 1e-6
    if network is not None:
        measured = read_network(network)
        ranks = len(measured["nodes"]) * measured["ranks_per_node"]
        if measured["links"]:
            between = min(speed for _, _, speed in measured["links"])
            # The smallest all-reduce of so many ranks.
            latency = measured["latency_seconds"] / max(1, math.ceil(math.log2(ranks)))
        if measured["within_bytes_per_second"]:
            within = measured["within_bytes_per_second"] * 2 * (measured["ranks_per_node"] - 1) / measured["ranks_per_node"]
        if (measured["flops_of"] == "fp32") == (config.train.precision == "fp32"):
            peak = min(measured["flops_per_second"])
    return Cluster(nodes, gpus, card.memory, peak * efficiency, card.memory_bandwidth, within, between, latency)


def read_network(path: str) -> dict[str, Any]:
    """What `progscale doctor --save` has written.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    keys = {"nodes", "ranks_per_node", "links", "within_bytes_per_second", "latency_seconds", "flops_per_second", "flops_of"}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--network: '{path}' cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--network: '{path}' is not JSON ({error})") from error
    if not isinstance(found, dict) or not keys <= found.keys():
        raise UserError(f"--network: '{path}' is not what progscale doctor --save writes")
    return found


def with_rows(config: Config, world_size: int) -> Config:
    """The config with a global batch that so many ranks can share, where the user left it open."""
    train = config.train
    if train.global_batch_size % world_size and "global_batch_size" not in train.model_fields_set:
        rows = (train.micro_batch_size if isinstance(train.micro_batch_size, int) else DEFAULT_ROWS) * world_size
        return config.model_copy(update={"train": train.model_copy(update={"global_batch_size": rows})})
    return config


def scale_plan(plan: Plan, config: Config, cluster: Cluster, moment_bytes: float) -> Scale:
    """A plan on a cluster.

    Args:
        plan: of the config's run.
        config: of the run.
        cluster: on which.
        moment_bytes: that the optimizer keeps for an element, without the weights.

    Raises:
        ConfigError: the ranks cannot share the global batch.
    """
    world_size = cluster.world_size
    costs = stage_costs(plan, config, world_size, moment_bytes, on_gpu=True)
    stages = tuple(_of_stage(plan, config, cluster, cost) for cost in costs)
    engines = {}
    for other in _engines(config):
        found = stage_costs(plan, other, world_size, moment_bytes, activations_too=False)
        # Activations are the same under every engine.
        sizes = [
            _bytes(plan, other.for_stage(cost.stage), cost, own.cost.activation_bytes)
            for cost, own in zip(found, stages, strict=True)
        ]
        time = _time(plan, other.for_stage(1), cluster, found[0])
        engines[engine_name(other, world_size)] = (max(sizes), max(sizes) <= USABLE * cluster.memory, time)
    sweep = _sweep(plan, config, cluster, moment_bytes)
    takes_over = next((nodes for nodes, time in sweep.items() if time.communicate > time.compute), None)
    blocks, parameters = _largest(plan, config, cluster, costs[0], moment_bytes)
    return Scale(cluster, config, stages, engines, sweep, takes_over, blocks, parameters)


def _of_stage(plan: Plan, config: Config, cluster: Cluster, cost: StageCost) -> StageScale:
    staged = config.for_stage(cost.stage)
    size = _bytes(plan, staged, cost, cost.activation_bytes)
    return StageScale(cost, _time(plan, staged, cluster, cost), size, size <= USABLE * cluster.memory)


def _bytes(plan: Plan, config: Config, cost: StageCost, activations: int | None) -> int:
    """On a GPU at the peak."""
    return cost.rank.device + (activations or 0) + _gathered_bytes(plan.total_parameters, config)


def _gathered_bytes(parameters: int, config: Config) -> int:
    """Of whole weights that ZeRO-3 holds at once at most."""
    stage, _, half = zero(config)
    if stage != 3:
        return 0
    block = (config.engine.deepspeed or {}).get("zero_optimization", {})
    most = int(block.get("stage3_max_live_parameters", MAX_LIVE))
    return (2 if half else 4) * min(parameters, most)


def _time(plan: Plan, config: Config, cluster: Cluster, cost: StageCost) -> StepTime:
    offloaded, state = zero(config)[1], cost.rank.state
    stepped, on_host = state.gradients + state.optimizer, "optimizer" in offloaded
    # Gradients go down, and as many weights come up; of offloaded weights this rank's part each time that they are gathered.
    # Those in files too: the kernel keeps in memory what there is room for, and how much that is nobody knows here.
    moved = 2 * state.gradients * on_host
    if "param" in offloaded:
        moved += (cost.traffic.all_gather + cost.traffic.gather_in_group) // cluster.world_size
    return step_time(
        cluster,
        flops=cost.flops.total,
        traffic=cost.traffic,
        bucket=_bucket_bytes(plan, config),
        state=0 if on_host else stepped,
        moved=moved,
        host_state=stepped if on_host else 0,
    )


def _bucket_bytes(plan: Plan, config: Config) -> int:
    stage, _, half = zero(config)
    if not stage:
        return DDP_BUCKET
    size = (config.engine.deepspeed or {}).get("zero_optimization", {}).get("reduce_bucket_size", ZERO_BUCKET)
    # "auto" is filled with the square of the model's width.
    return (2 if half else 4) * (max(1, plan.width**2) if size == "auto" else int(size))


def _engines(config: Config) -> list[Config]:
    """The same run under DDP and each stage of ZeRO, its own engine among them."""
    own, found = zero(config)[0], []
    for stage in range(4):
        if stage == own:
            found.append(config)
            continue
        block = {"zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"}}
        engine = Engine(name="deepspeed", deepspeed=block) if stage else Engine()
        found.append(config.model_copy(update={"engine": engine}))
    return found


def _sweep(plan: Plan, config: Config, cluster: Cluster, moment_bytes: float) -> dict[int, StepTime]:
    """Time of the first stage's step for numbers of nodes that can share the global batch."""
    rows, found = config.train.global_batch_size, {}
    counts = sorted({cluster.nodes, *(2**power for power in range(int(math.log2(MOST_NODES)) + 1))})
    for nodes in counts:
        if rows % (nodes * cluster.gpus):
            continue
        other = Cluster(**{**asdict(cluster), "nodes": nodes})
        try:
            cost = stage_costs(plan, config, other.world_size, moment_bytes, activations_too=False)[0]
        except ConfigError:  # an asked number of micro-batches that so many ranks do not have
            continue
        found[nodes] = _time(plan, config.for_stage(1), other, cost)
    return found


def _largest(plan: Plan, config: Config, cluster: Cluster, cost: StageCost, moment_bytes: float) -> tuple[int, int]:
    """(blocks, elements) of the largest model that fits: of the same width, with more or fewer blocks, all of them trained."""
    blocks = sum(plan.num_blocks.values())
    block = float(sum(plan.block_parameters[stack] * count for stack, count in plan.num_blocks.items())) / blocks
    fraction, live = float(plan.block_fraction), plan.stages[0].trainable_parameters
    staged = config.for_stage(1)

    def size(count: int) -> tuple[int, int]:
        total = plan.total_parameters + round((count - blocks) * block)
        trained = live + round((count - blocks) * block * fraction)
        quantised = round(plan.four_bit_parameters * count / blocks)
        state = rank_state(staged, total, max(0, trained), quantised, cluster.world_size, moment_bytes)
        activations = round((cost.activation_bytes or 0) * count / blocks)
        return state.device + activations + _gathered_bytes(total, staged), total

    room, low, high = USABLE * cluster.memory, 0, 1
    while size(high)[0] <= room and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle)[0] <= room else (low, middle)
    return low, size(low)[1] if low else 0


# -- for people -------------------------------------------------------------------------------------------------------


def render_scale(scale: Scale, gpu: str) -> RenderableType:
    """Tables for the terminal."""
    from rich.console import Group
    from rich.text import Text

    cluster, config = scale.cluster, scale.config
    rows, length, ranks = config.train.global_batch_size, config.train.max_length, cluster.world_size
    engine = engine_name(config, ranks)
    given = (
        f"{cluster.nodes} nodes of {cluster.gpus} {gpu}: {cluster.flops / 1e12:.3g} TFLOP/s a GPU in {config.train.precision}, "
        f"{cluster.within / 1e9:.3g} GB/s within a node, {cluster.between / 1e9:.3g} GB/s between, "
        f"{cluster.latency * 1e6:.3g} µs; {rows} rows of {length} tokens a step, {rows // ranks} a GPU, "
        f"{micro_batch_size(config, ranks)} at once; {engine}"
    )
    wall = (
        f"with {rows} rows a step communication takes longer than computing from {scale.takes_over} nodes on"
        if scale.takes_over
        else f"with {rows} rows a step computing takes longer than communication on all numbers of nodes that can share them"
    )
    largest = (
        f"the largest model of this width to fit: {scale.most_blocks} blocks, {scale.most_parameters / 1e9:.3g} billion weights"
        if scale.most_blocks
        else "no model of this width fits"
    )
    if not all(stage.fits for stage in scale.stages):
        others = [name for name, (_, fits, _) in scale.engines.items() if fits]
        largest += f"; this one does not fit under {engine}" + (f", it does under {', '.join(others)}" if others else "")
    assumed = "step s: all communication hidden behind computing that can be, and none; reckoned, not measured"
    parts = [
        Text(given),
        _stage_table(scale, rows * length),
        _engine_table(scale),
        _sweep_table(scale),
        Text(f"{wall}; {largest}"),
    ]
    return Group(*parts, Text(assumed, "dim"))


def _stage_table(scale: Scale, tokens: int) -> RenderableType:
    from rich.table import Table

    table = Table(title="By stage")
    for heading in ("stage", "GiB a GPU", "fits", "compute s", "comm. s", "update s", "step s", "M tokens/s"):
        table.add_column(heading, justify="right")
    for stage in scale.stages:
        time = stage.time
        unknown = " + activ." if stage.cost.activation_bytes is None else ""
        cells = [str(stage.cost.stage), f"{stage.bytes / 2**30:.2f}{unknown}", "yes" if stage.fits else "no"]
        cells += [f"{time.compute:.3g}", f"{time.communicate:.3g}", f"{time.update:.3g}", _span(time)]
        cells += [f"{tokens / time.longest / 1e6:.3g} – {tokens / time.shortest / 1e6:.3g}"]
        table.add_row(*cells)
    return table


def _engine_table(scale: Scale) -> RenderableType:
    from rich.table import Table

    table = Table(title="By engine, the first stage's step, memory of the stage that needs most")
    for heading in ("engine", "GiB a GPU", "fits", "step s"):
        table.add_column(heading, justify="right")
    for name, (size, fits, time) in scale.engines.items():
        table.add_row(name, f"{size / 2**30:.2f}", "yes" if fits else "no", _span(time))
    return table


def _sweep_table(scale: Scale) -> RenderableType:
    from rich.table import Table

    table = Table(title="By nodes, with the same global batch")
    for heading in ("nodes", "rows a GPU", "step s", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("█ computes ░ communicates")
    first = next(iter(scale.sweep.values()))
    for nodes, time in scale.sweep.items():
        share = round(24 * time.communicate / (time.communicate + time.compute))
        rows = scale.config.train.global_batch_size // (nodes * scale.cluster.gpus)
        speed = f"{first.longest / time.longest:.1f} – {first.shortest / time.shortest:.1f}"
        mark = " ←" if nodes == scale.cluster.nodes else ""
        table.add_row(f"{nodes}{mark}", str(rows), _span(time), speed, "█" * (24 - share) + "░" * share)
    return table


def _span(time: StepTime) -> str:
    return f"{time.shortest:.3g} – {time.longest:.3g}"
