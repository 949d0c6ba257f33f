"""The learning rate: transformers' own schedules step by step, and what a stage boundary does to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from progscale.learning_rate import LearningRate
from progscale.schedule import build_stages

PEAK, STEPS = 3e-4, 23
Make = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LambdaLR]

THEIRS: dict[str, tuple[dict[str, float], Make]] = {
    "linear": ({}, lambda o, w: transformers.get_linear_schedule_with_warmup(o, w, STEPS)),
    "cosine": ({}, lambda o, w: transformers.get_cosine_schedule_with_warmup(o, w, STEPS)),
    "cosine to a tenth": (
        {"final_fraction": 0.1},
        lambda o, w: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, w, STEPS, min_lr_rate=0.1),
    ),
    "polynomial": (
        {"power": 2.0, "final_fraction": 0.25},
        lambda o, w: transformers.get_polynomial_decay_schedule_with_warmup(o, w, STEPS, lr_end=0.25 * PEAK, power=2.0),
    ),
    "constant": ({}, transformers.get_constant_schedule_with_warmup),
}


@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS - 1])
@pytest.mark.parametrize("name", list(THEIRS))
def test_every_step_is_that_of_transformers(name: str, warmup: int) -> None:
    options, make = THEIRS[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, warmup)
    ours = LearningRate(PEAK, name.split()[0], STEPS, warmup_steps=warmup, **options)  # type: ignore[arg-type]
    for step in range(STEPS):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18), step
        optimizer.step()
        scheduler.step()


@given(st.integers(1, 400), st.floats(0.0, 0.9))
def test_a_share_of_warm_up_is_that_many_steps(steps: int, share: float) -> None:
    by_share = LearningRate(1.0, "linear", steps, warmup_fraction=share)
    warmup = next((step for step in range(steps) if by_share(step) == 1.0), steps)
    assert warmup == math.ceil(share * steps), "as transformers rounds it"
    by_steps = LearningRate(1.0, "linear", steps, warmup_steps=warmup)
    assert [by_share(step) for step in range(steps)] == [by_steps(step) for step in range(steps)]


@pytest.mark.parametrize("curve", ["linear", "cosine", "polynomial"])
def test_the_curve_ends_at_the_final_fraction(curve: str) -> None:
    rate = LearningRate(2.0, curve, 40, warmup_steps=4, final_fraction=0.3, power=3.0)  # type: ignore[arg-type]
    values = [rate(step) for step in range(41)]
    assert values[4] == 2.0
    assert values[40] == pytest.approx(0.6)
    assert all(a > b for a, b in pairwise(values[4:]))


@pytest.mark.parametrize("warmup", [{"warmup_steps": 2}, {"warmup_fraction": 0.25}])
def test_a_restart_gives_each_stage_the_whole_curve(warmup: dict[str, float]) -> None:
    stages = build_stages("progtuning", num_blocks={"blocks": 4}, stages=3, total_steps=25)
    rate = LearningRate(1.0, "cosine", 25, final_fraction=0.1, restart_each_stage=True, stages=stages, **warmup)  # type: ignore[arg-type]
    assert [stage.steps for stage in stages] == [8, 8, 9]
    for stage in stages:
        alone = LearningRate(1.0, "cosine", stage.steps, final_fraction=0.1, **warmup)  # type: ignore[arg-type]
        assert [rate(stage.start_step + step) for step in range(stage.steps)] == [alone(step) for step in range(stage.steps)]


def test_without_a_restart_stages_do_not_matter() -> None:
    stages = build_stages("progtuning", num_blocks={"blocks": 4}, stages=3, total_steps=24)
    with_stages = LearningRate(1.0, "linear", 24, warmup_steps=3, stages=stages)
    without = LearningRate(1.0, "linear", 24, warmup_steps=3)
    assert [with_stages(step) for step in range(24)] == [without(step) for step in range(24)]
