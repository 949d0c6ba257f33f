"""What state.json holds, checked before any of it is used. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from progscale.checkpoint.manifest import STATE
from progscale.errors import RejectedError

Count = Annotated[int, Field(ge=0)]
# "nan" and "inf" are texts: JSON has no such numbers.
Number = float | Annotated[str, Field(pattern=r"^-?(nan|inf)$")]


class Part(BaseModel):
    """Base of all parts: values of another type are refused; what a newer release adds is let through."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class SavedStage(Part):
    """A finished stage: `progscale.meters.StageRecord`, which is made of it as it is."""

    model_config = ConfigDict(extra="forbid")

    stage: Annotated[int, Field(ge=1)]
    first_block: int | dict[str, int]
    embeddings_live: bool
    start_step: Count
    end_step: Count
    trainable_parameters: Count
    planned_updated_parameters: float
    updated_parameters: float
    skipped_steps: Count
    train_seconds: float
    switch_seconds: float
    audit_seconds: float
    samples_per_second: float
    tokens_per_second: float
    peak_memory_bytes: Count
    optimizer_state_bytes: Count
    frozen_changed: Count
    carried: str
    engine: str = ""
    micro_batch_size: Count = 0
    communicated_bytes: Count | None = None
    planned_flops: Count | None = None
    flops: Count | None = None
    baseline_flops: Count | None = None
    counted_share: float | None = None
    energy_joules: float | None = None
    frozen_prefix: Count = 0
    cache: dict[str, Count] | None = None
    peak_reserved_bytes: Count | None = None
    peak_resident_bytes: Count | None = None


class SavedProgress(Part):
    """What the loop had shown: `progscale.loop.Progress`."""

    step: Count
    stage: Annotated[int, Field(ge=1)]
    evaluation_due: bool
    metrics: dict[str, Number]
    best: dict[str, Number]
    best_step: Count
    stages: list[SavedStage]
    evaluation_seconds: float
    saving_seconds: float
    switch_seconds: float
    earlier_seconds: float
    skipped_in_a_row: Count
    carried: str


class SavedMeter(Part):
    """The counters of the stage at work: `progscale.meters.StageMeter`."""

    rows: Count
    tokens: Count
    skipped_steps: Count
    seconds: float
    audit_seconds: float
    volume_before: Count
    peak: dict[str, int]
    communicated_bytes: Count | None = None
    communicated_by: str | None = None
    flops: Count = 0
    baseline_flops: Count = 0
    counted_share: float | None = None
    energy_joules: float | None = None


class SavedState(Part):
    """state.json of a run.

    Attributes:
        step: optimizer steps done.
        stage: 1-based, the one at work.
        run: what a run must have in common with it to go on.
        loss_scale: of fp16; None without.
        unlogged: losses since the last record.
        metrics_bytes: of metrics.jsonl.
        parameters: elements of every parameter of the model.
        micro_batch_size: rows a rank ran at once in the stage at work.
        cache: what the cache has done in the stage at work.
    """

    step: Count
    stage: Annotated[int, Field(ge=1)]
    run: dict[str, Any]
    engine: str
    world_size: Annotated[int, Field(ge=1)]
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    versions: dict[str, str]
    loss_scale: dict[str, Any] | None
    learning_rate: float
    unlogged: list[Number]
    metrics_bytes: Count
    parameters: dict[str, Count]
    progress: SavedProgress
    meter: SavedMeter
    cache: dict[str, Count] | None = None


def check_state(path: Path, content: Mapping[str, Any]) -> SavedState:
    """The content of state.json, every value of its type.

    Raises:
        RejectedError: with the first key that is missing or wrong.
    """
    try:
        state = SavedState.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RejectedError(path, f"{STATE}: {key}: {first['msg']}") from error
    if state.progress.step != state.step or state.progress.stage != state.stage:
        raise RejectedError(path, f"{STATE} contradicts itself: two steps or two stages")
    return state
