"""What state.json must hold is what the loop's own objects are made of."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from progscale.checkpoint.state import SavedMeter, SavedProgress, SavedStage, check_state
from progscale.meters import StageRecord
from tests.harness.small import saved_state


def test_a_stage_is_a_record() -> None:
    assert list(SavedStage.model_fields) == [field.name for field in fields(StageRecord)]


def test_a_state_that_is_whole() -> None:
    state = check_state(Path("step-00000003"), saved_state(3))
    assert (state.step, state.progress.step, state.meter.rows) == (3, 3, 0)
    assert set(saved_state(3)["progress"]) == set(SavedProgress.model_fields)
    assert set(saved_state(3)["meter"]) == set(SavedMeter.model_fields)
