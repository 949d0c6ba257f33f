"""Slices into shards: where their layouts differ, blocks of 8-bit codes are quantised anew.

Codes of 8 bits share a scale with their block of the flat tensor, and blocks begin elsewhere in another layout: a block whose
elements come with different scales is put together in float32 and quantised once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from progscale.engine.state import MASTER, Piece, Scales, Shard, Slice, blocks
from progscale.optimizers import BLOCK, Blockwise

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
