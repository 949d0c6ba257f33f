"""State from one engine's shards to another's, whatever their layouts: what a rank lacks is sent to it range by range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from progscale.engine.filling import Filling
from progscale.engine.state import Scales, Shard, Slice, blocks, slices_of


@dataclass(frozen=True)
class Header:
    """What the other ranks must know of a slice before they can receive it."""

    name: str
    start: int
    end: int
    dtypes: tuple[tuple[str, torch.dtype], ...]
    scalars: tuple[tuple[str, float], ...]
    phases: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Carried:
    """What `redistribute` did on this rank.

    Attributes:
        received: elements that came from other ranks.
        requantized: values of moments in 8 bits that were quantised anew.
    """

    received: int
    requantized: int


def redistribute(old: Sequence[Shard], new: Sequence[Shard], *, device: torch.device, distributed: bool) -> Carried:
    """Carries the state of `old` into `new`, whatever their layouts. A collective: every rank must call it.

    Args:
        old: this rank's shards of the engine that ends.
        new: this rank's shards of the engine that begins.
        device: where the process group can send from (the GPU under NCCL).
        distributed: whether there are other ranks.
    """
    own, filling = list(slices_of(old)), Filling(new)
    have = [
        Header(
            part.name,
            part.start,
            part.end,
            tuple((key, value.dtype) for key, value in part.tensors.items()),
            tuple(part.scalars.items()),
            tuple((key, scales.phase) for key, scales in part.scales.items()),
        )
        for part in own
    ]
    want = [(piece.name, piece.start, piece.end) for shard in new for piece in shard.pieces]
    everyone = [(have, want)]
    if distributed:
        everyone = [([], [])] * dist.get_world_size()
        dist.all_gather_object(everyone, (have, want))
    known = {header.name for headers, _ in everyone for header in headers}
    received = 0
    if not distributed or all(_covers(headers, wanted, known) for headers, wanted in everyone):
        for part in own:
            filling.write(part)
    else:
        received = _send(own, filling, [headers for headers, _ in everyone], device)
    return Carried(received, filling.finish())


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


def _send(own: Sequence[Slice], filling: Filling, have: Sequence[Sequence[Header]], device: torch.device) -> int:
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
            part = index[key].map(lambda tensor: tensor.to(device).contiguous()) if rank == owner else _room(header, device)
            for tensor in part.all_tensors():
                dist.broadcast(tensor, src=owner)
            written = filling.write(part)
            received += written if rank != owner else 0
    return received


def _room(header: Header, device: torch.device) -> Slice:
    """A slice to receive into."""
    numel = header.end - header.start
    tensors = {name: torch.empty(numel, dtype=dtype, device=device) for name, dtype in header.dtypes}
    scales = {
        name: Scales(torch.empty(blocks(phase + numel), dtype=torch.float32, device=device), phase)
        for name, phase in header.phases
    }
    return Slice(header.name, header.start, header.end, tensors, dict(header.scalars), scales)
