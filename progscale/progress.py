"""How far a run is, kept so that a checkpoint can hold it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from progscale.engine.base import Switch
from progscale.meters import StageMeter, StageRecord
from progscale.numbers import decode_scores
from progscale.schedule import Stage
from progscale.session import Session

# What a checkpoint holds of Progress as it is.
COUNTED = (
    *("step", "stage", "evaluation_due", "best_step", "evaluation_seconds", "saving_seconds", "skipped_in_a_row"),
    *("switch_seconds", "carried", "earlier_seconds"),
)


class Progress:
    """How far the run is, and what it has shown so far: all that a checkpoint must tell the loop.

    Attributes:
        step: optimizer steps done.
        stage: 1-based, the one at work.
        evaluation_due: the evaluation after `step` is still to be done.
        saved_step: of the last checkpoint.
        switch_seconds: of the stage at work.
        carried: how its optimizer state came to it.
        earlier_seconds: that the run took before it was resumed.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0
        self.step = 0
        self.stage = 1
        self.evaluation_due = False
        self.saved_step = 0
        self.stages: list[StageRecord] = []
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.evaluation_seconds = 0.0
        self.saving_seconds = 0.0
        self.skipped_in_a_row = 0
        self.switch_seconds = 0.0
        self.carried = "none"
        self._meter: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, s: Session) -> Progress:
        """Where the session's run stands: at its beginning, or where its checkpoint was taken."""
        progress = cls()
        if s.resumed is None:
            return progress
        state = s.resumed.checkpoint.state
        saved = state["progress"]
        for name in COUNTED:
            setattr(progress, name, saved[name])
        progress.saved_step = progress.step if s.resumed.in_place else 0
        progress.metrics, progress.best = decode_scores(saved["metrics"]), decode_scores(saved["best"])
        progress.stages = [StageRecord(**record) for record in saved["stages"]]
        progress._meter = state["meter"]
        s.unlogged.extend(float(loss) for loss in state["unlogged"])
        progress.best, progress.best_step = s.best_so_far(progress.best, progress.best_step)
        return progress

    def to_json(self) -> dict[str, Any]:
        """For `of`."""
        counted = {name: getattr(self, name) for name in COUNTED}
        stages = [record.to_json() for record in self.stages]
        return {**counted, "earlier_seconds": self.seconds, "metrics": self.metrics, "best": self.best, "stages": stages}

    def begin(self, stage: Stage, switch: Switch, meter: StageMeter) -> None:
        """A stage begins, or goes on where it was stopped."""
        self.stage = stage.index
        if self._meter is None:
            self.switch_seconds, self.carried = switch.seconds, switch.carried
        else:
            meter.restore(self._meter)
            self._meter = None

    @property
    def seconds(self) -> float:
        """Wall time of the run, that before a resume included."""
        return self.earlier_seconds + time.perf_counter() - self.started
