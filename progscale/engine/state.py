"""Optimizer state as shards of flat ranges, and how it moves from one engine to the next.

Every engine shows what it steps as `Shard`s: a flat tensor, and which range of which parameter lies where in it.
Two ways to move (both are exact):

* `move_shard`: the old and the new shard hold the same ranges in the same places on every rank, so each rank moves its own
  tensors; nothing is communicated and the moments are not even copied.
* `redistribute`: anything else (another engine kind, world size or grouping). Ranges are sent parameter by parameter from a
  rank that has them to the ranks that lack them; no rank ever holds more than one foreign range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

MASTER = "master"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `end` of the flattened parameter `name`, at `offset` of a shard's flat tensor."""

    name: str
    start: int
    end: int
    offset: int

    @property
    def numel(self) -> int:
        """Elements of the piece."""
        return self.end - self.start


@dataclass
class Shard:
    """One tensor that an optimizer steps, on this rank.

    Attributes:
        pieces: which parameter ranges lie in it; what no piece covers is padding.
        tensor: the weights that the optimizer steps: fp32 masters under mixed precision, else the parameter itself.
        state: the optimizer's own dict for the tensor ("exp_avg", "exp_avg_sq", "step"); empty before the first step.
        group: index of the param group.
    """

    pieces: tuple[Piece, ...]
    tensor: torch.Tensor
    state: dict[str, Any] = field(default_factory=dict)
    group: int = 0

    @property
    def numel(self) -> int:
        """Elements that belong to parameters (without padding)."""
        return sum(piece.numel for piece in self.pieces)

    @property
    def step(self) -> int:
        """Steps the optimizer has taken on the tensor."""
        step = self.state.get("step", 0)
        return int(step.item() if isinstance(step, torch.Tensor) else step)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's own tensors (moments), without the weights."""
        return sum(value.numel() * value.element_size() for value in self.state.values() if isinstance(value, torch.Tensor))


def elementwise(shard: Shard) -> list[str]:
    """State entries that hold one value for each element."""
    return [
        key
        for key, value in shard.state.items()
        if isinstance(value, torch.Tensor) and value.numel() == shard.tensor.numel() and value.dim() > 0
    ]


def match_shards(old: Sequence[Shard], new: Sequence[Shard]) -> list[tuple[Shard, Shard]] | None:
    """Pairs of old and new shards with the same layout; None when a surviving range lies elsewhere than before.

    A new shard of which no range had state before (a thawed part) needs no partner: it starts with none.
    """
    by_layout = {(shard.pieces, shard.tensor.numel()): shard for shard in old}
    names = {piece.name for shard in old for piece in shard.pieces}
    pairs = []
    for shard in new:
        source = by_layout.get((shard.pieces, shard.tensor.numel()))
        if source is not None:
            pairs.append((source, shard))
        elif any(piece.name in names for piece in shard.pieces):
            return None
    return pairs


def move_shard(old: Shard, new: Shard) -> None:
    """Moves a shard's state on this rank: the weights are copied (a new engine remade its masters), the moments change hands."""
    if old.tensor.data_ptr() != new.tensor.data_ptr():
        new.tensor.data.copy_(old.tensor.data)
    new.state.update(old.state)


@dataclass(frozen=True)
class Slice:
    """A parameter range with its state: what moves between engines, and what a checkpoint stores.

    Attributes:
        name: of the parameter.
        start: first element of the flattened parameter.
        end: one past the last.
        tensors: flat tensors of `end - start` elements: "master" and the elementwise optimizer state.
        scalars: the state that is one number ("step").
    """

    name: str
    start: int
    end: int
    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, float]


def slices_of(shards: Sequence[Shard]) -> Iterator[Slice]:
    """This rank's own state as slices: views, nothing is copied or communicated."""
    for shard in shards:
        keys = elementwise(shard)
        scalars = {
            key: float(value.item() if isinstance(value, torch.Tensor) else value)
            for key, value in shard.state.items()
            if key not in keys and isinstance(value, int | float | torch.Tensor)
        }
        flat = {MASTER: shard.tensor.detach().reshape(-1)} | {key: shard.state[key].reshape(-1) for key in keys}
        for piece in shard.pieces:
            span = slice(piece.offset, piece.offset + piece.numel)
            yield Slice(piece.name, piece.start, piece.end, {key: value[span] for key, value in flat.items()}, scalars)


