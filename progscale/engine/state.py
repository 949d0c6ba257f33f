"""Optimizer state as shards of flat ranges, and as slices: what moves from one engine to the next, and into a checkpoint.

Every engine shows what it steps as `Shard`s: a flat tensor, and which range of which parameter lies where in it.
Two ways to move:

* `move_shard`: the old and the new shard hold the same ranges in the same places on every rank, so each rank moves its own
  tensors; nothing is communicated and the moments are not even copied.
* `progscale.engine.moving`: anything else (another engine kind, world size or grouping). Ranges are sent parameter by parameter
  from a rank that has them to the ranks that lack them; no rank ever holds more than one foreign range.

Both are exact for state in full precision; `progscale.engine.filling` says what becomes of 8-bit codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from progscale.errors import UserError
from progscale.optimizers import BLOCK, AdamW, Optimizer

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
        optimizer: says what the entries of the state are.
    """

    pieces: tuple[Piece, ...]
    tensor: torch.Tensor
    state: dict[str, Any] = field(default_factory=dict)
    group: int = 0
    optimizer: Optimizer = field(default_factory=AdamW)

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
        """Bytes of the optimizer's own tensors (moments, their scales, steps), without weights and what all tensors share."""
        shared = {entry.table for entry in self.optimizer.blockwise.values()}
        tensors = (value for key, value in self.state.items() if isinstance(value, torch.Tensor) and key not in shared)
        return sum(value.numel() * value.element_size() for value in tensors)

    def is_quantized(self, key: str) -> bool:
        """Whether a moment of the state is kept as 8-bit codes."""
        return key in self.optimizer.blockwise and self.state[key].dtype == torch.uint8

    def scalars(self) -> dict[str, float]:
        """The state that is one number for the whole tensor ("step").

        Raises:
            UserError: the optimizer keeps a tensor that it does not say anything of, or does not count its steps.
        """
        known = {*self.optimizer.moments}
        known |= {name for entry in self.optimizer.blockwise.values() for name in (entry.scales, entry.table)}
        found = {}
        for key, value in self.state.items():
            if key not in known and isinstance(value, int | float | torch.Tensor):
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    raise UserError(
                        f"optimizer.name: '{self.optimizer.name}' keeps a state '{key}' that is in none of its `moments`, so it "
                        f"would be lost at the next stage; it must name all that it keeps"
                    )
                found[key] = float(value)
        if self.state and "step" not in found:
            raise UserError(
                f"optimizer.name: '{self.optimizer.name}' keeps no 'step' (the steps it has taken on a tensor), by which updated "
                f"parameters are counted"
            )
        return found


def elementwise(shard: Shard) -> list[str]:
    """State entries that hold one value for each element."""
    return [key for key in shard.optimizer.moments if key in shard.state]


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
class Scales:
    """The scales of a range of 8-bit codes: element i belongs to block `(phase + i) // BLOCK` of `values`.

    Attributes:
        values: float32, one for each block that the range touches.
        phase: how far into its block the first element lies.
    """

    values: torch.Tensor
    phase: int

    def cut(self, start: int, end: int) -> Scales:
        """Those of elements `start` to `end` of the range."""
        first = self.phase + start
        return Scales(self.values[first // BLOCK : blocks(self.phase + end)], first % BLOCK)


def blocks(elements: int) -> int:
    """Blocks that so many elements take, the first one at a block's start."""
    return -(-elements // BLOCK)


@dataclass(frozen=True)
class Slice:
    """A parameter range with its state: what moves between engines, and what a checkpoint stores.

    Attributes:
        name: of the parameter.
        start: first element of the flattened parameter.
        end: one past the last.
        tensors: flat tensors of `end - start` elements: "master" and the elementwise optimizer state.
        scalars: the state that is one number ("step").
        scales: of those tensors that are 8-bit codes.
    """

    name: str
    start: int
    end: int
    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, float]
    scales: Mapping[str, Scales] = field(default_factory=dict)

    def cut(self, first: int, last: int) -> Slice:
        """Its elements `first` to `last`, counted from its own start."""
        return Slice(
            self.name,
            self.start + first,
            self.start + last,
            {key: value[first:last] for key, value in self.tensors.items()},
            self.scalars,
            {key: scales.cut(first, last) for key, scales in self.scales.items()},
        )

    def all_tensors(self) -> Iterator[torch.Tensor]:
        """Its tensors and scales."""
        yield from self.tensors.values()
        yield from (scales.values for scales in self.scales.values())

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Slice:
        """The same with every tensor replaced, in the order of `all_tensors`."""
        tensors = {key: change(value) for key, value in self.tensors.items()}
        return replace(
            self,
            tensors=tensors,
            scales={key: Scales(change(scales.values), scales.phase) for key, scales in self.scales.items()},
        )


def slices_of(shards: Sequence[Shard]) -> Iterator[Slice]:
    """This rank's own state as slices: views, nothing is copied or communicated."""
    for shard in shards:
        scalars = shard.scalars()
        flat = {MASTER: shard.tensor.detach().reshape(-1)} | {key: shard.state[key].reshape(-1) for key in elementwise(shard)}
        scales = {
            key: Scales(shard.state[entry.scales], 0)
            for key, entry in shard.optimizer.blockwise.items()
            if key in shard.state and shard.is_quantized(key)
        }
        whole = Slice("", 0, shard.tensor.numel(), flat, scalars, scales)
        for piece in shard.pieces:
            part = whole.cut(piece.offset, piece.offset + piece.numel)
            yield replace(part, name=piece.name, start=piece.start, end=piece.end)


def deal(parts: Sequence[Slice], rank: int, world_size: int) -> Iterator[Slice]:
    """The share of a rank in slices that all ranks hold: equally many elements for each, cut where a share ends."""
    total, done = sum(part.end - part.start for part in parts), 0
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    for part in parts:
        size = part.end - part.start
        begin, end = max(first - done, 0), min(last - done, size)
        if begin < end:
            yield part.cut(begin, end)
        done += size
