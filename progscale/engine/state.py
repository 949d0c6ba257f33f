"""Optimizer state as shards of flat ranges, and how it moves from one engine to the next.

Every engine shows what it steps as `Shard`s: a flat tensor, and which range of which parameter lies where in it.
Two ways to move:

* `move_shard`: the old and the new shard hold the same ranges in the same places on every rank, so each rank moves its own
  tensors; nothing is communicated and the moments are not even copied.
* `redistribute`: anything else (another engine kind, world size or grouping). Ranges are sent parameter by parameter from a
  rank that has them to the ranks that lack them; no rank ever holds more than one foreign range.

Both are exact for state in full precision. Codes of 8 bits share a scale with their block of the flat tensor, and blocks begin
elsewhere in another layout: a block whose elements come with different scales is quantised anew (`Filling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from progscale.optimizers import BLOCK, AdamW, Blockwise, Optimizer

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
            TypeError: the optimizer keeps a tensor that it does not say anything of.
        """
        known = {*self.optimizer.moments}
        known |= {name for entry in self.optimizer.blockwise.values() for name in (entry.scales, entry.table)}
        found = {}
        for key, value in self.state.items():
            if key not in known and isinstance(value, int | float | torch.Tensor):
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    raise TypeError(f"the state '{key}' of the optimizer {self.optimizer.name} is in none of its `moments`")
                found[key] = float(value)
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


# Elements that are dequantised at once; beside them a shard's own memory is all that is needed.
_CHUNK = 2**20


def dequantize(codes: torch.Tensor, scales: Scales, entry: Blockwise) -> torch.Tensor:
    """Float32 values of flat codes."""
    found = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    table = entry.values(codes.device)
    for begin in range(0, codes.numel(), _CHUNK):
        end = min(begin + _CHUNK, codes.numel())
        part = scales.cut(begin, end)
        by_element = part.values.repeat_interleave(BLOCK)[part.phase : part.phase + end - begin]
        torch.mul(table[codes[begin:end].int()], by_element, out=found[begin:end])
    return found


