"""A loop of somebody's own over Accelerate: the same losses and weights as progscale's own, and frozen is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.errors import AuditError, UserError
from tests.harness.cases import run
from tests.harness.own_loops import ROWS, STEPS, run_loop
from tests.harness.trainers import Shown
from tests.harness.worker import TwoRanks

ENGINES = {"plain": "always", "ddp": "first_stage", "zero1": "always", "zero2": "never", "zero3": "always"}


def looped(two_ranks: TwoRanks, engine: str, **options: Any) -> Shown:
    if engine == "plain":
        return run_loop("plain", **options)
    return two_ranks.run("tests.harness.own_loops:run_loop", engine=engine, **options)[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_progscales_own_loop(two_ranks: TwoRanks, engine: str) -> None:
    found = looped(two_ranks, engine, embeddings=ENGINES[engine])
    rates = tuple(1e-3 / (step + 1) for step in range(STEPS))
    case = {"stages": 3, "steps": STEPS, "rows": ROWS, "micro": ROWS, "blocks": 6, "rates": rates}
    wanted = run("plain", embeddings=ENGINES[engine], **case)
    assert found.losses == pytest.approx(wanted.losses, abs=2e-6)
    for name, value in wanted.parameters.items():
        torch.testing.assert_close(found.parameters[name].view(value.shape), value, rtol=0, atol=5e-5)
    for outcome in found.outcomes:
        assert outcome["measured_updates"] == outcome["planned_updates"] > 0
        assert outcome["frozen_changed"] == 0
    assert found.engines == (0 if engine == "plain" else 1)


@pytest.mark.parametrize("engine", ["plain", "zero2"])
@pytest.mark.parametrize("step", [3, 4])
def test_its_own_checkpoints_go_on(two_ranks: TwoRanks, tmp_path: Path, engine: str, step: int) -> None:
    whole = looped(two_ranks, engine)
    looped(two_ranks, engine, stop_at=step, folder=str(tmp_path / "state"))
    rest = looped(two_ranks, engine, resume_at=step, folder=str(tmp_path / "state"))
    assert rest.losses == whole.losses[step:]
    for name, value in whole.parameters.items():
        assert torch.equal(rest.parameters[name], value), name


def test_a_frozen_weight_that_changes_ends_the_run() -> None:
    with pytest.raises(AuditError, match="stage 3: 1 frozen tensors changed their bits"):
        run_loop("plain", flip=True)


def test_steps_that_are_none() -> None:
    with pytest.raises(UserError, match="steps_done: 6 is no step of a run of 6, from 0"):
        run_loop("plain", resume_at=6, folder="x")
