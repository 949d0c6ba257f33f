"""State in 8 bits on the disk: codes and scales stay together however they are cut, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from progscale.checkpoint.reader import check_cover, index, open_checkpoint, verify
from progscale.checkpoint.shards import index_shard, open_shard, shards_of, slice_bytes, write_shard
from progscale.engine.state import MASTER, Scales, Slice, blocks
from progscale.errors import RejectedError
from tests.harness.small import PARAMETERS, SHARD, publish, seal

NAME = "rank00000-00000.safetensors"


def part(size: int, phase: int, start: int = 0, name: str = "a") -> Slice:
    """A range of codes whose first one lies `phase` into its block."""
    generator = torch.Generator().manual_seed(size)
    codes = {key: torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for key in ("state1", "state2")}
    scales = {key: Scales(torch.rand(blocks(phase + size), generator=generator), phase) for key in codes}
    tensors = {MASTER: torch.rand(size, generator=generator), **codes}
    return Slice(name, start, start + size, tensors, {"step": 3.0}, scales)


def by_element(one: Slice, key: str) -> torch.Tensor:
    """The scale of each element."""
    scales = one.scales[key]
    return scales.values.repeat_interleave(256)[scales.phase : scales.phase + one.end - one.start]


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 3000), phase=st.integers(0, 255), limit=st.integers(30, 20_000), data=st.data())
def test_any_cut(tmp_path_factory: pytest.TempPathFactory, size: int, phase: int, limit: int, data: st.DataObject) -> None:
    """Files no larger than they may be; read back in any ranges, each element has its code and its scale."""
    folder = tmp_path_factory.mktemp("cut")
    one, found = part(size, phase, start=7), []
    for number, shard in enumerate(shards_of([one], limit)):
        assert shard.bytes <= limit or len(next(iter(shard.tensors.values()))) == 1
        name = f"rank00000-{number:05d}.safetensors"
        write_shard(folder / name, shard.tensors, shard.metadata())
        found += index_shard(folder, name)
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    read = []
    for stored in found:
        begin, end = max(stored.start, 7 + first), min(stored.end, 7 + last)
        if begin < end:
            with open_shard(stored.path) as file:
                read.append(stored.cut(file, begin, end))
    wanted = one.cut(first, last)
    for key in ("state1", "state2"):
        assert torch.equal(torch.cat([piece.tensors[key] for piece in read]), wanted.tensors[key])
        assert torch.equal(torch.cat([by_element(piece, key) for piece in read]), by_element(wanted, key))
        assert all(len(piece.scales[key].values) == blocks(piece.scales[key].phase + piece.end - piece.start) for piece in read)
    assert all(piece.scalars == {"step": 3.0} for piece in read)


def test_neighbours_that_share_a_block(tmp_path: Path) -> None:
    """Two parameters whose scales are the same memory."""
    whole = part(600, 0)
    first, second = whole.cut(0, 300), whole.cut(300, 600)
    second = Slice("b", 0, 300, second.tensors, second.scalars, second.scales)
    assert first.scales["state1"].values[-1:].data_ptr() == second.scales["state1"].values.data_ptr()
    (shard,) = shards_of([first, second], 10**6)
    write_shard(tmp_path / NAME, shard.tensors, shard.metadata())
    assert {stored.name: stored.scales["state2"][1] for stored in index_shard(tmp_path, NAME)} == {"a": 0, "b": 44}
    assert shard.bytes == slice_bytes(first) + slice_bytes(second) == 600 * 6 + 4 * 2 * (2 + 2)


# -- what is refused ----------------------------------------------------------------------------------------------------


def checkpoint_of(root: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A checkpoint in 8 bits, changed, under a manifest that fits."""
    path = publish(root, 1)
    tensors = load_file(path / SHARD)
    name = next(key.split("/", 2)[2] for key in tensors)
    size = PARAMETERS[name]
    (weight,) = [key for key in tensors if key.startswith("weight/") and key.endswith(name)]
    start, count = int(weight.split("/")[1]), tensors[weight].numel()
    assert (start, count) == (0, size)
    tensors[f"state1/0/{name}"] = torch.zeros(size, dtype=torch.uint8)
    tensors[f"scales:0:state1/0/{name}"] = torch.ones(1)
    change(tensors)
    save_file(tensors, path / SHARD, metadata={"scalars": "{}"})
    seal(path, 1)
    return path


def key_of(tensors: dict[str, torch.Tensor], kind: str) -> str:
    return next(key for key in tensors if key.startswith(f"{kind}/"))


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = key_of(tensors, old)
        tensors[key.replace(old, new, 1)] = tensors.pop(key)

    return change


def replaced(kind: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key_of(tensors, kind)] = value

    return change


SCALE = "scales:0:state1"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a NaN": (replaced(SCALE, torch.tensor([float("nan")])), "negative or not finite"),
    "an infinity": (replaced(SCALE, torch.tensor([float("inf")])), "negative or not finite"),
    "a negative one": (replaced(SCALE, torch.tensor([-1.0])), "negative or not finite"),
    "none": (lambda tensors: tensors.pop(key_of(tensors, SCALE)) and None, "codes without scales"),
    "one too many": (replaced(SCALE, torch.ones(2)), "do not fit its codes"),
    "of another type": (replaced(SCALE, torch.ones(1, dtype=torch.float64)), "do not fit its codes"),
    "a phase beyond a block": (renamed(SCALE, "scales:256:state1"), "do not fit its codes"),
    "a negative phase": (renamed(SCALE, "scales:-1:state1"), "do not fit its codes"),
    "no phase": (renamed(SCALE, "scales:x:state1"), "ValueError"),
    "nothing but a name": (renamed(SCALE, "scales:"), "ValueError"),
    "of no codes": (renamed(SCALE, "scales:0:state2"), "scales without codes"),
    "of what is no code": (renamed("state1", "state3"), "scales without codes"),
    "beside float32": (lambda tensors: tensors.update({key_of(tensors, "state1"): torch.zeros(24)}), "scales without codes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_scales_that_do_not_fit(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    path = checkpoint_of(tmp_path, change)
    with pytest.raises(RejectedError, match=rf"{SHARD} is damaged: .*{message}"):
        verify(open_checkpoint(path))


def test_the_same_without_damage(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, lambda tensors: None)
    verify(open_checkpoint(path))


def test_a_part_of_the_codes_is_missing(tmp_path: Path) -> None:
    """Codes are counted as other state is, in full precision here and in 8 bits there."""

    def shorten(tensors: dict[str, Any]) -> None:
        key = key_of(tensors, "state1")
        name = key.split("/", 2)[2]
        del tensors[key], tensors[key_of(tensors, SCALE)]
        tensors[f"state1/0/{name}"] = torch.zeros(4)
        weight = tensors.pop(f"weight/0/{name}")
        tensors[f"weight/0/{name}"], tensors[f"weight/4/{name}"] = weight[:4].clone(), weight[4:].clone()

    checkpoint = open_checkpoint(checkpoint_of(tmp_path, shorten))
    with pytest.raises(RejectedError, match=r"state1 of .* has not each of its .* elements once"):
        check_cover(checkpoint, index(checkpoint))
