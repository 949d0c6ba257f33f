"""The learning rate as a closed form of the optimizer step, the same in every stage and after every resume. No torch.

The forms are those of transformers' schedules, so that a run without stages is comparable step by step: the factor
rises linearly from 0 over the warm-up steps and then follows the named curve to `final_fraction` at the last step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from progscale.schedule import Stage, stage_at

CurveName = Literal["linear", "cosine", "polynomial", "constant"]


@dataclass(frozen=True)
class LearningRate:
    """Learning rate by optimizer step.

    Attributes:
        peak: the rate after warm-up.
        curve: shape after warm-up.
        total_steps: optimizer steps of the run.
        warmup_steps: steps of the linear rise; with `restart_each_stage`, of each stage.
        warmup_fraction: the same as a share of the steps (of the run, or of each stage); one of the two is 0.
        final_fraction: share of `peak` reached at the end.
        power: exponent of the polynomial curve.
        restart_each_stage: begin the whole curve, warm-up included, anew in each stage.
        stages: needed for `restart_each_stage`.
    """

    peak: float
    curve: CurveName
    total_steps: int
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    final_fraction: float = 0.0
    power: float = 1.0
    restart_each_stage: bool = False
    stages: Sequence[Stage] = ()

    def __call__(self, step: int) -> float:
        """The rate for optimizer step `step` (0-based)."""
        if self.restart_each_stage:
            stage = stage_at(self.stages, step)
            return self.peak * self._factor(step - stage.start_step, stage.steps)
        return self.peak * self._factor(step, self.total_steps)

    def _factor(self, step: int, steps: int) -> float:
        warmup = self.warmup_steps or math.ceil(self.warmup_fraction * steps)
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if self.curve == "constant":
            return 1.0
        if self.curve == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            shape = (1.0 - progress) ** (self.power if self.curve == "polynomial" else 1.0)
        return self.final_fraction + (1.0 - self.final_fraction) * shape
