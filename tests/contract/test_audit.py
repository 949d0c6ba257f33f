"""The audit sees one flipped bit of a frozen tensor, under every engine and on whichever rank it is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.cases import ENGINES
from tests.harness.worker import TwoRanks

CASES = [(engine, rank) for engine in ENGINES for rank in (None, 0, 1) if (engine, rank) != ("plain", 1)]


def audit(two_ranks: TwoRanks, engine: str, **case: Any) -> list[dict[str, Any]]:
    if engine == "plain":
        from tests.harness.audit import audited_stage

        return [audited_stage(engine, **case)]
    return two_ranks.run("tests.harness.audit:audited_stage", engine=engine, **case)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_bit_flipped_by_a_switch(two_ranks: TwoRanks, engine: str) -> None:
    for answer in audit(two_ranks, engine, flip_on=0, in_switch=True):
        assert answer["changed"] == [answer["victim"]]
        assert f"the first of them {answer['victim']}" in answer["error"]


@pytest.mark.parametrize(("engine", "rank"), CASES)
def test_one_flipped_bit(two_ranks: TwoRanks, engine: str, rank: int | None) -> None:
    for answer in audit(two_ranks, engine, flip_on=rank):
        victim = answer["victim"]
        assert answer["changed"] == ([] if rank is None else [victim])
        if rank is None:
            assert answer["error"] is None
            assert answer["record"]["frozen_changed"] == 0
            assert answer["record"]["updated_parameters"] == answer["record"]["planned_updated_parameters"]
        else:
            assert answer["record"] is None
            assert f"1 frozen tensors changed their bits, the first of them {victim}" in answer["error"]
