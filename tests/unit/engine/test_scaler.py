"""What a loss scaler takes over from a checkpoint: how far it is, and none of its settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from progscale.engine.deepspeed import DeepSpeedEngine


def engine_with(scaler: Any) -> Any:
    """As much of an engine as has to do with scaling."""
    return SimpleNamespace(scales_loss=True, _zero=lambda: SimpleNamespace(loss_scaler=scaler))


def dynamic(**settings: Any) -> Any:
    given = {"init_scale": 2.0**16, "scale_window": 1000, "min_scale": 1.0, "delayed_shift": 2, "consecutive_hysteresis": False}
    return DynamicLossScaler(**{**given, **settings})


def saved_by(scaler: Any) -> Any:
    return DeepSpeedEngine.scaler_state(engine_with(scaler))


def loaded(scaler: Any, state: Any) -> Any:
    DeepSpeedEngine.load_scaler_state(engine_with(scaler), state)
    return scaler


def test_progress_goes_on_under_new_settings() -> None:
    old = dynamic()
    old.cur_scale, old.cur_iter, old.last_overflow_iter, old.cur_hysteresis = 512.0, 70, 40, 1
    new = loaded(dynamic(scale_window=5, min_scale=4.0, delayed_shift=3, consecutive_hysteresis=True), saved_by(old))
    assert (new.cur_scale, new.cur_iter, new.last_overflow_iter, new.cur_hysteresis) == (512.0, 70, 40, 1)
    assert (new.scale_window, new.min_scale, new.delayed_shift, new.consecutive_hysteresis) == (5, 4.0, 3, True)


def test_what_is_out_of_the_new_bounds() -> None:
    old = dynamic(delayed_shift=5)
    old.cur_scale = 2.0
    new = loaded(dynamic(min_scale=8.0), saved_by(old))
    assert (new.cur_scale, new.cur_hysteresis) == (8.0, 2)


@pytest.mark.parametrize("older", [False, True])
def test_a_fixed_scale_becomes_a_dynamic_one(older: bool) -> None:
    """Also from a checkpoint that holds all numbers of the scaler, as there once were."""
    fixed = LossScaler(scale=128.0)
    state = {"loss_scale": 128.0, "deepspeed": {"cur_scale": 128.0, "dynamic": False}} if older else saved_by(fixed)
    new = loaded(dynamic(), state)
    assert new.dynamic and new.cur_scale == 128.0
    assert DeepSpeedEngine._scale_can_fall(engine_with(new))


def test_a_fixed_scale_stays_what_the_config_says() -> None:
    assert loaded(LossScaler(scale=64.0), saved_by(dynamic())).cur_scale == 64.0
