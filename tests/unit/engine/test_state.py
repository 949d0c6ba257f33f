"""Optimizer state as flat ranges: what moves, what is copied, and between which layouts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from progscale.engine.filling import Filling
from progscale.engine.moving import redistribute
from progscale.engine.state import (
    MASTER,
    Piece,
    Shard,
    Slice,
    elementwise,
    match_shards,
    move_shard,
    slices_of,
)
from progscale.errors import UserError
from tests.harness.layouts import layouts

SIZES = {"a": 7, "b": 12, "c": 1, "d": 30}
CPU = torch.device("cpu")


def value_of(name: str, key: str) -> torch.Tensor:
    """A distinct value for each element of each tensor."""
    start = 1000.0 * (1 + list(SIZES).index(name)) + {MASTER: 0.0, "exp_avg": 100.0, "exp_avg_sq": 200.0}[key]
    return torch.arange(SIZES[name], dtype=torch.float32) + start


def shard(*pieces: tuple[str, int, int], filled: bool = True, gap: int = 0, step: float = 5.0) -> Shard:
    """A shard of the given ranges, one behind the other, with `gap` elements of padding between and behind."""
    placed, offset = [], 0
    for name, start, end in pieces:
        placed.append(Piece(name, start, end, offset))
        offset += end - start + gap
    tensor = torch.full((offset,), -1.0)
    made = Shard(tuple(placed), tensor)
    if filled:
        made.state.update(exp_avg=torch.full((offset,), -1.0), exp_avg_sq=torch.full((offset,), -1.0), step=torch.tensor(step))
        for piece in placed:
            for key, flat in ((MASTER, tensor), ("exp_avg", made.state["exp_avg"]), ("exp_avg_sq", made.state["exp_avg_sq"])):
                flat[piece.offset : piece.offset + piece.numel] = value_of(piece.name, key)[piece.start : piece.end]
    return made


def whole(shards: Sequence[Shard], key: str, name: str) -> torch.Tensor:
    """A parameter's values put together from its slices."""
    found = torch.full((SIZES[name],), float("nan"))
    for part in slices_of(shards):
        if part.name == name:
            found[part.start : part.end] = part.tensors[key]
    return found


def test_a_shard_counts_without_its_padding() -> None:
    one = shard(("a", 2, 7), ("b", 0, 12), gap=3)
    assert (one.numel, one.tensor.numel(), one.step) == (17, 23, 5)
    assert one.state_bytes() == 2 * 23 * 4 + 4
    assert Shard(one.pieces, one.tensor).step == 0
    assert Shard(one.pieces, one.tensor, {"step": 3}).step == 3


def test_a_step_is_not_elementwise_even_beside_a_single_element() -> None:
    one = shard(("c", 0, 1))
    assert sorted(elementwise(one)) == ["exp_avg", "exp_avg_sq"]
    assert next(slices_of([one])).scalars == {"step": 5.0}


def test_slices_are_views() -> None:
    one = shard(("a", 0, 7), ("d", 4, 20))
    parts = list(slices_of([one]))
    assert [(part.name, part.start, part.end) for part in parts] == [("a", 0, 7), ("d", 4, 20)]
    parts[1].tensors["exp_avg"].fill_(9.0)
    assert one.state["exp_avg"][7:].eq(9.0).all()
    assert one.state["exp_avg"][:7].equal(value_of("a", "exp_avg"))


def test_state_that_nobody_knows_of_is_an_error() -> None:
    """Left out, it would be lost with the first checkpoint; and without a count of steps nobody knows what was updated."""
    one = shard(("a", 0, 7))
    one.state["max_exp_avg_sq"] = torch.zeros(7)
    with pytest.raises(UserError, match="'adamw' keeps a state 'max_exp_avg_sq' that is in none of its `moments`"):
        list(slices_of([one]))
    del one.state["max_exp_avg_sq"], one.state["step"]
    with pytest.raises(UserError, match="'adamw' keeps no 'step'"):
        list(slices_of([one]))


