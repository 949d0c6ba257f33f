"""When the cache is on: what a row costs to compute, to write and to read, and how often it comes again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from progscale.cache import PrefixCache, Repeats
from progscale.cache.cache import Costs
from progscale.cache.ledger import Ledger
from progscale.models.loading import family_of
from tests.harness import prefixes
from tests.harness.prefixes import EPOCH


@pytest.mark.parametrize(
    ("costs", "again", "pays"),
    [
        (Costs(10, 1, 1, 4), 1, True),
        (Costs(10, 1, 1, 4), 0, False),
        (Costs(10, 1, 1, 4), 0.1, False),
        (Costs(10, 1, 1, 4), 0.2, True),
        (Costs(10, 1, 11, 4), 9, False),
        (Costs(10, 0, 10, 4), 9, False),
    ],
)
def test_what_pays(costs: Costs, again: float, pays: bool) -> None:
    assert costs.pays(again) is pays


def test_a_higher_prefix_costs_more_to_compute() -> None:
    assert Costs(10, 1, 2, 4).at(6) == Costs(15, 1, 2, 6)


def decided(monkeypatch: pytest.MonkeyPatch, costs: Costs, **case: Any) -> prefixes.Outcome:
    monkeypatch.setattr(PrefixCache, "_measure", lambda *_: costs)
    return prefixes.run(storage="ram", eager=False, **{"steps": 6 * EPOCH, **case})


def test_off_where_reading_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the prefix is so high that it is not."""
    outcome = decided(monkeypatch, Costs(0.010, 0.001, 0.015, 1), stages=4, steps=4 * EPOCH)
    assert outcome.said[0] == "stage 2: cache of block 0: off, a micro-batch takes 10.0 ms to compute, 15.0 ms to read"
    assert outcome.said[1].startswith("stage 3: cache of blocks 0 to 1: on, a micro-batch takes 20.0 ms to compute, 15.0 ms ")
    assert outcome.counts[1]["read"] == 0


def test_off_where_no_row_comes_again() -> None:
    outcome = prefixes.run(storage="ram", stages=2, steps=2 * EPOCH)
    assert outcome.said == ["stage 2: cache of blocks 0 to 1: off, no row is run again after this pass"]


def test_off_where_there_is_no_room() -> None:
    outcome = prefixes.run(storage="ram", steps=6 * EPOCH, budget=1000)
    assert [line.partition(", ")[0] for line in outcome.said] == [
        "stage 2: cache of block 0: off",
        "stage 3: cache of blocks 0 to 1: off",
    ]
    assert "the training rows need 0.00 GB" in outcome.said[0]


def test_off_for_blocks_that_hand_on_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "family_of", lambda model: dataclasses.replace(family_of(model), hand_on=None))
    outcome = prefixes.run(storage="ram", family="t5", steps=6 * EPOCH)
    assert outcome.said[0].endswith("off, its blocks hand on more than hidden states")
    assert outcome.losses == prefixes.run(storage=None, family="t5", steps=6 * EPOCH).losses


def test_nothing_more_is_kept_in_the_last_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    keep = Ledger.keep

    def noted(ledger: Ledger, rows: Any, depth: int) -> None:
        kept.append(depth)
        keep(ledger, rows, depth)

    monkeypatch.setattr(Ledger, "keep", noted)
    outcome = prefixes.run(storage="ram", stages=3, steps=3 * EPOCH)
    assert set(kept) == {1}, "the second epoch fills, the third only reads"
    assert outcome.counts[2]["extended"] > 0
    assert "nothing more is kept for what is left" in outcome.said[1]


def test_repeats_are_counted_from_the_step() -> None:
    assert prefixes.repeats(0, 6 * EPOCH) == Repeats(5.0, 6)
    assert prefixes.repeats(5 * EPOCH, 6 * EPOCH) == Repeats(0.0, 1)


def test_rows_go_to_the_device_in_the_dtype_of_the_block() -> None:
    """A smaller dtype is only how they are kept."""
    outcome = prefixes.run(storage="ram", steps=6 * EPOCH, dtype=torch.float16)
    assert outcome.counts[2]["read"] > 0
