"""What a schedule will train, before any weight is loaded: parameters, updated volume, compute.

*Updated parameters* is the paper's measure (Progtuning, arXiv 2506.21119, section 4.1): the parameters trained in
each epoch, summed over epochs. Stages may be shorter than an epoch, so it is counted in optimizer steps here: the
elements that each step trains, summed, divided by the steps of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from progscale.blocks import Partition, partition
from progscale.cost import StateBytes, Work, work_of
from progscale.errors import ScheduleError
from progscale.methods import Method, Subject, live_parameters, make_method
from progscale.models.family import LANGUAGE_MODEL_HEADS, Family, HeadKind, ModelRequest
from progscale.models.loading import build_meta, find_family
from progscale.models.lookup import hidden_size
from progscale.schedule import EmbeddingsPolicy, Stage, build_stages

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from progscale.config import Config

NOMINAL_STEPS = 1000
"""Optimizer steps of an epoch when only shares matter, at the least."""


@dataclass(frozen=True)
class PlanStage:
    """One stage as planned.

    Attributes:
        stage: 1-based.
        start_step: first optimizer step (0-based).
        end_step: one past the last.
        epochs: length of the stage.
        live_blocks: for each stack the trained blocks.
        first_block: the lowest trained block of each stack; the number of blocks where none is trained.
        embeddings: whether a tensor of the embeddings is trained.
        trainable_parameters: elements that each of its steps trains.
        updated_parameters: trainable parameters x epochs.
        live: names of the trained parameters.
        lowest_trained: the block, counted through all stacks, down to which the gradient has to run; 0 with the embeddings, the
            number of blocks where the head alone is trained.
        work: what one of its steps computes.
    """

    stage: int
    start_step: int
    end_step: int
    epochs: Fraction
    live_blocks: Mapping[str, tuple[int, ...]]
    first_block: Mapping[str, int]
    embeddings: bool
    trainable_parameters: int
    updated_parameters: Fraction
    live: frozenset[str]
    lowest_trained: int
    work: Work

    def to_json(self) -> dict[str, Any]:
        """As plain data; `first_block` is a number when the model has one stack of blocks."""
        firsts = dict(self.first_block)
        return {
            "stage": self.stage,
            "start_step": self.start_step,
            "end_step": self.end_step,
            "epochs": _number(self.epochs),
            "first_block": next(iter(firsts.values())) if len(firsts) == 1 else firsts,
            "live_blocks": {stack: list(live) for stack, live in self.live_blocks.items()},
            "embeddings": self.embeddings,
            "trainable_parameters": self.trainable_parameters,
            "updated_parameters": _number(self.updated_parameters),
        }


@dataclass(frozen=True)
class Plan:
    """All stages of a run, and what plain fine-tuning with the same method would update.

    Attributes:
        stages: in order.
        steps_per_epoch: optimizer steps of one epoch.
        num_blocks: blocks of each stack.
        total_parameters: elements of the whole model, tied tensors once.
        baseline_trainable_parameters: elements that the method trains with every block and the embeddings live.
        block_fraction: share of the blocks' elements that the method trains (1 for full fine-tuning).
        block_parameters: elements of a block of each stack.
        baseline_work: what a step computes with every block and the embeddings live.
        sizes: elements of every parameter.
        four_bit_parameters: elements that are quantised to four bits.
        width: over which attention goes, the model's hidden size; 0 where it is not known.
        skeleton: the model on the meta device, as the method prepared it, where the plan was made by name.
        model: its name.
        method: its name.
        schedule: its name.
    """

    stages: tuple[PlanStage, ...]
    steps_per_epoch: int
    num_blocks: Mapping[str, int]
    total_parameters: int
    baseline_trainable_parameters: int
    block_fraction: Fraction
    block_parameters: Mapping[str, Fraction]
    baseline_work: Work
    sizes: Mapping[str, int]
    four_bit_parameters: int = 0
    width: int = 0
    skeleton: torch.nn.Module | None = field(default=None, repr=False, compare=False)
    model: str = ""
    method: str = ""
    schedule: str = ""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.stages[-1].end_step

    @property
    def epochs(self) -> Fraction:
        """Epochs of the run."""
        return Fraction(self.total_steps, self.steps_per_epoch)

    @property
    def updated_parameters(self) -> Fraction:
        """Updated parameters of the run."""
        return sum((stage.updated_parameters for stage in self.stages), Fraction(0))

    @property
    def baseline_updated_parameters(self) -> Fraction:
        """Updated parameters of the same method with every block and the embeddings in every step.

        The embeddings policy has no part in it: with `embeddings: never` the baseline is still plain fine-tuning of
        everything that the method trains, the embeddings included.
        """
        return self.baseline_trainable_parameters * self.epochs

    @property
    def share(self) -> float:
        """Updated parameters as a share of the baseline's."""
        return float(self.updated_parameters / self.baseline_updated_parameters)

    def to_json(self) -> dict[str, Any]:
        """As plain data: what `plan.json` holds. Numbers are integers where they are whole."""
        return {
            "model": self.model,
            "method": self.method,
            "schedule": self.schedule,
            "num_blocks": dict(self.num_blocks),
            "epochs": _number(self.epochs),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "total_parameters": self.total_parameters,
            "updated_parameters": _number(self.updated_parameters),
            "baseline_updated_parameters": _number(self.baseline_updated_parameters),
            "share": self.share,
            "compute_share": compute_share(self),
            "stages": [stage.to_json() for stage in self.stages],
        }


