"""What each stage of a plan costs on given ranks: operations, bytes of state and between ranks, time beside plain fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from progscale.config import Config, micro_batch_size
from progscale.config.deepspeed import check_groups, nvme_folder, second_copies
from progscale.cost import Flops, StateBytes, Traffic, state_bytes
from progscale.plan import Plan, PlanStage, compute_share

if TYPE_CHECKING:
    from rich.console import RenderableType

# What DeepSpeed keeps whole on every rank under ZeRO-3 where the config does not say.
PERSISTENCE_THRESHOLD = 100_000
# Elements between two uses of a parameter over which it keeps it.
REUSE_DISTANCE = 10**9


@dataclass(frozen=True)
class RankState:
    """Bytes of a model's state on one rank, which of them offload keeps in the CPU's memory, and which in files."""

    state: StateBytes
    host: int
    disk: int = 0

    @property
    def device(self) -> int:
        """Where the rank computes."""
        return self.state.total - self.host - self.disk


@dataclass(frozen=True)
class StageCost:
    """What a stage costs.

    Attributes:
        stage: 1-based.
        flops: of an optimizer step over all ranks, every row as long as the longest.
        rank: bytes of state on a rank.
        activation_bytes: that one micro-batch keeps for its backward pass; None where that is not known.
        traffic: bytes that a rank hands to collectives in a step.
        time_share: predicted time of a step as a share of plain fine-tuning's, by `flops`.
    """

    stage: int
    flops: Flops
    rank: RankState
    activation_bytes: int | None
    traffic: Traffic
    time_share: float

    @property
    def communicated_bytes(self) -> int:
        """That a rank hands to collectives in a step, of all kinds."""
        return self.traffic.total

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        state = self.rank.state
        return {
            "stage": self.stage,
            "flops": self.flops.to_json(),
            "weight_bytes": state.weights,
            "gradient_bytes": state.gradients,
            "optimizer_bytes": state.optimizer,
            "host_bytes": self.rank.host,
            "disk_bytes": self.rank.disk,
            "activation_bytes": self.activation_bytes,
            "communicated_bytes": self.communicated_bytes,
            "time_share": self.time_share,
        }


def zero(config: Config) -> tuple[int, set[str], bool]:
    """The ZeRO stage, 0 without DeepSpeed; what is offloaded ("param", "optimizer"); whether parameters have 16 bits."""
    block = (config.engine.deepspeed or {}).get("zero_optimization", {})
    offloaded = {what for what in ("param", "optimizer") if (block.get(f"offload_{what}") or {}).get("device", "none") != "none"}
    stage = int(block.get("stage", 0))
    return stage, offloaded, stage > 0 and config.train.precision in ("bf16_params", "fp16")


def rank_state(config: Config, total: int, live: int, four_bit: int, world_size: int, moment_bytes: float) -> RankState:
    """Bytes of weights, gradients and the optimizer's state on one rank.

    With AdamW a live parameter costs 4 + 4 + 8 bytes, a frozen one 4, a quantised one half a byte. Under DeepSpeed `bf16_params`
    and `fp16` cost 2 + 2 + 12 (with fp32 accumulation 2 + 4 + 12; a frozen one 2), and fp32 weights are kept twice (4 + 4 + 12).
    ZeRO 1 divides the last number by the ranks, 2 the gradients too, 3 the weights too. With parameters on NVMe what is frozen
    lies in files. Second copies of the weights come on top, shared by the ranks of a group; those of what is live lie there from
    the first backward pass to the step.

    Args:
        config: of the run.
        total: elements of the model.
        live: elements that are trained.
        four_bit: elements that are quantised.
        world_size: ranks.
        moment_bytes: that the optimizer keeps for an element, without the weights.
    """
    stage, offloaded, half = zero(config)
    precision: Literal["bf16", "fp32"] = "bf16" if half else "fp32"
    plain = state_bytes(
        total, live, precision=precision, zero_stage=stage, world_size=world_size, moment_bytes=moment_bytes, four_bit=four_bit
    )
    # Under ZeRO-3 too: DeepSpeed would spare them, but asks whether a torch.device equals a text, which it never does (0.19.8).
    masters = 4 * -(-live // world_size) if stage and not half else 0
    types = (config.engine.deepspeed or {}).get("data_types") or {}
    gradients = plain.gradients * (2 if half and str(types.get("grad_accum_dtype")) in ("fp32", "float32") else 1)
    group = second_copies((config.engine.deepspeed or {}).get("zero_optimization", {}))
    second = (2 if half else 4) * -(-(total - four_bit) // group) if stage == 3 and group > 1 else 0
    state = StateBytes(plain.weights + second, gradients, plain.optimizer + masters)
    host = state.weights * ("param" in offloaded) + (gradients + state.optimizer) * ("optimizer" in offloaded)
    frozen = partition_bytes(config, max(0, total - live - four_bit), world_size)
    disk = min(frozen, plain.weights) if nvme_folder(config.engine.deepspeed) is not None else 0
    return RankState(state, host - disk, disk)


def partition_bytes(config: Config, total: int, world_size: int) -> int:
    """Bytes of one rank's partition of `total` elements under ZeRO-3: what it writes to files at most."""
    return (2 if zero(config)[2] else 4) * -(-total // world_size)


def traffic_of(
    config: Config,
    *,
    live: int,
    gathered: int,
    again: int,
    whole: int,
    world_size: int,
    micro_batches: int,
    gathered_live: int = 0,
) -> Traffic:
    """Bytes that a rank hands to collectives in a step: gradients of what is live, and weights that others hold.

    Args:
        config: of the run.
        live: elements that are trained.
        gathered: elements that ZeRO-3 gathers for each micro-batch.
        again: of these, elements that it lets go after the forward pass, and gathers once more for the backward pass.
        whole: elements that it keeps whole on every rank, and gathers after each step, frozen ones too.
        world_size: ranks.
        micro_batches: of a rank in a step.
        gathered_live: elements of `gathered` that are trained: from all ranks once after each step, where second copies in a
            group of ranks serve for all else. (In the first step of a stage what is frozen comes from all ranks too.)
    """
    if world_size == 1:
        return Traffic()
    stage, _, half = zero(config)
    width = 2 if half else 4
    if stage == 0:
        return Traffic(all_reduce=4 * live)
    # ZeRO 1 reduces what has been summed up; with partitioned gradients each micro-batch's are reduced at once. ZeRO 2 could
    # scatter them; DeepSpeed reduces them everywhere and keeps its part (0.19.8, `use_multi_rank_bucket_allreduce`).
    reduced = width * live * (1 if stage == 1 else micro_batches)
    if stage == 3:
        every, group = (gathered + again) * micro_batches, second_copies((config.engine.deepspeed or {})["zero_optimization"])
        if group > 1:
            near, far = width * (every - gathered_live), width * (gathered_live + whole)
            return Traffic(reduce_scatter=reduced, all_gather=far, gather_in_group=near, group=group)
        return Traffic(reduce_scatter=reduced, all_gather=width * (every + whole))
    return Traffic(all_reduce=reduced, all_gather=width * live)


def stage_costs(
    plan: Plan,
    config: Config,
    world_size: int,
    moment_bytes: float,
    *,
    on_gpu: bool | None = None,
    activations_too: bool = True,
) -> tuple[StageCost, ...]:
    """What each stage of a plan costs.

    Args:
        plan: of the config's run.
        config: of the run: its batch, precision and engine.
        world_size: ranks.
        moment_bytes: that the optimizer keeps for an element, without the weights.
        on_gpu: activations are those of a GPU; None asks whether this machine has one.
        activations_too: count them, which takes seconds for a large model.

    Raises:
        ConfigError: the ranks cannot share the global batch, or be cut into groups for second copies of the parameters.
    """
    check_groups(config.engine.deepspeed, world_size)
    rows, length = config.train.global_batch_size, config.train.max_length
    micro = micro_batch_size(config, world_size)
    micro_batches = -(-rows // (world_size * micro))
    everything = plan.baseline_work.flops(length, plan.width)
    block = (config.engine.deepspeed or {}).get("zero_optimization", {})
    threshold = block.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
    threshold = 10 * plan.width if threshold == "auto" else int(threshold)
    gathered = sum(size for size in plan.sizes.values() if size > threshold)
    distance = int(block.get("stage3_max_reuse_distance", REUSE_DISTANCE))
    costs = []
    for stage in plan.stages:
        flops = stage.work.flops(length, plan.width)
        staged = config.for_stage(stage.stage)
        costs.append(
            StageCost(
                stage.stage,
                flops.times(rows),
                rank_state(
                    staged, plan.total_parameters, stage.trainable_parameters, plan.four_bit_parameters, world_size, moment_bytes
                ),
                activations(plan, stage, config, rows=micro, on_gpu=on_gpu) if activations_too else None,
                traffic_of(
                    staged,
                    live=stage.trainable_parameters,
                    gathered=gathered,
                    again=gathered_again(plan, stage, threshold, distance),
                    gathered_live=sum(plan.sizes[name] for name in stage.live if plan.sizes[name] > threshold),
                    whole=sum(plan.sizes.values()) - gathered,
                    world_size=world_size,
                    micro_batches=micro_batches,
                ),
                flops.total / everything.total,
            )
        )
    return tuple(costs)


def gathered_again(plan: Plan, stage: PlanStage, threshold: int, distance: int) -> int:
    """Elements that ZeRO-3 gathers for the backward pass too: their next use lies too far behind the forward pass.

    Args:
        plan: whose parameters come in the order in which they are used.
        stage: down to whose lowest trained parameter the backward pass goes.
        threshold: parameters of so many elements at most are never let go.
        distance: elements that may be used in between (`stage3_max_reuse_distance`).
    """
    found = after = 0
    # Backwards: what comes after a parameter is used twice before it is used again.
    names = list(plan.sizes)
    first = min(names.index(name) for name in stage.live)
    for name in reversed(names[first:]):
        size = plan.sizes[name]
        if size > threshold and 2 * after > distance:
            found += size
        after += size
    return found


def activations(plan: Plan, stage: PlanStage, config: Config, *, rows: int, on_gpu: bool | None) -> int | None:
    """Bytes that a micro-batch of `rows` rows of the longest kind keeps for its backward pass; None where that is not known."""
    train = config.train
    # What is computed again is kept a block at a time, where no hook sees it; what a compiler keeps it decides itself.
    if plan.skeleton is None or train.gradient_checkpointing or train.compile == "inductor":
        return None
    if train.max_tokens_per_micro_batch is not None:
        rows = min(rows, max(1, train.max_tokens_per_micro_batch // train.max_length))
    import torch

    from progscale.cost.activations import activation_bytes

    return activation_bytes(
        plan.skeleton,
        stage.live,
        rows=rows,
        length=train.max_length,
        target_length=config.task.max_target_length,
        precision="bf16_params" if zero(config)[2] else train.precision,
        attention=config.model.attention,
        on_gpu=torch.cuda.is_available() if on_gpu is None else on_gpu,
    )


def time_share(plan: Plan, length: int, *, cache: bool = False) -> float:
    """Predicted time of a run as a share of the same method without stages, by floating-point operations.

    Args:
        plan: of the run.
        length: tokens of a row.
        cache: what frozen blocks give is computed once for each row.
    """
    steps = {stage.stage: stage.end_step - stage.start_step for stage in plan.stages}
    ours = sum(steps[stage.stage] * stage.work.flops(length, plan.width).total for stage in plan.stages)
    share = ours / (plan.total_steps * plan.baseline_work.flops(length, plan.width).total)
    return share * compute_share(plan, cache=True) / compute_share(plan) if cache else share


def render_costs(plan: Plan, costs: Sequence[StageCost], config: Config, world_size: int) -> RenderableType:
    """The costs as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    train = config.train
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    engine = ", ".join(dict.fromkeys(engine_name(config.for_stage(cost.stage), world_size) for cost in costs))
    title = f"A step of {train.global_batch_size} rows of {train.max_length} tokens, {ranks} ({engine}), {train.precision}"
    table = Table(title=Text(title), caption=Text(_prediction(plan, config)), caption_justify="left")
    headings = ("stage", "forward TFLOP", "act. grad TFLOP", "weight grad TFLOP", "time / none")
    for heading in (*headings, "weights GiB", "gradients GiB", "optim. GiB", "activ. GiB", "comm. MB"):
        table.add_column(heading, justify="right")
    for cost in costs:
        flops, state = cost.flops, cost.rank.state
        cells = [str(cost.stage)]
        cells += [f"{value / 1e12:.3g}" for value in (flops.forward, flops.activation_gradient, flops.weight_gradient)]
        cells += [f"{cost.time_share:.2f}"]
        cells += [f"{value / 2**30:.2f}" for value in (state.weights, state.gradients, state.optimizer)]
        cells += ["–" if cost.activation_bytes is None else f"{cost.activation_bytes / 2**30:.2f}"]
        cells += [f"{cost.communicated_bytes / 1e6:.1f}"]
        table.add_row(*cells)
    return table


def engine_name(config: Config, world_size: int) -> str:
    """As people call it."""
    stage, offloaded, _ = zero(config)
    return f"ZeRO-{stage}{' with offload' if offloaded else ''}" if stage else "DDP" if world_size > 1 else "one process"


def _prediction(plan: Plan, config: Config) -> str:
    length = config.train.max_length
    text = f"predicted time of the run beside plain fine-tuning: {time_share(plan, length):.2f}"
    if config.cache.storage != "off":
        text += f", with the cache {time_share(plan, length, cache=True):.2f}"
    return text + " (by operations); activations are those of a micro-batch of the longest rows at the end of its forward pass"
