"""ALBERT, whose layers share their blocks: plain fine-tuning on every engine, and groups of layers in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_contracts import check, train
from tests.contract.test_resume import Runs, near, same_bits
from tests.harness.cases import ENGINES
from tests.harness.worker import TwoRanks

# A group of layers after the other, as the layers rise; the second half of them shares block 1.
GROUPS = {"num_hidden_groups": 2}


@pytest.mark.parametrize("engine", list(ENGINES))
def test_plain_fine_tuning(two_ranks: TwoRanks, engine: str) -> None:
    """The embeddings freeze after the first stage; the one block is live in all."""
    check(two_ranks, {"engine": engine, "family": "albert", "schedule": "none", "embeddings": "first_stage", "method": "full"})


@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_groups_of_layers_are_blocks(two_ranks: TwoRanks, engine: str) -> None:
    case = {"family": "albert", "schedule": "progtuning", "embeddings": "always", "method": "full", "stages": 2}
    outcome = train(two_ranks, engine, **case, config=GROUPS)
    assert [any("groups.0" in name for name in live) for live in outcome.live_names] == [True, False]
    assert [any("groups.1" in name for name in live) for live in outcome.live_names] == [True, True]
    assert outcome.frozen_changed == outcome.frozen_with_gradient == outcome.live_unmoved == [[], []]
    assert outcome.updated == outcome.planned
    assert outcome.losses == pytest.approx(train(None, "plain", **case, config=GROUPS).losses, abs=2e-6)


@pytest.mark.parametrize("engine", ["plain", "zero1", "zero2", "zero3"])
def test_goes_on_as_if_nothing_had_happened(two_ranks: TwoRanks, tmp_path: Path, engine: str) -> None:
    runs = Runs(two_ranks, tmp_path)
    whole = runs.whole(engine, "none", family="albert")
    same_bits(runs.rest(engine, "none", 3, family="albert"), whole, 3)
    elsewhere: dict[str, Any] = {"family": "albert", "dropout": 0.0}
    whole = runs.whole(engine, "none", **elsewhere)
    near(runs.rest("plain" if engine != "plain" else "zero2", "none", 3, saved_by=engine, **elsewhere), whole, 3)