def make_plan(
    parts: Partition,
    stages: Sequence[Stage],
    method: Method[Any],
    steps_per_epoch: int,
    *,
    model: str = "",
    schedule: str = "",
    width: int = 0,
    checkpointing: bool = False,
) -> Plan:
    """The plan of a run.

    Args:
        parts: of the model as the method prepared it.
        stages: from `build_stages`.
        method: says which tensors are trained at most.
        steps_per_epoch: optimizer steps of one epoch, at least 1.
        model: its name, for the table and the JSON.
        schedule: its name.
        width: the model's hidden size.
        checkpointing: activations are computed again in the backward pass.

    Raises:
        ScheduleError: no optimizer step in an epoch, or a stage in which the method trains nothing.
    """
    if steps_per_epoch < 1:
        raise ScheduleError(f"steps_per_epoch: {steps_per_epoch}; at least 1 is needed")
    planned = []
    by_row, output = method.subject.head == "sequence_classification", tied_output(parts, method.subject.head)

    def work(names: Sequence[str]) -> Work:
        lowest = _lowest_trained(parts, names)
        return work_of(parts, frozenset(names), lowest, head_by_row=by_row, output=output, checkpointing=checkpointing)

    for stage in stages:
        names = live_parameters(stage, parts, method)
        count = parts.count(names)
        if not names:
            blocks = sum(map(len, stage.live_blocks.values()))
            raise ScheduleError(
                f"schedule.name: stage {stage.index} of '{schedule}' has nothing to train: method '{method.name}' trains nothing "
                f"in what is live there ({blocks} blocks{', the embeddings' * stage.embeddings} and the head of this model); "
                f"keep a block that it trains live in every stage"
            )
        epochs = Fraction(stage.steps, steps_per_epoch)
        planned.append(
            PlanStage(
                stage=stage.index,
                start_step=stage.start_step,
                end_step=stage.end_step,
                epochs=epochs,
                live_blocks=dict(stage.live_blocks),
                first_block=stage.first_block(parts.num_blocks),
                embeddings=any(parts.parameters[name].part == "embeddings" for name in names),
                trainable_parameters=count,
                updated_parameters=count * epochs,
                live=frozenset(names),
                lowest_trained=_lowest_trained(parts, names),
                work=work(names),
            )
        )
    everything = Stage(1, 0, 1, {stack: tuple(range(n)) for stack, n in parts.num_blocks.items()}, embeddings=True)
    baseline = live_parameters(everything, parts, method)
    in_blocks = parts.count(name for name in baseline if parts.parameters[name].part == "block")
    return Plan(
        stages=tuple(planned),
        steps_per_epoch=steps_per_epoch,
        num_blocks=dict(parts.num_blocks),
        total_parameters=parts.numel(),
        baseline_trainable_parameters=parts.count(baseline),
        block_fraction=Fraction(in_blocks, max(1, parts.numel("block"))),
        block_parameters={stack: _block_parameters(parts, stack) for stack in parts.num_blocks},
        baseline_work=work(baseline),
        sizes={name: info.numel for name, info in parts.parameters.items()},
        four_bit_parameters=parts.count(info.name for info in parts.parameters.values() if info.four_bit),
        width=width,
        model=model,
        method=method.name,
        schedule=schedule,
    )


def tied_output(parts: Partition, head: HeadKind) -> int:
    """Elements of a language model's output matrix, where it is the embeddings'; else 0."""
    if head not in LANGUAGE_MODEL_HEADS:
        return 0
    tied = [info for info in parts.parameters.values() if info.part == "embeddings" and len(info.shape) == 2 and info.tied]
    outside = [info for info in tied if any(not name.startswith(parts.base) or "lm_head" in name for name in info.tied)]
    return max((info.numel for info in outside), default=0)


