"""What the plan says of bytes is what a rank really holds and sends, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import costs
from tests.harness.cases import ENGINES
from tests.harness.costs import Measured
from tests.harness.worker import TwoRanks

# Each tensor's step counter, and what fills up the flat buffer of a param group: ten of them, aligned to 2 elements of each rank.
COUNTERS = {"plain": 4 * 105, "ddp": 4 * 105}
OF_GROUPS = 10 * (4 + 2 * 2 * 4)
# Losses, norms and notices that the ranks tell each other; DDP's buffers; the same padding.
TALK, BUFFERS = 300, 2000


def measured(two_ranks: TwoRanks, engine: str, **case: Any) -> list[list[Measured]]:
    return (
        [costs.run(engine=engine, **case)]
        if engine == "plain"
        else two_ranks.run("tests.harness.costs:run", engine=engine, **case)
    )


def check(found: Measured, engine: str) -> None:
    planned = found.planned.rank.state
    assert found.weights == planned.weights
    assert 0 <= found.gradients - planned.gradients <= OF_GROUPS
    assert 0 <= found.optimizer - planned.optimizer <= COUNTERS.get(engine, OF_GROUPS)
    sent = found.planned.communicated_bytes
    assert sent <= found.communicated <= sent + (0 if engine == "plain" else BUFFERS if engine == "ddp" else TALK)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_engine(two_ranks: TwoRanks, engine: str) -> None:
    for rank in measured(two_ranks, engine):
        assert len(rank) == 3
        for found in rank:
            check(found, engine)
        # Of what is frozen no gradient is kept, nor sent.
        assert rank[2].gradients < rank[1].gradients < rank[0].gradients
        if engine != "plain":
            assert rank[2].communicated < rank[1].communicated < rank[0].communicated


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_method_that_trains_little_sends_little(two_ranks: TwoRanks, engine: str) -> None:
    for found in measured(two_ranks, engine, method="lora")[0]:
        check(found, engine)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_half_precision(two_ranks: TwoRanks, engine: str) -> None:
    for found in measured(two_ranks, engine, precision="bf16_params")[0]:
        check(found, engine)


def test_weights_that_are_let_go_are_gathered_twice(two_ranks: TwoRanks) -> None:
    """As those of a model of more than a billion parameters are; frozen blocks below all that is trained once."""
    kept, forgotten = (measured(two_ranks, engine)[0] for engine in ("zero3", "zero3+forgetful"))
    for found in forgotten:
        check(found, "zero3")
    more = [again.communicated - once.communicated for again, once in zip(forgotten, kept, strict=True)]
    assert more[0] > more[1] > more[2] > 0


# More ranks than a small machine has cores take long; they are on the wire too, in tests/cluster/test_traffic.py.
DISTRIBUTED = ("ddp", "zero1", "zero2", "zero3")


@pytest.mark.product
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_three_ranks(three_ranks: TwoRanks, engine: str) -> None:
    """Parts of a size that three do not divide: ZeRO-3 fills each parameter up, which a plan does not count."""
    padding = {"zero3": 2 * 105 * 2 * 4 * 3}.get(engine, 0)
    for rank in three_ranks.run("tests.harness.costs:run", engine=engine, rows=24):
        for found in rank:
            sent = found.planned.communicated_bytes
            assert sent <= found.communicated <= sent + padding + (BUFFERS if engine == "ddp" else TALK)


@pytest.mark.product
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_four_ranks(four_ranks: TwoRanks, engine: str) -> None:
    for rank in four_ranks.run("tests.harness.costs:run", engine=engine, rows=24):
        for found in rank:
            sent = found.planned.communicated_bytes
            assert sent <= found.communicated <= sent + (BUFFERS if engine == "ddp" else TALK)
