"""A trial of a micro-batch, which finds out how much memory it needs, leaves no trace in the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import cases
from tests.harness.cases import ENGINES, Outcome
from tests.harness.worker import TwoRanks

CASE: dict[str, Any] = {"stages": 2, "steps": 4, "blocks": 4, "embeddings": "first_stage"}


def run(two_ranks: TwoRanks, engine: str, **case: Any) -> Outcome:
    case = {**CASE, **case}
    return (
        cases.run(engine=engine, **case)
        if engine == "plain"
        else two_ranks.run("tests.harness.cases:run", engine=engine, **case)[0]
    )


@pytest.mark.parametrize("engine", list(ENGINES))
def test_no_trace(two_ranks: TwoRanks, engine: str) -> None:
    tried, plain = (run(two_ranks, engine, trials=trials) for trials in (True, False))
    assert tried.losses == plain.losses
    assert tried.updated == plain.updated
    for name, value in plain.parameters.items():
        assert torch.equal(tried.parameters[name], value), name


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_no_trace_in_a_loss_scale(two_ranks: TwoRanks, engine: str) -> None:
    tried, plain = (run(two_ranks, engine, trials=trials, precision="fp16") for trials in (True, False))
    assert tried.losses == plain.losses