def _block_parameters(parts: Partition, stack: str) -> Fraction:
    count = parts.num_blocks[stack]
    return Fraction(sum(parts.count(parts.block_names(stack, block)) for block in range(count)), count)


def _lowest_trained(parts: Partition, names: Sequence[str]) -> int:
    """See `PlanStage.lowest_trained`. A norm that closes a stack below another is trained with the head, above its last block."""
    first_of, total = parts.first_block, parts.total_blocks
    below = {}
    begun = 0
    for info in parts.parameters.values():
        if info.stack is not None:
            begun = max(begun, first_of[info.stack] + parts.num_blocks[info.stack])
        below[info.name] = begun
    lowest = total
    for name in names:
        info = parts.parameters[name]
        if info.part == "embeddings":
            return 0
        if info.stack is not None and info.block is not None:
            lowest = min(lowest, first_of[info.stack] + info.block)
        elif len(parts.num_blocks) > 1:
            # Before the first block stands what was made first, wherever it is used.
            lowest = min(lowest, below[name] or total)
    return lowest


def plan_for(
    model_name: str,
    *,
    schedule: str = "progtuning",
    stages: int | None = None,
    epochs: float | Fraction = 3,
    embeddings: EmbeddingsPolicy = "always",
    method: str = "full",
    method_options: Mapping[str, Any] | None = None,
    num_labels: int = 2,
    head: HeadKind = "sequence_classification",
    overrides: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    family: Family | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    steps_per_epoch: int | None = None,
    checkpointing: bool = False,
) -> Plan:
    """The plan of a model by name: on the meta device, with no data, and offline for well-known architectures.

    The steps are nominal: at least 1000 an epoch, so many that every stage begins at its exact fraction of the run.

    Args:
        model_name: well-known architecture, local folder or hub id.
        schedule: a registered schedule.
        stages: T; by default the epochs, rounded up.
        epochs: above 0, fractions allowed.
        embeddings: when the embeddings are trained.
        method: a registered method.
        method_options: its own options.
        num_labels: outputs of the classification head.
        head: which head the task needs.
        overrides: entries of the model's config to change.
        options: the schedule's own (`first_blocks`, `block_weights`, `starts`).
        family: a family or its name; None looks it up.
        revision: hub revision.
        trust_remote_code: the model may bring Python code.
        steps_per_epoch: optimizer steps of an epoch where they are known (`starts` counts in them).
        checkpointing: activations are computed again in the backward pass.

    Raises:
        ModelError: the model cannot be found or cut into parts.
        ScheduleError: epochs not above 0, or stages that do not fit.
        RegistryError: unknown schedule, method or family.
    """
    import torch

    length = Fraction(str(epochs)).limit_denominator(1000)
    if length <= 0:
        raise ScheduleError(f"train.epochs: {epochs}; more than 0 is needed")
    count = math.ceil(length) if stages is None else stages
    if count < 1:
        raise ScheduleError(f"schedule.stages: {count}; at least 1 is needed")
    steps_per_epoch = steps_per_epoch or nominal_steps_per_epoch(length, count)
    request = ModelRequest(
        model_name,
        head=head,
        num_labels=num_labels,
        overrides=overrides or {},
        random_weights=True,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    found = find_family(request, family, weights=False)
    trained = make_method(method, Subject(found, head, model_name), method_options)
    with torch.device("meta"):
        skeleton = build_meta(request, found)
        width = hidden_size(skeleton)
        model = trained.prepare(skeleton)
    parts = partition(model, found)
    check_shared_blocks(found, parts, schedule, count)
    built = build_stages(
        schedule,
        num_blocks=parts.num_blocks,
        stages=count,
        total_steps=math.ceil(length * steps_per_epoch),
        embeddings=embeddings,
        options=options,
    )
    plan = make_plan(
        parts, built, trained, steps_per_epoch, model=model_name, schedule=schedule, width=width, checkpointing=checkpointing
    )
    return replace(plan, skeleton=model)


def check_shared_blocks(family: Family, parts: Partition, schedule: str, stages: int) -> None:
    """Refuses progressive stages for a model that applies one block again and again.

    Raises:
        ScheduleError: it has one block only, and the schedule is not plain fine-tuning.
    """
    if family.shared_blocks and stages > 1 and schedule != "none" and max(parts.num_blocks.values()) == 1:
        raise ScheduleError(
            f"schedule.name: '{schedule}' with {stages} stages; all layers of this {family.name} model share one block, so "
            f"freezing one freezes all of them and progressive stages mean nothing; set schedule.name to 'none' (plain "
            f"fine-tuning; schedule.embeddings has its usual meaning), or schedule.stages to 1"
        )


def schedule_options(config: Config) -> dict[str, Any]:
    """What the schedule's own options are in a config: `schedule.options`, and the built-in schedules' keys."""
    schedule = config.schedule
    own = {key: getattr(schedule, key) for key in ("first_blocks", "starts", "block_weights")}
    return {**schedule.options, **{key: value for key, value in own.items() if value is not None}}


def nominal_steps_per_epoch(epochs: Fraction, stages: int) -> int:
    """At least 1000, such that the run has whole steps and divides into `stages` equal stages.

    >>> nominal_steps_per_epoch(Fraction(5, 2), 3)
    1002
    """
    unit = epochs.denominator * stages
    return unit * -(-NOMINAL_STEPS // unit)


def compute_share(plan: Plan, *, cache: bool = False) -> float:
    """Ideal time of the blocks as a share of the same method without stages; embeddings and head left out.

    A block costs a forward pass, as much again for the gradient of its input, and as much again for the gradient of
    its weights (in proportion to the elements that the method trains). The gradient must reach the lowest live
    block, and every block while the embeddings are trained. Blocks of several stacks count by their elements, as if all stacks
    saw equally many tokens.

    Args:
        plan: stacks are taken to follow each other, as a decoder follows its encoder.
        cache: the frozen prefix is stored: once frozen for good, a block runs forward once for each example.
    """
    sizes = [plan.block_parameters[stack] for stack, count in plan.num_blocks.items() for _ in range(count)]
    cost = Fraction(0)
    for stage in plan.stages:
        live = sum(plan.block_parameters[stack] * len(blocks) for stack, blocks in stage.live_blocks.items())
        cost += (stage.end_step - stage.start_step) * (sum(sizes[stage.lowest_trained :]) + live * plan.block_fraction)
    for i, size in enumerate(sizes):
        frozen_from = plan.total_steps
        for stage in reversed(plan.stages):
            if i >= stage.lowest_trained or not cache:
                break
            frozen_from = stage.start_step
        cost += size * (frozen_from + min(plan.total_steps - frozen_from, plan.steps_per_epoch))
    return float(cost / (plan.total_steps * sum(sizes) * (2 + plan.block_fraction)))


def render_plan(plan: Plan, state: Sequence[StateBytes] | None = None) -> RenderableType:
    """The plan as a table for the terminal.

    Args:
        plan: what to show.
        state: bytes of each stage for one more column, from `state_bytes`.
    """
    from rich.table import Table
    from rich.text import Text

    title = " ".join(filter(None, (plan.model, plan.method and f"({plan.method})", plan.schedule)))
    table = Table(title=Text(title) if title else None, caption=Text(_saving(plan)), caption_justify="left")
    numbers = ("stage", "steps", "epochs")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    stacks = list(plan.num_blocks)
    for stack in stacks:
        table.add_column(stack if len(stacks) > 1 else "blocks", no_wrap=True)
    table.add_column("embeddings", no_wrap=True)
    table.add_column("trainable M", justify="right", no_wrap=True)
    table.add_column("updated M", justify="right", no_wrap=True)
    if state is not None:
        table.add_column("state GiB a rank", justify="right", no_wrap=True)
    for position, stage in enumerate(plan.stages):
        cells = [str(stage.stage), f"{stage.start_step} to {stage.end_step - 1}", f"{float(stage.epochs):g}"]
        cells += [_picture(stage.live_blocks[stack], plan.num_blocks[stack]) for stack in stacks]
        cells += ["trained" if stage.embeddings else "frozen"]
        cells += [_millions(Fraction(stage.trainable_parameters)), _millions(stage.updated_parameters)]
        if state is not None:
            cells.append(f"{state[position].total / 2**30:.2f}")
        table.add_row(*(Text(cell) for cell in cells), end_section=position + 1 == len(plan.stages))
    total = ["total", str(plan.total_steps), f"{float(plan.epochs):g}", *("" for _ in stacks), "", ""]
    table.add_row(*total, _millions(plan.updated_parameters), *([""] if state is not None else []))
    return table


def _saving(plan: Plan) -> str:
    change = 100 * (1 - plan.share)
    word = "less" if change >= 0 else "more"
    return (
        f"{_millions(plan.updated_parameters)} M updated; without stages {_millions(plan.baseline_updated_parameters)} M "
        f"({abs(change):.1f} % {word})"
    )


def _picture(live: Sequence[int], count: int) -> str:
    """Blocks from low to high: `·` frozen, `█` trained."""
    return "".join("█" if block in set(live) else "·" for block in range(count))


def _millions(value: Fraction) -> str:
    return f"{float(value) / 1e6:.2f}"


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)
