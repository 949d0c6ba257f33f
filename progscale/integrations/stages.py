"""The stages of somebody else's loop: what is built, when to switch, what each stage did."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from progscale.blocks import Partition, partition
from progscale.engine.adopted import AdoptedDeepSpeedEngine, AdoptedLocalEngine, adopt
from progscale.engine.base import EngineSettings, Switch
from progscale.errors import ScheduleError
from progscale.meters import Audit
from progscale.models.lookup import family_of
from progscale.optim import StageBuild, build_for
from progscale.plan import check_shared_blocks
from progscale.schedule import EmbeddingsPolicy, build_stages, stage_at


@dataclass(frozen=True)
class AsGiven:
    """What requires a gradient when the stages are made: a PEFT method may have chosen it."""

    names: frozenset[str]

    def tensors(self, partition: Partition) -> frozenset[str]:
        """Their names."""
        return self.names


@dataclass(frozen=True)
class StageOutcome:
    """What a stage of somebody else's loop did.

    Attributes:
        stage: 1-based.
        start_step: first optimizer step that was taken.
        end_step: one past the last.
        first_block: lowest live block of each stack.
        embeddings: whether the embeddings were trained.
        trainable_parameters: elements of the live tensors.
        planned_updates: live elements times the steps that were taken.
        measured_updates: the same, from the optimizer's own step counters.
        frozen_changed: frozen tensors whose bits changed; anything but 0 would have ended the run.
        switch_seconds: building the stage and moving the state.
        carried: how the optimizer's state came to it.
    """

    stage: int
    start_step: int
    end_step: int
    first_block: Mapping[str, int]
    embeddings: bool
    trainable_parameters: int
    planned_updates: int
    measured_updates: int
    frozen_changed: int
    switch_seconds: float
    carried: str

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def after(self, earlier: StageOutcome | None) -> StageOutcome:
        """Of the whole stage, where a part of it was done before a resume."""
        if earlier is None or earlier.end_step != self.start_step:
            return self
        return replace(
            self,
            start_step=earlier.start_step,
            planned_updates=self.planned_updates + earlier.planned_updates,
            measured_updates=self.measured_updates + earlier.measured_updates,
            switch_seconds=earlier.switch_seconds,
            carried=earlier.carried,
        )


class Following:
    """Stands for the model or the optimizer of the stage at work: whatever is asked of it is asked of that one.

    A loop keeps its variables over a switch; kept in them, an old stage's engine would stay in memory while the next is built.
    """

    def __init__(self, current: Any = None) -> None:
        self.current = current

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        return self.current(*args, **kwargs)


class Stages:
    """Stages over a model that somebody else trains.

    Args:
        module: the model itself, with what is to be trained requiring a gradient.
        total_steps: optimizer steps of the whole run.
        stages: their number.
        schedule: registered name.
        embeddings: when they are trained.
        family: registered name of the model's family; None finds it by the model's type.
        options: of the schedule.
        settings: the optimizer's, and the precision of DeepSpeed.
        weight_decay: of tensors that are decayed.
        decayed: their names; None for those of two or more dimensions.

    Attributes:
        builds: of all stages.
        outcomes: of the stages that are over.

    Raises:
        ModelError: the model has no family, or cannot be cut into parts.
        ScheduleError: the stages do not fit.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        total_steps: int,
        stages: int,
        schedule: str = "progtuning",
        embeddings: EmbeddingsPolicy = "always",
        family: str | None = None,
        options: Mapping[str, Any] | None = None,
        settings: EngineSettings,
        weight_decay: float,
        decayed: Collection[str] | None = None,
    ) -> None:
        self.module = module
        self.settings = settings
        found = family_of(module, family)
        self.partition = partition(module, found)
        check_shared_blocks(found, self.partition, schedule, stages)
        self.trained = frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)
        built = build_stages(
            schedule,
            num_blocks=self.partition.num_blocks,
            stages=stages,
            total_steps=total_steps,
            embeddings=embeddings,
            options=options,
        )
        self.total_steps = total_steps
        self.builds = build_for(built, self.partition, AsGiven(self.trained), weight_decay=weight_decay, decayed=decayed)
        for build in self.builds:
            if not build.live:
                raise ScheduleError(f"stage {build.stage.index} of '{schedule}' has nothing to train in this model")
        self.outcomes: list[StageOutcome] = []
        self.engine: AdoptedLocalEngine | AdoptedDeepSpeedEngine | None = None
        self._audit: Audit | None = None
        self._earlier: dict[int, StageOutcome] = {}
        self._volume_before = 0
        self._begun_at = 0
        self._switch = Switch(False, 0.0, "none")

    def build_at(self, step: int) -> StageBuild:
        """Of the stage that step `step` belongs to."""
        return self.builds[stage_at([build.stage for build in self.builds], step).index - 1]

    def resumed_at(self, steps_done: int) -> StageBuild:
        """Of the stage that a checkpoint of so many steps was saved in: on a boundary that of the step before."""
        return self.build_at(max(0, steps_done - 1))

    def first_optimizer(self, build: StageBuild) -> torch.optim.Optimizer:
        """The optimizer of the stage that the loop prepares itself; what is not live requires no gradient from here on."""
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in build.live)
        return self.settings.optimizer.build(parameters, build.groups)

    def adopt(self, build: StageBuild, model: Any, optimizer: Any, accelerator: Any, steps_done: int) -> None:
        """Takes over the stage that the loop has prepared, checkpoint loaded.

        Args:
            build: of the stage.
            model: as Accelerate gave it out.
            optimizer: the same.
            accelerator: the loop's.
            steps_done: optimizer steps that lie behind.
        """
        self.engine = adopt(self.module, self.settings, accelerator)
        self.engine.counts = False
        self.engine.adopt(build, model, optimizer)
        self._audit = Audit(self.engine, build)
        self._audit.start()
        self._volume_before, self._begun_at = self.engine.updated_volume(), steps_done

    def due(self, step: int) -> StageBuild | None:
        """The stage that step `step` belongs to, where another one stands there."""
        assert self.engine is not None
        if step >= self.total_steps:
            return None
        build = self.build_at(step)
        return None if build is self.engine.build else build

    def begin(self, build: StageBuild, step: int) -> None:
        """Begins a stage before step `step`, when the one before has ended and nobody else holds its engine. A collective."""
        assert self.engine is not None
        # Taken before the switch, so that what the switch itself changes shows too.
        self._audit = Audit(self.engine, build)
        self._switch = self.engine.begin_stage(build)
        self._volume_before, self._begun_at = self.engine.updated_volume(), step

    def end_stage(self, step: int, log: Callable[[StageOutcome], None]) -> None:
        """Checks and records the stage at work. A collective.

        Raises:
            AuditError: a frozen tensor has changed.
        """
        assert self._audit is not None and self.engine is not None and self.engine.build is not None
        self._audit.check(self.engine.build.stage.index)
        outcome = self.so_far(step)
        self.outcomes.append(outcome)
        log(outcome)

    def so_far(self, step: int) -> StageOutcome:
        """What the stage at work has done when `step` optimizer steps lie behind. A collective."""
        engine = self.engine
        assert engine is not None and engine.build is not None
        stage = engine.build.stage
        trainable = sum(self.partition.parameters[name].numel for name in engine.build.live)
        mine = StageOutcome(
            stage=stage.index,
            start_step=self._begun_at,
            end_step=step,
            first_block=stage.first_block(self.partition.num_blocks),
            embeddings=stage.embeddings,
            trainable_parameters=trainable,
            planned_updates=trainable * (step - self._begun_at),
            measured_updates=engine.updated_volume() - self._volume_before,
            frozen_changed=0,  # or the audit ends the run
            switch_seconds=self._switch.seconds,
            carried=self._switch.carried,
        )
        return mine.after(self._earlier.get(mine.stage))

    def go_on_from(self, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what a checkpoint tells of the stages before it, the last of which it may have been saved in."""
        self._earlier = {int(entry["stage"]): StageOutcome(**entry) for entry in outcomes}
        at_work = None if self.engine is None or self.engine.build is None else self.engine.build.stage.index
        self.outcomes = [outcome for stage, outcome in sorted(self._earlier.items()) if at_work is None or stage < at_work]

    def restore(self) -> None:
        """What could be trained before the stages requires a gradient again."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self.trained)


def default_stages(epochs: float) -> int:
    """The paper's choice: one for each epoch, a fraction counting as one.

    >>> default_stages(2.5)
    3
    """
    return max(1, math.ceil(epochs))


def rebind_scheduler(scheduler: Any, optimizer: Any, old_groups: Sequence[Mapping[str, Any]]) -> None:
    """Has a learning-rate scheduler go on with the next stage's optimizer, whose param groups are others.

    What it keeps for each group has to be the same for all of them, as it is where one learning rate serves the whole model.

    Args:
        scheduler: torch's, or one of its kind.
        optimizer: of the next stage.
        old_groups: param groups of the stage before.

    Raises:
        ScheduleError: the groups have learning rates of their own.
    """
    groups = optimizer.param_groups
    for key in ("lr", "initial_lr"):
        values = {float(group[key]) for group in old_groups if key in group}
        if len(values) > 1:
            many = ", ".join(map(str, sorted(values)))
            raise ScheduleError(
                f"the param groups have several values of {key} ({many}); stages that rebuild them need one learning rate for "
                "the whole model"
            )
        for group in groups:
            if values:
                group[key] = values.copy().pop()
    inner = list(getattr(scheduler, "_schedulers", ()))
    for one in inner:
        rebind_scheduler(one, optimizer, old_groups)
    for name, value in list(vars(scheduler).items()):
        if name != "_schedulers" and isinstance(value, list) and len(value) == len(old_groups) and value:
            if any(entry is not value[0] and entry != value[0] for entry in value):
                raise ScheduleError(
                    f"the learning-rate scheduler keeps values of its own for each param group ({name}: {value}); stages that "
                    "rebuild the groups need one curve for the whole model"
                )
            setattr(scheduler, name, [value[0]] * len(groups))
    scheduler.optimizer = optimizer