class _Blocks:
    """A moment in 8 bits while it is filled.

    A block whose elements all come with one scale keeps codes and scale bit for bit. Any other one is put together in float32
    and quantised once, when all of it is there.

    Args:
        state: of the shard; its codes and scales are written.
        key: of the moment.
        entry: what its codes mean.
    """

    def __init__(self, state: dict[str, Any], key: str, entry: Blockwise) -> None:
        self.codes: torch.Tensor = state[key].view(-1)
        self.scales: torch.Tensor = state[entry.scales]
        self._entry = entry
        # What no slice covers is padding, and must stay 0 in a block whose scale is not.
        self.codes.fill_(entry.code_of_zero())
        # Paged codes count as memory of the CPU, while their scales are on the GPU.
        self._low = torch.full(self.scales.shape, float("inf"), device=self.codes.device)
        self._high = torch.full(self.scales.shape, -float("inf"), device=self.codes.device)
        self._values: torch.Tensor | None = None
        self.written = 0

    def write(self, target: slice, source: torch.Tensor, scales: Scales | None) -> None:
        """Fills a range with codes and their scales, or with float32 values."""
        numel = source.numel()
        first, last = target.start // BLOCK, blocks(target.stop)
        before = self._low[first:last].clone()
        was_mixed = self._low[first:last] != self._high[first:last]
        seen = before.isfinite()
        if scales is None:
            self._low[first:last], self._high[first:last] = -float("inf"), float("inf")
        else:
            # Between two borders, of the source's blocks or of the target's, all elements have one scale and one block.
            borders = [torch.arange(0, numel + phase, BLOCK) - phase for phase in (scales.phase, target.start % BLOCK)]
            begins = torch.cat(borders).clamp(min=0).unique().to(self.codes.device)
            block = (target.start + begins) // BLOCK
            scale = scales.values[(scales.phase + begins) // BLOCK]
            self._low.scatter_reduce_(0, block, scale, "amin")
            self._high.scatter_reduce_(0, block, scale, "amax")
        mixed = self._low[first:last] != self._high[first:last]
        if mixed.any():
            if self._values is None:
                self._values = torch.zeros(len(self.scales) * BLOCK, dtype=torch.float32, device=self.codes.device)
            # What was written of these blocks until now had one scale.
            for index in (mixed & seen & ~was_mixed).nonzero().view(-1).tolist():
                span = slice((first + index) * BLOCK, min((first + index + 1) * BLOCK, len(self.codes)))
                self._values[span] = dequantize(self.codes[span], Scales(before[index : index + 1], 0), self._entry)
            self._values[target] = source if scales is None else dequantize(source, scales, self._entry)
        if scales is not None:
            self.codes[target].copy_(source)
        self.written += numel

    def finish(self) -> int:
        """Quantises what must be; returns the number of elements."""
        found = torch.where(self._low == self._high, self._low, 0.0)
        mixed = (self._low != self._high) & self._high.gt(-float("inf"))
        if self._values is not None:
            values, self._values = self._values.view(-1, BLOCK)[mixed], None
            codes, found[mixed] = self._entry.quantize(values.view(-1))
            padded = torch.empty(len(mixed) * BLOCK, dtype=torch.uint8, device=codes.device)
            padded[: len(self.codes)] = self.codes
            padded.view(-1, BLOCK)[mixed] = codes.view(-1, BLOCK)
            self.codes.copy_(padded[: len(self.codes)])
        self.scales.copy_(found)
        return min(int(mixed.sum()) * BLOCK, len(self.codes))


class Filling:
    """Fills shards from slices that come in any order; `finish` ends it.

    Args:
        shards: of an engine that has not stepped yet.

    Attributes:
        requantized: values of moments that were given other 8-bit codes, because their block holds others than before.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._places: dict[str, list[tuple[Piece, Shard]]] = {}
        for shard in shards:
            for piece in shard.pieces:
                self._places.setdefault(piece.name, []).append((piece, shard))
        self._quantized: dict[tuple[int, str], _Blocks] = {}
        self.requantized = 0

    def wanted(self, name: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a parameter's range that lie in the shards."""
        for piece, _ in self._places.get(name, ()):
            first, last = max(piece.start, start), min(piece.end, end)
            if first < last:
                yield first, last

    def write(self, part: Slice) -> int:
        """Copies `part` into whatever it overlaps; returns the number of elements written.

        Raises:
            ValueError: the optimizer keeps no such state, or another number for the same shard.
        """
        written = 0
        for piece, shard in self._places.get(part.name, ()):
            first, last = max(piece.start, part.start), min(piece.end, part.end)
            if first >= last:
                continue
            overlap = part.cut(first - part.start, last - part.start)
            target = slice(piece.offset + first - piece.start, piece.offset + last - piece.start)
            self._start(shard, part)
            for key, value in overlap.tensors.items():
                if key == MASTER:
                    shard.tensor.data.view(-1)[target].copy_(value)
                else:
                    self._write_moment(shard, key, target, value, overlap.scales.get(key))
            written += last - first
        return written

    def _start(self, shard: Shard, part: Slice) -> None:
        """Gives a shard that has none the state that the slice's comes into."""
        for key in part.tensors:
            if key != MASTER and key not in shard.optimizer.moments:
                raise ValueError(f"'{key}' of {part.name} is no state of the optimizer {shard.optimizer.name}")
        if not shard.state and (part.scalars or len(part.tensors) > 1):
            shard.state.update(shard.optimizer.start(shard.tensor))
            for key in shard.optimizer.moments:
                if shard.is_quantized(key):
                    self._quantized[id(shard), key] = _Blocks(shard.state, key, shard.optimizer.blockwise[key])
            for key, number in part.scalars.items():
                _set_number(shard.state, key, number)
        for key, number in part.scalars.items():
            if float(shard.state.get(key, float("nan"))) != number:
                found = float(shard.state[key]) if key in shard.state else "none"
                raise ValueError(f"'{key}' of {part.name} is {number}, but its group already has {found}")

    def _write_moment(self, shard: Shard, key: str, target: slice, source: torch.Tensor, scales: Scales | None) -> None:
        entry, device = shard.optimizer.blockwise.get(key), shard.state[key].device
        if scales is not None and entry is None:
            raise ValueError(f"'{key}' has 8-bit codes, which are no state of the optimizer {shard.optimizer.name}")
        if not shard.is_quantized(key):
            if scales is not None and entry is not None:
                source = dequantize(source, scales, entry)
            shard.state[key].view(-1)[target].copy_(source)
            return
        filled = self._quantized[id(shard), key]
        filled.write(target, source.to(device), None if scales is None else Scales(scales.values.to(device), scales.phase))
        # As soon as it is whole: its float32 values need not wait for the other shards.
        if filled.written == shard.numel:
            self.requantized += self._quantized.pop((id(shard), key)).finish()

    def finish(self) -> int:
        """Ends what was not filled to its end; returns `requantized`."""
        while self._quantized:
            self.requantized += self._quantized.popitem()[1].finish()
        return self.requantized


def _set_number(state: dict[str, Any], key: str, number: float) -> None:
    """Gives an entry its value in the kind of number that the optimizer keeps."""
    old = state.get(key)
    if isinstance(old, torch.Tensor):
        old.fill_(number)
    else:
        state[key] = type(old)(number) if isinstance(old, int | float) else number


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
