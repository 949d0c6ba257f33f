"""As many rows at once as memory holds: the same for all ranks, and no trace of the trial."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from progscale import memory
from progscale.data import TrainLoader
from progscale.engine.memory import free_bytes, peak_of
from progscale.fit import Fit, fit_micro_batch
from tests.harness.cases import builds_of, make_engine, row_loss, share
from tests.harness.prefixes import split_of
from tests.tiny import tiny_model

CPU = torch.device("cpu")


class Ranks:
    """An engine whose micro-batches need 1000 bytes and 100 a row; the other rank may need more, or have less."""

    device = CPU

    def __init__(self, more: int = 0, less: int = 0) -> None:
        self.more, self.less = more, less
        self.tried: list[int] = []

    def trial(self, batch: Any, loss: Any) -> int:
        self.tried.append(len(batch))
        # What is allocated once, in the first pass, is not needed for each.
        return 1000 + 100 * len(batch) + (5000 if len(self.tried) == 1 else 0)

    def gather_objects(self, thing: Any) -> list[Any]:
        return [thing, thing + self.more * self.tried[-1]] if self.tried else [thing, thing - self.less]


def loader(rows: int = 64, world_size: int = 1) -> TrainLoader:
    split = split_of(80, alike=False, seed=0, end=None)
    return TrainLoader(split, {"input_ids": 0}, global_batch_size=rows, micro_batch_size=1, world_size=world_size)


def fit(engine: Any, made: TrainLoader, limit: int) -> Fit:
    return fit_micro_batch(engine, made, row_loss, local_ranks=1, limit_bytes=limit)


@pytest.mark.parametrize(
    ("limit", "rows", "steps"),
    [(10**9, 64, 1), (1000 + 6400, 64, 1), (1000 + 6399, 32, 2), (1000 + 3199, 22, 3)],
)
def test_the_largest_that_fits_shared_out_evenly(limit: int, rows: int, steps: int) -> None:
    found = fit(Ranks(), loader(), limit)
    assert (found.rows, found.steps) == (rows, steps)
    assert found.predicted_bytes == 1000 + 100 * rows


def test_the_rank_that_is_worst_off_decides() -> None:
    for ranks in (Ranks(more=100), Ranks(less=3200)):
        found = fit(ranks, loader(), 1000 + 6400)
        assert found.rows == 32


def test_small_shares_are_tried_whole() -> None:
    engine = Ranks()
    found = fit(engine, loader(8, world_size=2), 10**9)
    assert engine.tried == [1, 1, 2, 4]
    assert (found.rows, found.steps) == (4, 1)
    engine = Ranks()
    assert fit(engine, loader(1), 10**9).rows == 1
    assert set(engine.tried) == {1}


def test_nothing_is_tried_that_would_not_fit() -> None:
    engine = Ranks()
    found = fit(engine, loader(), 1000 + 450)
    assert engine.tried == [1, 1], "from one row alone two look like twice as much"
    assert found.rows == 1
    engine = Ranks()
    found = fit(engine, loader(), 2200)
    assert engine.tried == [1, 1, 2, 6]
    assert found.rows == 11
    found = fit(Ranks(), loader(), 1000)
    assert str(found).endswith("which may not be enough for a single row")


def test_what_the_optimizer_will_need_is_not_free() -> None:
    module = tiny_model("bert", blocks=2).train()
    engine = make_engine(module, "plain")
    _, builds = builds_of(module, "none", "always", 1, 4, {})
    engine.begin_stage(builds[0])
    elements = sum(parameter.numel() for parameter in module.parameters())
    assert engine.missing_state_bytes() == 8 * elements
    engine.train_step(share(0, 4, 101, 0, 1, 4), 4, row_loss, 1e-3)
    assert engine.missing_state_bytes() == 0


def test_what_is_resident_is_gone_from_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "status_bytes", lambda key: 2_000_000)
    monkeypatch.setattr(memory, "machine_memory", lambda: (5_000_000, 5_000_000))
    assert memory.available_bytes() == 3_000_000
    monkeypatch.setattr(memory, "machine_memory", lambda: (50_000_000, 5_000_000))
    assert memory.available_bytes() == 5_000_000


def test_the_longest_rows_are_tried() -> None:
    seen: list[int] = []

    class Looking(Ranks):
        def trial(self, batch: Any, loss: Any) -> int:
            seen.extend(batch.rows.tolist())
            return super().trial(batch, loss)

    made = loader()
    fit(Looking(), made, 10**9)
    assert set(seen) == set(np.argsort(-made.split.lengths, kind="stable")[:6].tolist())


def test_the_peak_is_what_was_held_at_once() -> None:
    with peak_of(CPU) as peak:
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(500_000)
        third = torch.empty(250_000)
    assert peak.bytes == 4_000_000
    with peak_of(CPU) as less:
        second.sum()
    assert less.bytes < 1000
    del third


def test_free_memory_is_shared_by_the_ranks_of_a_node() -> None:
    assert free_bytes(CPU, 4) == pytest.approx(free_bytes(CPU, 1) / 4, rel=0.2)


def test_more_rows_need_more_and_frozen_blocks_less() -> None:
    module = tiny_model("bert", blocks=6).train()
    engine = make_engine(module, "plain")
    _, builds = builds_of(module, "progtuning", "first_stage", 3, 6, {})
    needs = []
    for build in builds:
        engine.begin_stage(build)
        needs.append([engine.trial(share(0, rows, 101, 0, 1, rows)[0], row_loss) for rows in (4, 8, 16)])
    for small, middle, large in needs:
        assert large - middle == pytest.approx(2 * (middle - small), rel=0.1), "a line"
    slopes = [large - small for small, _, large in needs]
    assert slopes[0] > slopes[1] > slopes[2]
