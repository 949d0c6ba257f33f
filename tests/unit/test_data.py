"""Batches: nothing lost, nothing twice, the same at any world size and with any number of workers."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progscale.data import (
    TrainLoader,
    collate,
    eval_batches,
    evaluate_task,
    global_batches,
    pad_values,
    split_batch,
)
from progscale.errors import DataError, ModelError
from progscale.tasks.base import Tokenized
from progscale.tasks.ragged import Ragged

LENGTHS = st.lists(st.integers(1, 60), min_size=0, max_size=300)
PAD = {"input_ids": 99, "token_type_ids": 0}


def make_split(lengths: list[int]) -> Tokenized:
    ids = Ragged.from_rows([[1000 * row + i for i in range(n)] for row, n in enumerate(lengths)])
    types = Ragged(np.ones(len(ids.values), np.uint8), ids.offsets)
    columns = {"input_ids": ids, "token_type_ids": types}
    return Tokenized(columns, np.asarray(lengths), {"labels": np.arange(len(lengths))})


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_global_batches_hold_each_row_once(lengths: list[int], size: int, seed: int, epoch: int, group: bool) -> None:
    batches = global_batches(lengths, size, seed=seed, epoch=epoch, group_by_length=group)
    assert sorted(np.concatenate([*batches, np.empty(0, int)])) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches) == -(-len(lengths) // size)
    again = global_batches(lengths, size, seed=seed, epoch=epoch, group_by_length=group)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_epochs_and_seeds_give_other_orders() -> None:
    lengths = list(range(1, 101))
    orders = {
        tuple(np.concatenate(global_batches(lengths, 10, seed=seed, epoch=epoch)).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_grouping_by_length_pads_less() -> None:
    lengths = np.random.default_rng(0).integers(5, 128, size=3000)

    def padded(group: bool) -> int:
        batches = global_batches(lengths, 32, seed=0, epoch=0, group_by_length=group)
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    assert padded(True) < 1.05 * lengths.sum() < padded(False)


def test_the_short_batch_is_no_sample_of_short_rows() -> None:
    lengths = np.arange(1, 1001)
    means = [lengths[global_batches(lengths, 96, seed=seed, epoch=0)[-1]].mean() for seed in range(30)]
    assert 400 < np.mean(means) < 600


@settings(deadline=None)
@given(
    LENGTHS,
    st.integers(1, 5),
    st.integers(1, 16),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_split_batch_deals_each_row_once(lengths: list[int], world: int, micro: int, budget: int | None) -> None:
    rows = np.arange(len(lengths))
    steps = split_batch(rows, lengths, world_size=world, micro_batch_size=micro, max_tokens=budget)
    assert sorted(row for step in steps for part in step for row in part) == rows.tolist()
    assert all(len(step) == world for step in steps)
    sizes = np.asarray(lengths)
    for step in steps:
        assert len(step[0]) > 0
        for part in step:
            assert len(part) <= micro
            if budget is not None and len(part) > 1:
                assert len(part) * sizes[part].max() <= budget
    if budget is None:
        assert len(steps) == -(-len(lengths) // (world * micro))
        totals = [sum(len(step[rank]) for step in steps) for rank in range(world)]
        assert max(totals) - min(totals) <= len(steps)


def test_the_order_of_a_global_batch_does_not_matter_to_the_split() -> None:
    lengths = [5, 9, 5, 2, 7, 7]
    one = split_batch(np.arange(6), lengths, world_size=2, micro_batch_size=2)
    other = split_batch(np.array([3, 1, 5, 0, 4, 2]), lengths, world_size=2, micro_batch_size=2)
    assert [[part.tolist() for part in step] for step in one] == [[part.tolist() for part in step] for step in other]


def test_the_budget_counts_what_is_padded_for_tensor_cores() -> None:
    """At a multiple of 8 a row of 33 tokens takes 40."""
    steps = split_batch(np.arange(300), np.full(300, 33), world_size=1, micro_batch_size=1000, max_tokens=4096, multiple_of=8)
    assert max(len(step[0]) for step in steps) == 4096 // 40


def test_a_row_beyond_the_budget_stands_alone() -> None:
    steps = split_batch(np.arange(4), [100, 3, 3, 3], world_size=1, micro_batch_size=8, max_tokens=12)
    assert [step[0].tolist() for step in steps] == [[0], [1, 2, 3]]


def test_collate_pads_and_masks() -> None:
    split = make_split([3, 1, 10])
    batch = collate(split, np.array([1, 0]), PAD, multiple_of=8)
    assert batch.inputs["input_ids"].tolist()[0] == [1000, *[99] * 7]
    assert batch.inputs["input_ids"].tolist()[1][:3] == [0, 1, 2]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [1, 3]
    assert batch.inputs["token_type_ids"].dtype == torch.int64
    assert batch.labels["labels"].tolist() == [1, 0]
    assert (batch.tokens, batch.weight, len(batch)) == (4, 1.0, 2)
    # The split's longest row bounds the rounding: a model may have no more positions.
    assert collate(split, np.array([2]), PAD, multiple_of=8).inputs["input_ids"].shape == (1, 10)


def loader(split: Tokenized, **changes: Any) -> TrainLoader:
    return TrainLoader(split, PAD, **{"global_batch_size": 8, "micro_batch_size": 3, "seed": 4, **changes})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=8, max_size=60), st.integers(1, 4), st.sampled_from([None, 40]))
def test_ranks_together_run_the_global_batch(lengths: list[int], world: int, budget: int | None) -> None:
    split = make_split(lengths)
    ranks = [loader(split, world_size=world, rank=rank, max_tokens=budget) for rank in range(world)]
    alone = list(loader(split).epoch(1))
    for reference, *parts in zip(alone, *(rank.epoch(1) for rank in ranks), strict=True):
        assert {len(part.micro_batches) for part in parts} == {len(parts[0].micro_batches)}
        micro = [batch for part in parts for batch in part.micro_batches]
        seen = sorted(row for batch in micro if batch.weight for row in batch.rows)
        assert seen == sorted(reference.rows) and {part.size for part in parts} == {len(seen)}
        assert sum(batch.tokens for batch in micro) == parts[0].tokens == sum(lengths[row] for row in seen)
        assert all(len(batch) == 1 and batch.tokens == 0 for batch in micro if not batch.weight)
    assert len(alone) == ranks[0].steps_per_epoch


def same(one: Any, other: Any) -> bool:
    return all(
        (a.rows == b.rows).all() and all(torch.equal(a.inputs[key], b.inputs[key]) for key in a.inputs)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True)
    )


def test_workers_give_the_same_batches_and_leave_the_random_state() -> None:
    split = make_split(np.random.default_rng(1).integers(1, 20, size=50).tolist())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    plain = list(loader(split).epoch(2, start=3))
    workers = list(loader(split, num_workers=2).epoch(2, start=3))
    assert [batch.index for batch in plain] == [batch.index for batch in workers] == [3, 4, 5, 6]
    assert all(same(one, other) for one, other in zip(plain, workers, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_starting_later_gives_the_rest_of_the_same_epoch() -> None:
    split = make_split(list(range(1, 40)))
    whole = list(loader(split).epoch(0))
    rest = list(loader(split).epoch(0, start=2))
    assert all(same(one, other) for one, other in zip(whole[2:], rest, strict=True))


class _Handlers(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> list[bool]:
        return [signal.getsignal(kind) is signal.SIG_IGN for kind in (signal.SIGINT, signal.SIGTERM)]

    def __len__(self) -> int:
        return 1


def test_workers_ignore_signals() -> None:
    from progscale.data import _ignore_signals, _unchanged

    data = torch.utils.data.DataLoader(
        _Handlers(), batch_size=None, num_workers=1, worker_init_fn=_ignore_signals, collate_fn=_unchanged
    )
    assert list(data) == [[True, True]]


def test_fewer_rows_than_a_global_batch() -> None:
    with pytest.raises(DataError, match=r"train has 5 rows, fewer than one global batch: train.global_batch_size is 8"):
        loader(make_split([1] * 5))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 9))
def test_eval_batches_deal_each_row_once(lengths: list[int], world: int, size: int) -> None:
    split = make_split(lengths)
    ranks = [list(eval_batches(split, size, world, rank, pad=PAD)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = sorted(row for batches in ranks for batch in batches if batch.weight for row in batch.rows)
    assert rows == list(range(len(lengths)))


def test_predictions_are_checked() -> None:
    class Counting:
        def score(self, predictions: Any, split: Tokenized, name: str) -> dict[str, float]:
            return {"rows": float(len(predictions))}

    task: Any = Counting()
    split = make_split([1, 2, 3])
    assert evaluate_task(task, split, "validation", {0: 1, 1: 1, 2: 1}) == {"rows": 3.0}
    with pytest.raises(DataError, match=r"1 missing \(first: \[1\]\), 1 unknown \(first: \[7\]\)"):
        evaluate_task(task, split, "validation", {0: 1, 2: 1, 7: 1})


def test_a_tokenizer_without_padding() -> None:
    class Bare:
        pad_token_id = None

    with pytest.raises(ModelError, match="no padding token"):
        pad_values(Bare())


def test_ragged_rows() -> None:
    column = Ragged.from_rows([[1, 2], [], [3, 4, 5]])
    assert [row.tolist() for row in (column[0], column[1], column[-1])] == [[1, 2], [], [3, 4, 5]]
    taken = column.take(np.array([2, 1]))
    assert [taken[row].tolist() for row in range(len(taken))] == [[3, 4, 5], []]
    assert column.padded(np.array([1, 0]), 3, -1).tolist() == [[-1, -1, -1], [1, 2, -1]]
    assert len(Ragged.concatenate([column, column])) == 6 and len(Ragged.concatenate([])) == 0
    with pytest.raises(IndexError, match="row 3 of 3"):
        column[3]
