"""Which blocks are trained in which optimizer steps. Pure arithmetic: no torch, no model.

Stages are half-open ranges of optimizer steps. Stage t of T begins at step floor((t-1)·S/T) of S, which is the
start of an epoch when T is the number of epochs. Source: Progtuning (arXiv 2506.21119), section 3 and 5; the
even rule for the blocks is floor((t-1)·L/T), the one that reproduces the paper's tables for every L and T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, Protocol

from progscale.errors import ScheduleError
from progscale.registry import Registry

EmbeddingsPolicy = Literal["always", "first_stage", "never"]
# Options that a model with several stacks may be given for each of them.
BY_STACK = ("first_blocks", "block_weights", "blocks")


@dataclass(frozen=True)
class Stage:
    """A stretch of optimizer steps with one set of live parts.

    Attributes:
        index: 1-based.
        start_step: first optimizer step of the stage (0-based).
        end_step: one past the last.
        live_blocks: for each stack of blocks the 0-based indices that are trained, ascending.
        embeddings: whether the embeddings are trained.
    """

    index: int
    start_step: int
    end_step: int
    live_blocks: Mapping[str, tuple[int, ...]]
    embeddings: bool

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.end_step - self.start_step

    def is_live(self, stack: str, block: int) -> bool:
        """Whether block `block` of `stack` is trained in this stage."""
        return block in self.live_blocks[stack]

    def first_block(self, num_blocks: Mapping[str, int]) -> dict[str, int]:
        """The lowest live block of each stack; the number of blocks where none is live."""
        return {stack: min(live, default=num_blocks[stack]) for stack, live in self.live_blocks.items()}


@dataclass(frozen=True)
class Request:
    """What a schedule is asked for: one stack of blocks, so many stages, and the user's own options."""

    num_blocks: int
    stages: int
    options: Mapping[str, Any]


class Schedule(Protocol):
    """Gives the live blocks of every stage, for one stack of blocks. Where stages start is `schedule.starts`' to say."""

    def __call__(self, request: Request) -> Sequence[Sequence[int]]:
        """Ascending live block indices of each stage."""
        ...


SCHEDULES: Registry[Schedule] = Registry("schedule", "progscale.schedules")
register = SCHEDULES.register