def test_matching_layouts() -> None:
    old = [shard(("a", 0, 7), ("b", 0, 6)), shard(("d", 0, 30))]
    same = [shard(("d", 0, 30), filled=False), shard(("a", 0, 7), ("b", 0, 6), filled=False)]
    assert match_shards(old, same) == [(old[1], same[0]), (old[0], same[1])]
    thawed = [shard(("d", 0, 30), filled=False), shard(("c", 0, 1), filled=False)]
    assert match_shards(old, thawed) == [(old[1], thawed[0])], "a thawed part needs no partner"
    assert match_shards(old, [shard(("b", 0, 6), filled=False)]) is None, "b lay elsewhere"
    assert match_shards(old, [shard(("d", 0, 30), gap=2, filled=False)]) is None, "other padding"
    assert match_shards(old, [shard(("a", 0, 7), ("c", 0, 1), filled=False)]) is None, "a thawed range in a surviving shard"
    assert match_shards([], same) == []


def test_moving_copies_the_weights_and_hands_over_the_moments() -> None:
    old, new = shard(("a", 0, 7)), shard(("a", 0, 7), filled=False)
    moments = old.state["exp_avg"]
    move_shard(old, new)
    assert new.tensor.equal(value_of("a", MASTER))
    assert new.tensor.data_ptr() != old.tensor.data_ptr()
    assert new.state["exp_avg"] is moments
    assert new.step == 5


def test_writing_a_slice_touches_its_range_alone() -> None:
    target = shard(("a", 0, 7), ("d", 5, 25), filled=False, gap=1)
    part = Slice("d", 0, 10, {MASTER: torch.arange(10.0), "exp_avg": torch.arange(10.0) + 50}, {"step": 4.0})
    filling = Filling([target])
    assert filling.write(part) == 5
    assert target.tensor.tolist() == [-1.0] * 8 + [5, 6, 7, 8, 9] + [-1.0] * 16
    assert target.state["exp_avg"].tolist() == [0.0] * 8 + [55, 56, 57, 58, 59] + [0.0] * 16
    assert target.step == 4
    assert filling.write(Slice("b", 0, 12, {MASTER: torch.zeros(12)}, {})) == 0


def test_two_counts_of_steps_in_one_shard_are_refused() -> None:
    """A thawed part must not share a shard with a surviving one: Adam's bias correction has one step for both."""
    target = shard(("a", 0, 7), ("b", 0, 12), filled=False)
    filling = Filling([target])
    filling.write(Slice("a", 0, 7, {MASTER: torch.zeros(7)}, {"step": 4.0}))
    with pytest.raises(ValueError, match=r"'step' of b is 2\.0, but its group already has 4\.0"):
        filling.write(Slice("b", 0, 12, {MASTER: torch.zeros(12)}, {"step": 2.0}))


@given(layouts(SIZES), layouts(SIZES), st.integers(0, 3), st.integers(0, 3))
def test_any_layout_into_any_other(
    old: list[list[tuple[str, int, int]]], new: list[list[tuple[str, int, int]]], gap: int, other_gap: int
) -> None:
    source = [shard(*pieces, gap=gap) for pieces in old]
    target = [shard(*pieces, gap=other_gap, filled=False) for pieces in new]
    received = redistribute_alone(source, target)
    for name in SIZES:
        for key in (MASTER, "exp_avg", "exp_avg_sq"):
            assert whole(target, key, name).equal(value_of(name, key)), (name, key)
    assert {shard.step for shard in target} == {5}
    assert received == 0


def redistribute_alone(old: Sequence[Shard], new: Sequence[Shard]) -> int:
    return redistribute(old, new, device=CPU, distributed=False).received


def test_fewer_and_thawed_parameters() -> None:
    target = [shard(("b", 0, 12), filled=False), shard(("d", 0, 30), filled=False)]
    redistribute_alone([shard(("a", 0, 7), ("b", 0, 12))], target)
    assert target[0].tensor.equal(value_of("b", MASTER))
    assert target[0].step == 5
    assert target[1].state == {}, "a thawed part starts with no state"
    assert target[1].tensor.eq(-1.0).all(), "and keeps its weights"


def test_state_before_the_first_step_is_weights_alone() -> None:
    source = shard(("a", 0, 7), filled=False)
    source.tensor.copy_(value_of("a", MASTER))
    target = shard(("a", 0, 4), ("a", 4, 7), filled=False)
    redistribute_alone([source], [target])
    assert target.tensor.equal(value_of("a", MASTER))
    assert target.state == {}
