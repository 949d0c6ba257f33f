"""State moves between engines of any two kinds without changing the run, and an old engine leaves nothing behind."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import pytest

from tests.harness.cases import ENGINES, Outcome, run
from tests.harness.moves import Leftovers, Moved
from tests.harness.worker import TwoRanks

KINDS = [name for name in ENGINES if name != "plain"]
PAIRS = list(permutations(KINDS, 2))
MORE = ("zero1", "zero2-offload", "zero3-offload")
# The second stage trains the same as the first, less, or more.
SCHEDULES = {"none": "the same", "progtuning": "fewer blocks", "growing": "a thawed part"}
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 2e-6, 5e-5


@cache
def never_moved(schedule: str) -> Outcome:
    """One process, one engine, no move."""
    return run(engine="plain", schedule=schedule, stages=2, steps=6, blocks=4)


# Each pair with one schedule, each schedule with ten pairs; the rest by the product.
ORDINARY = [(*pair, list(SCHEDULES)[index % 3]) for index, pair in enumerate(PAIRS)]


@pytest.mark.parametrize(("first", "second", "schedule"), ORDINARY)
def test_another_engine_goes_on(two_ranks: TwoRanks, first: str, second: str, schedule: str) -> None:
    goes_on(two_ranks, first, second, schedule)


@pytest.mark.product
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_another_engine_goes_on_product(two_ranks: TwoRanks, first: str, second: str, schedule: str) -> None:
    goes_on(two_ranks, first, second, schedule)


def goes_on(two_ranks: TwoRanks, first: str, second: str, schedule: str) -> None:
    moved: Moved = two_ranks.run("tests.harness.moves:carry", first=first, second=second, schedule=schedule)[0]
    expected = never_moved(schedule)
    assert moved.losses == pytest.approx(expected.losses, abs=LOSS_TOLERANCE)
    for name, value in expected.parameters.items():
        gap = (moved.parameters[name] - value).abs().max().item()
        assert gap < PARAMETER_TOLERANCE, f"{name} is off by {gap:.1e}"
    assert set(moved.steps_before.values()) == {3}
    for name, step in moved.steps_after.items():
        assert step == (0 if name in moved.thawed else 3), name
    assert bool(moved.thawed) == (schedule == "growing")
    assert moved.largest_moment_of_thawed == 0.0


@pytest.mark.parametrize("engine", ["zero2", "zero3", *(pytest.param(name, marks=pytest.mark.product) for name in MORE)])
def test_twenty_stages_leave_one_engine_and_then_none(two_ranks: TwoRanks, engine: str) -> None:
    before: dict[str, int] = two_ranks.run("tests.harness.moves:alive_objects")[0]
    assert set(before.values()) == {0}, "an earlier case left something"
    for left in two_ranks.run("tests.harness.moves:many_stages", engine=engine):
        one_then_none(left, of_stage3=int(engine.startswith("zero3")))


def one_then_none(left: Leftovers, of_stage3: int) -> None:
    one = {"engine": 1, "optimizer": 1, "torch optimizer": 1, "coordinator": of_stage3, "module stack": of_stage3}
    assert left.alive == one
    assert set(left.alive_after.values()) == {0}
    assert left.hooks_after == left.hooks_before
    assert left.attributes_after == left.attributes_before
    assert all(loss == loss for loss in left.losses)
    # Flat buffers are padded, each stage's by a little else.
    assert max(left.held_bytes) < 1.02 * min(left.held_bytes), "frozen tensors keep buffers of earlier stages alive"
