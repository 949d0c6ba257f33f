"""The engine may be another one in each stage: the run is the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.contract.test_contracts import LOSS_TOLERANCE, PARAMETER_TOLERANCE
from tests.harness.cases import Outcome, run
from tests.harness.worker import TwoRanks

CASE: dict[str, Any] = {"stages": 3, "steps": 6, "blocks": 6, "embeddings": "first_stage"}
ROUNDS = [
    ("zero2-offload", "zero2", "zero2"),
    ("zero1", "zero2-offload", "zero1"),
    ("zero2", "zero1", "zero2+small_buckets"),
    ("zero2", "zero1+round_robin", "zero2-offload"),
    ("zero3-offload+optimizer_only", "zero3", "zero3+sub_groups"),
]


@cache
def reference(**case: Any) -> Outcome:
    return run(engine="plain", **{**CASE, **case})


@pytest.mark.parametrize("by_stage", ROUNDS, ids=" ".join)
def test_the_same_run(two_ranks: TwoRanks, by_stage: tuple[str, ...]) -> None:
    found = two_ranks.run("tests.harness.cases:run", engine=by_stage[0], by_stage=by_stage, **CASE)[0]
    plain = reference()
    assert found.engines == [name.partition("+")[0] for name in by_stage]
    assert found.losses == pytest.approx(plain.losses, abs=LOSS_TOLERANCE)
    for name, value in plain.parameters.items():
        assert (found.parameters[name] - value).abs().max().item() < PARAMETER_TOLERANCE, name
    assert found.updated == found.planned == plain.planned
    assert found.frozen_changed == found.frozen_with_gradient == [[], [], []]
    assert "none" not in found.carried[1:]


def test_one_stage_of_all_blocks_changes_the_engine_alone(two_ranks: TwoRanks) -> None:
    """What is trained stays the same, and yet the engine is built anew."""
    case = {**CASE, "schedule": "custom", "options": {"first_blocks": [0, 0, 0]}, "embeddings": "always"}
    by_stage = ("zero2", "zero2-offload", "zero2-offload")
    found = two_ranks.run("tests.harness.cases:run", engine="zero2", by_stage=by_stage, **case)[0]
    assert found.engines == list(by_stage)
    assert found.carried[1] != "none"
    assert found.carried[2] == "none", "nothing is new in the last stage"
    assert found.losses == pytest.approx(run(engine="plain", **case).losses, abs=LOSS_TOLERANCE)


def test_the_old_engine_goes(two_ranks: TwoRanks) -> None:
    """Half precision, whose masters alone carry what bfloat16 does not hold."""
    case = {**CASE, "precision": "bf16_params"}
    changed = two_ranks.run(
        "tests.harness.cases:run", engine="zero2-offload", by_stage=("zero2-offload", "zero2", "zero2"), **case
    )[0]
    whole = two_ranks.run("tests.harness.cases:run", engine="zero2", **case)[0]
    assert changed.losses == pytest.approx(whole.losses, abs=1e-3)
    assert changed.updated == whole.updated