def deal(parts: Sequence[Slice], rank: int, world_size: int) -> Iterator[Slice]:
    """The share of a rank in slices that all ranks hold: equally many elements for each, cut where a share ends."""
    total, done = sum(part.end - part.start for part in parts), 0
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    for part in parts:
        size = part.end - part.start
        begin, end = max(first - done, 0), min(last - done, size)
        if begin < end:
            tensors = {key: value[begin:end] for key, value in part.tensors.items()}
            yield Slice(part.name, part.start + begin, part.start + end, tensors, part.scalars)
        done += size


def write_slice(shards: Sequence[Shard], part: Slice) -> int:
    """Copies `part` into whatever it overlaps of `shards`; returns the number of elements written."""
    written = 0
    for shard in shards:
        for piece in shard.pieces:
            start, end = max(piece.start, part.start), min(piece.end, part.end)
            if piece.name != part.name or start >= end:
                continue
            _ensure_state(shard, part)
            target = slice(piece.offset + start - piece.start, piece.offset + end - piece.start)
            source = slice(start - part.start, end - part.start)
            for key, value in part.tensors.items():
                flat = shard.tensor.data if key == MASTER else shard.state[key]
                flat.view(-1)[target].copy_(value[source])
            written += end - start
    return written


def _ensure_state(shard: Shard, part: Slice) -> None:
    for key in part.tensors:
        if key != MASTER and key not in shard.state:
            shard.state[key] = torch.zeros_like(shard.tensor, memory_format=torch.preserve_format)
    for key, value in part.scalars.items():
        # Torch's AdamW keeps its step as a float32 tensor; where it lies matters to the fused kernel only.
        if key not in shard.state:
            shard.state[key] = torch.tensor(value, dtype=torch.float32, device=shard.tensor.device)
        elif float(shard.state[key]) != value:
            raise ValueError(f"'{key}' of {part.name} is {value}, but its group already has {float(shard.state[key])}")


@dataclass(frozen=True)
class Header:
    """What the other ranks must know of a slice before they can receive it."""

    name: str
    start: int
    end: int
    dtypes: tuple[tuple[str, torch.dtype], ...]
    scalars: tuple[tuple[str, float], ...]


def redistribute(old: Sequence[Shard], new: Sequence[Shard], *, device: torch.device, distributed: bool) -> int:
    """Carries the state of `old` into `new`, whatever their layouts. A collective: every rank must call it.

    Args:
        old: this rank's shards of the engine that ends.
        new: this rank's shards of the engine that begins.
        device: where the process group can send from (the GPU under NCCL).
        distributed: whether there are other ranks.

    Returns:
        Elements received from other ranks, on this rank.
    """
    own = list(slices_of(old))
    have = [
        Header(
            part.name,
            part.start,
            part.end,
            tuple((key, value.dtype) for key, value in part.tensors.items()),
            tuple(part.scalars.items()),
        )
        for part in own
    ]
    want = [(piece.name, piece.start, piece.end) for shard in new for piece in shard.pieces]
    everyone = [(have, want)]
    if distributed:
        everyone = [([], [])] * dist.get_world_size()
        dist.all_gather_object(everyone, (have, want))
    known = {header.name for headers, _ in everyone for header in headers}
    if not distributed or all(_covers(headers, wanted, known) for headers, wanted in everyone):
        for part in own:
            write_slice(new, part)
        return 0
    return _send(own, new, [headers for headers, _ in everyone], device)


def _covers(have: Sequence[Header], want: Sequence[tuple[str, int, int]], known: set[str]) -> bool:
    """Whether a rank has all it wants itself; what nobody has (a thawed part) does not count."""
    by_name: dict[str, list[Header]] = {}
    for header in have:
        by_name.setdefault(header.name, []).append(header)
    return all(
        any(header.start <= start and end <= header.end for header in by_name.get(name, ()))
        for name, start, end in want
        if name in known
    )


def _send(own: Sequence[Slice], new: Sequence[Shard], have: Sequence[Sequence[Header]], device: torch.device) -> int:
    rank, received = dist.get_rank(), 0
    index = {(part.name, part.start, part.end): part for part in own}
    sent: set[tuple[str, int, int]] = set()
    # Every rank walks the same list in the same order, so the broadcasts match.
    for owner, headers in enumerate(have):
        for header in headers:
            key = (header.name, header.start, header.end)
            if key in sent:  # a replicated range (plain, DDP) is sent by one rank only
                continue
            sent.add(key)
            tensors = {}
            for name, dtype in header.dtypes:
                if rank == owner:
                    buffer = index[key].tensors[name].to(device).contiguous()
                else:
                    buffer = torch.empty(header.end - header.start, dtype=dtype, device=device)
                dist.broadcast(buffer, src=owner)
                tensors[name] = buffer
            written = write_slice(new, Slice(*key, tensors, dict(header.scalars)))
            received += written if rank != owner else 0
    return received