def even_first_blocks(num_blocks: int, stages: int) -> list[int]:
    """First live block of each stage under the even rule.

    >>> even_first_blocks(12, 5)
    [0, 2, 4, 7, 9]
    """
    return [(t * num_blocks) // stages for t in range(stages)]


def _from(first_blocks: Sequence[int], num_blocks: int) -> list[range]:
    return [range(first, num_blocks) for first in first_blocks]


@register("progtuning")
def progtuning(request: Request) -> list[range]:
    """Shrinking stages (paper, Eq. 3)."""
    return _from(even_first_blocks(request.num_blocks, request.stages), request.num_blocks)


@register("none")
def none(request: Request) -> list[range]:
    """Every block in every stage: plain fine-tuning."""
    return _from([0] * request.stages, request.num_blocks)


@register("without_low_blocks")
def without_low_blocks(request: Request) -> list[range]:
    """The part that a progtuning stage trains lowest is left out; the last stage trains no block (paper, Eq. 4)."""
    firsts = even_first_blocks(request.num_blocks, request.stages)
    return _from([*firsts[1:], request.num_blocks], request.num_blocks)


@register("growing")
def growing(request: Request) -> list[range]:
    """The progtuning stages in reverse order (paper, Eq. 5)."""
    firsts = even_first_blocks(request.num_blocks, request.stages)
    return _from(firsts[::-1], request.num_blocks)


@register("custom")
def custom(request: Request) -> list[range]:
    """`schedule.first_blocks`: the first live block of each stage, as the user lists them."""
    firsts = request.options.get("first_blocks")
    if firsts is None:
        raise ScheduleError("schedule.first_blocks: missing; 'custom' needs one first block for each stage, e.g. [0, 4, 8]")
    if len(firsts) != request.stages:
        raise ScheduleError(f"schedule.first_blocks: {len(firsts)} entries for {request.stages} stages; give one for each stage")
    for first in firsts:
        if not 0 <= first <= request.num_blocks:
            raise ScheduleError(
                f"schedule.first_blocks: {first} is not a block; the model has {request.num_blocks} blocks, "
                f"so 0 to {request.num_blocks} are allowed ({request.num_blocks} trains the head alone)"
            )
    if min(firsts) != 0:
        raise ScheduleError(
            f"schedule.first_blocks: {list(firsts)} never trains the blocks below {min(firsts)}; one stage must start at 0"
        )
    return _from(firsts, request.num_blocks)


@register("weighted")
def weighted(request: Request) -> list[range]:
    """Shrinking stages whose parts have equal shares of `schedule.block_weights` instead of equal numbers of blocks.

    Stage t starts at the highest block below which lies at most (t-1)/T of the total weight, so equal weights give
    `progtuning` exactly.
    """
    weights = request.options.get("block_weights")
    if weights is None:
        raise ScheduleError("schedule.block_weights: missing; 'weighted' needs one positive weight for each block")
    if len(weights) != request.num_blocks:
        raise ScheduleError(
            f"schedule.block_weights: {len(weights)} weights for a model of {request.num_blocks} blocks; give one for each"
        )
    if any(not (weight > 0 and math.isfinite(weight)) for weight in weights):
        raise ScheduleError(f"schedule.block_weights: {list(weights)}; every weight must be above 0 and finite")
    # As the decimals that the user wrote: a sum that should be a whole share must not miss it by one rounding, and a
    # tolerance would drop a block of tiny weight from the first stage.
    exact = [Fraction(str(float(weight))) for weight in weights]
    total = sum(exact)
    firsts, below, block = [], Fraction(0), 0
    for t in range(request.stages):
        while below + exact[block] <= total * t / request.stages:
            below += exact[block]
            block += 1
        firsts.append(block)
    return _from(firsts, request.num_blocks)


@register("only")
def only(request: Request) -> list[list[int]]:
    """`schedule.options.blocks` alone, in every stage; none of them trains embeddings and head (the paper's figure 1)."""
    own = {key: value for key, value in request.options.items() if key not in ("first_blocks", "block_weights", "starts")}
    blocks = own.pop("blocks", None)
    if own:
        raise ScheduleError(f"schedule.options: unknown {', '.join(sorted(own))}; 'only' knows blocks")
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not all(type(block) is int for block in blocks):
        raise ScheduleError(
            f"schedule.options.blocks: {blocks!r}; 'only' needs the blocks that are trained, e.g. [3], or [] for none"
        )
    for block in blocks:
        if not 0 <= block < request.num_blocks:
            raise ScheduleError(f"schedule.options.blocks: {block} is not a block; 0 to {request.num_blocks - 1} are allowed")
    return [sorted(set(blocks)) for _ in range(request.stages)]


def build_stages(
    name: str,
    *,
    num_blocks: Mapping[str, int],
    stages: int,
    total_steps: int,
    embeddings: EmbeddingsPolicy = "always",
    options: Mapping[str, Any] | None = None,
) -> tuple[Stage, ...]:
    """The stages of a run.

    Args:
        name: a registered schedule.
        num_blocks: blocks of each stack, e.g. `{"blocks": 12}`.
        stages: T, at least 1. T above the number of blocks is allowed: some stages then equal the one before.
        total_steps: S, optimizer steps of the whole run.
        embeddings: in which stages the embeddings are trained.
        options: what the schedule needs of its own (`first_blocks`, `block_weights`, `starts`). The first two may be given by
            stack, `{"encoder": […], "decoder": […]}`; else they hold for every stack.

    Raises:
        ScheduleError: stages below 1 or above the number of steps, or options that do not fit the model.
        RegistryError: unknown schedule.
    """
    schedule = SCHEDULES.get(name)
    options = options or {}
    if stages < 1:
        raise ScheduleError(f"schedule.stages: {stages}; at least 1 is needed")
    starts = stage_starts(stages, total_steps, options.get("starts"))
    live = {}
    for stack, count in num_blocks.items():
        try:
            found = schedule(Request(count, stages, _options_of(stack, num_blocks, options)))
        except ScheduleError as error:
            raise error if len(num_blocks) == 1 else ScheduleError(f"{error} (stack '{stack}')") from None
        live[stack] = [tuple(blocks) for blocks in found]
    for stack, per_stage in live.items():
        _check(name, stack, per_stage, num_blocks[stack], stages)
    return tuple(
        Stage(
            index=t + 1,
            start_step=starts[t],
            end_step=starts[t + 1] if t + 1 < stages else total_steps,
            live_blocks={stack: per_stage[t] for stack, per_stage in live.items()},
            embeddings=embeddings == "always" or (embeddings == "first_stage" and t == 0),
        )
        for t in range(stages)
    )


def _options_of(stack: str, stacks: Iterable[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for one stack, of those that may be given by stack."""
    own = dict(options)
    for key in BY_STACK:
        value = options.get(key)
        if not isinstance(value, Mapping):
            continue
        if set(value) != set(stacks):
            raise ScheduleError(
                f"schedule.{key}: given for {', '.join(value)}; the model's stacks of blocks are {', '.join(stacks)}: "
                "give one list for each, or one list for all"
            )
        own[key] = value[stack]
    return own


def stage_starts(stages: int, total_steps: int, starts: Sequence[int] | None = None) -> list[int]:
    """First optimizer step of each stage: floor((t-1)·S/T), or the user's own list.

    Raises:
        ScheduleError: a stage would have no step.
    """
    if starts is None:
        if stages > total_steps:
            raise ScheduleError(
                f"schedule.stages: {stages} stages for a run of {total_steps} optimizer steps; at most {total_steps} "
                f"are possible (or train longer: train.epochs, train.global_batch_size)"
            )
        return [(t * total_steps) // stages for t in range(stages)]
    starts = list(starts)
    if len(starts) != stages or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ScheduleError(f"schedule.starts: {starts}; {stages} ascending optimizer steps are needed, the first of them 0")
    if starts[-1] >= total_steps:
        raise ScheduleError(f"schedule.starts: {starts[-1]} lies beyond the run's {total_steps} optimizer steps")
    return starts


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that optimizer step `step` belongs to; the last stage for the step after the last."""
    for stage in stages:
        if stage.start_step <= step < stage.end_step:
            return stage
    if step == stages[-1].end_step:
        return stages[-1]
    raise ValueError(f"step {step} is outside the run of {stages[-1].end_step} steps")


def _check(name: str, stack: str, live: Sequence[tuple[int, ...]], num_blocks: int, stages: int) -> None:
    """What every schedule must give, also somebody else's."""
    if len(live) != stages:
        raise ScheduleError(f"schedule '{name}' gave {len(live)} stages for '{stack}'; asked for {stages}")
    for blocks in live:
        if list(blocks) != sorted(set(blocks)) or any(not 0 <= block < num_blocks for block in blocks):
            raise ScheduleError(
                f"schedule '{name}' gave blocks {list(blocks)} for '{stack}'; "
                f"ascending indices from 0 to {num_blocks - 1} are allowed"
            )
