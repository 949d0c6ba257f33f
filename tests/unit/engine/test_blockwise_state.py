"""State in 8 bits as flat ranges: bit for bit where a block holds what it held, quantised once where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progscale.engine.filling import Filling, dequantize
from progscale.engine.moving import redistribute
from progscale.engine.state import MASTER, Piece, Scales, Shard, Slice, deal, slices_of
from progscale.optimizers import BLOCK, OPTIMIZERS, AdamW, Optimizer, Request
from tests.harness.layouts import layouts

CPU = torch.device("cpu")
# Parameters that begin in the middle of blocks.
SIZES = {"a": 1000, "b": 4096, "c": 3, "d": 5000, "e": 300}
EIGHT_BIT = OPTIMIZERS.get("adamw_8bit").of(Request())
LION = OPTIMIZERS.get("lion_8bit").of(Request())


def shard(*pieces: tuple[str, int, int], gap: int = 0, optimizer: Optimizer = EIGHT_BIT) -> Shard:
    """A shard that has not stepped, of the given ranges with `gap` elements of padding behind each."""
    placed, offset = [], 0
    for name, start, end in pieces:
        placed.append(Piece(name, start, end, offset))
        offset += end - start + gap
    return Shard(tuple(placed), torch.zeros(offset), {}, 0, optimizer)


def step(one: Shard, steps: int = 3) -> Shard:
    """Steps of bitsandbytes' own optimizer; the gradient of padding is 0."""
    generator = torch.Generator().manual_seed(len(one.pieces))
    parameter = torch.nn.Parameter(one.tensor)
    optimizer: Any = one.optimizer._built([parameter])  # type: ignore[attr-defined]
    optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        for piece in one.pieces:
            # Neighbouring blocks of very different size: a mixed-up scale shows.
            size = 10.0 ** torch.randint(-4, 2, (piece.numel,), generator=generator)
            parameter.grad[piece.offset : piece.offset + piece.numel] = size * torch.randn(piece.numel, generator=generator)
        optimizer.step()
    return Shard(one.pieces, parameter.data, optimizer.state[parameter], 0, one.optimizer)


def values(shards: Sequence[Shard], key: str) -> dict[str, torch.Tensor]:
    """A moment of each parameter, dequantised and put together; NaN where nobody has it."""
    whole = {name: torch.full((size,), float("nan")) for name, size in SIZES.items()}
    for part in slices_of(shards):
        tensor, scales = part.tensors[key], part.scales.get(key)
        entry = EIGHT_BIT.blockwise[key]
        whole[part.name][part.start : part.end] = dequantize(tensor, scales, entry) if scales else tensor
    return whole


def moved(old: Sequence[Shard], new: Sequence[Shard]) -> int:
    return redistribute(old, new, device=CPU, distributed=False).requantized


WHOLE = [("a", 0, 1000), ("b", 0, 4096), ("c", 0, 3), ("d", 0, 5000)]


@pytest.mark.parametrize("optimizer", [EIGHT_BIT, LION], ids=lambda one: one.name)
@pytest.mark.parametrize("gap", [0, 7])
def test_the_same_layout_is_the_same_bits(optimizer: Optimizer, gap: int) -> None:
    """Also when the slices come cut and in another order, and with padding inside blocks."""
    old = step(shard(*WHOLE, gap=gap, optimizer=optimizer))
    new = shard(*WHOLE, gap=gap, optimizer=optimizer)
    parts = list(slices_of([old]))
    cut = [piece for rank in (2, 0, 1) for piece in deal(parts, rank, 3)][::-1]
    filling = Filling([new])
    assert sum(filling.write(part) for part in cut) == old.numel
    assert filling.finish() == 0
    for key, entry in optimizer.blockwise.items():
        assert torch.equal(new.state[entry.scales], old.state[entry.scales])
        for piece in old.pieces:
            span = slice(piece.offset, piece.offset + piece.numel)
            assert torch.equal(new.state[key][span], old.state[key][span])
        # Padding: on a CPU bitsandbytes gives a 0 some 2e-5 of the scale, which decides no block.
        before, after = (dequantize(one.state[key], Scales(one.state[entry.scales], 0), entry) for one in (old, new))
        assert ((before - after).abs() <= 3e-5 * old.state[entry.scales].repeat_interleave(BLOCK)[: len(before)]).all()
        assert new.state[entry.table].equal(old.state[entry.table])
    assert new.step == 3
    assert type(new.state["step"]) is int, "bitsandbytes counts in Python"
    assert set(new.state) == set(old.state)


def test_the_next_step_is_the_same_to_the_bit() -> None:
    old, new = step(shard(*WHOLE, gap=5)), shard(*WHOLE, gap=5)
    assert moved([old], [new]) == 0
    after = [step(one, 2) for one in (old, Shard(new.pieces, new.tensor, {}, 0, EIGHT_BIT))]
    assert not torch.equal(after[0].tensor, after[1].tensor), "the state decides"
    results = []
    for one in (old, new):
        parameter = torch.nn.Parameter(one.tensor.clone())
        optimizer: Any = EIGHT_BIT._built([parameter])  # type: ignore[attr-defined]
        optimizer.state[parameter].update({k: v.clone() if torch.is_tensor(v) else v for k, v in one.state.items()})
        optimizer.param_groups[0]["lr"] = 1e-3
        parameter.grad = torch.zeros_like(parameter)
        for piece in one.pieces:
            parameter.grad[piece.offset : piece.offset + piece.numel] = 0.01
        optimizer.step()
        results.append((parameter.data, optimizer.state[parameter]))
    (first, state), (second, other) = results
    for piece in old.pieces:
        span = slice(piece.offset, piece.offset + piece.numel)
        assert torch.equal(first[span], second[span])
        for key in EIGHT_BIT.moments:
            assert torch.equal(state[key][span], other[key][span])
    assert all(torch.equal(state[key], other[key]) for key in ("absmax1", "absmax2"))


@settings(max_examples=60, deadline=None)
@given(layouts(SIZES), layouts(SIZES), st.integers(0, 3), st.integers(0, 3))
def test_any_layout_into_any_other(
    old: list[list[tuple[str, int, int]]], new: list[list[tuple[str, int, int]]], gap: int, other_gap: int
) -> None:
    """Shards on both sides of the size from which there are 8 bits; every element within its new block's last code."""
    source = [step(shard(*pieces, gap=gap)) for pieces in old]
    target = [shard(*pieces, gap=other_gap) for pieces in new]
    moved(source, target)
    assert {one.step for one in target} == {3}
    for key in EIGHT_BIT.blockwise:
        before, after = values(source, key), values(target, key)
        for one in target:
            flat = torch.zeros(one.tensor.numel())
            for piece in one.pieces:
                flat[piece.offset : piece.offset + piece.numel] = before[piece.name][piece.start : piece.end]
            padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
            largest = padded.abs().amax(1).repeat_interleave(BLOCK)[: len(flat)]
            for piece in one.pieces:
                span = slice(piece.offset, piece.offset + piece.numel)
                got, wanted = after[piece.name][piece.start : piece.end], flat[span]
                assert not got.isnan().any()
                if not one.is_quantized(key):
                    assert torch.equal(got, wanted), "what was a code is written out exactly"
                # The largest step between two codes is 1/64 of the scale, signed or not; a rounding is half of it.
                assert ((got - wanted).abs() <= largest[span] / 64).all()
        assert all(one.is_quantized(key) == (one.tensor.numel() >= 4096) for one in target)


def test_only_mixed_blocks_are_quantised_anew() -> None:
    """Parameter d moves by whole blocks, and its blocks keep their bits; those of b begin elsewhere."""
    old = step(shard(("b", 0, 4096), ("d", 0, 5000)))
    new = shard(("d", 0, 5000), ("b", 0, 4096))
    # 5000 = 19 blocks and 136 elements. The last one of the 36 blocks holds the end of a single one of before.
    assert moved([old], [new]) == 2 * (35 - 19) * BLOCK
    for key, entry in EIGHT_BIT.blockwise.items():
        assert torch.equal(new.state[key][: 19 * BLOCK], old.state[key][4096 : 4096 + 19 * BLOCK])
        assert torch.equal(new.state[entry.scales][:19], old.state[entry.scales][16 : 16 + 19])


def test_full_precision_becomes_codes_and_back() -> None:
    """A smaller shard keeps float32; in a larger one the same elements are quantised."""
    small = [step(shard(("b", 0, 2000))), step(shard(("b", 2000, 4096)))]
    assert not any(one.is_quantized("state1") for one in small)
    large = shard(("b", 0, 4096))
    assert moved(small, [large]) == 2 * 4096
    assert large.is_quantized("state1")
    codes, scales = EIGHT_BIT.blockwise["state1"].quantize(torch.cat([one.state["state1"] for one in small]))
    assert torch.equal(large.state["state1"], codes)
    assert torch.equal(large.state["absmax1"], scales)
    again = [shard(("b", 0, 2000)), shard(("b", 2000, 4096))]
    assert moved([large], again) == 0, "a code's value fits into a float32"
    assert torch.equal(values(again, "state2")["b"], values([large], "state2")["b"])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("phase", [0, 1, 255])
def test_dequantised_as_bitsandbytes_does(signed: bool, phase: int) -> None:
    entry = EIGHT_BIT.blockwise["state1" if signed else "state2"]
    flat = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    flat = flat if signed else flat.square()
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(flat, entry.values(CPU), BLOCK)
    table = entry.values(CPU)
    wanted = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, table, BLOCK, torch.float32)
    assert torch.equal(dequantize(codes[phase:], Scales(scales, 0).cut(phase, 3000), entry), wanted[phase:])
    assert table[entry.code_of_zero()] == 0


@pytest.mark.parametrize("signed", [True, False])
def test_quantised_to_the_nearest_code(signed: bool) -> None:
    """Zeros too, also in a block of nothing else; a code is its own nearest."""
    entry = EIGHT_BIT.blockwise["state1" if signed else "state2"]
    flat = torch.randn(20 * BLOCK, generator=torch.Generator().manual_seed(0)).view(20, BLOCK) ** (1 if signed else 2)
    flat[3] = 0
    flat[:, ::3] = 0
    codes, scales = entry.quantize(flat.view(-1))
    table = entry.values(CPU)
    assert torch.equal(scales, flat.abs().amax(1))
    gap = (flat / scales.clamp(min=1e-30)[:, None]).unsqueeze(-1).sub(table).abs()
    chosen = gap.gather(-1, codes.view(20, BLOCK, 1).long()).squeeze(-1)
    assert ((chosen - gap.amin(-1)).abs() < 1e-7).all()
    back = dequantize(codes, Scales(scales, 0), entry).view(20, BLOCK)
    assert back[flat == 0].eq(0).all()


def test_cutting_scales() -> None:
    scales = Scales(torch.arange(5.0), 200)  # elements 0-55, 56-311, 312-567, …
    for start, end, first, last, phase in [(0, 1, 0, 0, 200), (56, 57, 1, 1, 0), (55, 57, 0, 1, 255), (311, 313, 1, 2, 255)]:
        cut = scales.cut(start, end)
        assert (cut.values.tolist(), cut.phase) == (list(map(float, range(first, last + 1))), phase)
    assert scales.cut(10, 10).values.numel() <= 1


def test_bytes_of_the_state() -> None:
    """The table that all tensors share is no part of a shard."""
    one = step(shard(("b", 0, 4096), ("d", 0, 5000)))
    numel = 4096 + 5000
    assert one.state_bytes() == 2 * numel + 2 * 4 * 36 == sum(EIGHT_BIT.moment_bytes(numel))
    assert step(shard(("a", 0, 1000))).state_bytes() == 8000 == sum(EIGHT_BIT.moment_bytes(1000))


def test_state_of_another_optimizer_is_refused() -> None:
    (part,) = slices_of([step(shard(("b", 0, 4096)))])
    with pytest.raises(ValueError, match="'state1' of b is no state of the optimizer adamw"):
        Filling([shard(("b", 0, 4096), optimizer=AdamW())]).write(part)
    lion = Slice("b", 0, 4096, {MASTER: torch.zeros(4096), "state1": torch.zeros(4096)}, {"step": 2.0})
    target = shard(("b", 0, 4096), optimizer=OPTIMIZERS.get("lion").of(Request()))
    assert Filling([target]).write(lion) == 4096
    with pytest.raises(ValueError, match="'state1' has 8-bit codes, which are no state of the optimizer lion"):
        Filling([shard(("b", 0, 4096), optimizer=OPTIMIZERS.get("lion").of(Request()))]).write(
            Slice("b", 0, 4096, {"state1": part.tensors["state1"]}, {"step": 2.0}, {"state1": part.scales["state1"]})
        )
