"""One split's rows in memory: for each a depth and the hidden states there, without padding."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
import xxhash

from progscale.cache.memory import Memory
from progscale.tasks.ragged import offsets_of

CPU = torch.device("cpu")
# Beside each row: what it holds, and a hash that a torn write does not match.
MARK = np.dtype([("depth", "<i4"), ("spare", "<i4"), ("hash", "<u8")])


class RowStore:
    """Hidden states of the rows of a split, shape `(length, width)` each, in one flat memory.

    Args:
        memory: of `size_of` bytes.
        lengths: tokens of each row, shape `(rows,)`.
        width: of the hidden states.
        dtype: in which they are kept.
        hashed: keep a hash of each row, by which `verify` finds what was written in whole.
    """

    def __init__(self, memory: Memory, lengths: np.ndarray, width: int, dtype: torch.dtype, *, hashed: bool) -> None:
        self.memory = memory
        self.width = width
        self.dtype = dtype
        self.hashed = hashed
        self._offsets = offsets_of(np.asarray(lengths, dtype=np.int64))
        rows = len(lengths)
        self._first = rows * MARK.itemsize
        self._marks = memory.bytes[: self._first].numpy().view(MARK)
        count = int(self._offsets[-1]) * width
        self._values = memory.bytes[self._first : self._first + count * dtype.itemsize].view(dtype).view(-1, width)

    @staticmethod
    def size_of(lengths: np.ndarray, width: int, dtype: torch.dtype) -> int:
        """Bytes for the rows of these lengths."""
        return len(lengths) * MARK.itemsize + int(np.sum(lengths)) * width * dtype.itemsize

    def write(self, rows: Sequence[int], depth: int, hidden: torch.Tensor) -> None:
        """Keeps the rows' hidden states at a depth, in place of what was there.

        Args:
            rows: row numbers.
            depth: blocks below.
            hidden: on the CPU, shape `(rows, longest or more, width)`.
        """
        for position, row in enumerate(rows):
            start, end = int(self._offsets[row]), int(self._offsets[row + 1])
            mark = self._marks[row]
            mark["depth"] = 0  # whoever is killed in between leaves a row that is not there
            self._values[start:end] = hidden[position, : end - start]
            if self.hashed:
                mark["hash"] = self._hash(row, depth)
            mark["depth"] = depth

    def read(self, rows: Sequence[int], length: int, device: torch.device = CPU) -> torch.Tensor:
        """The rows' hidden states, with zeros up to `length`; shape `(rows, length, width)`.

        Args:
            rows: row numbers.
            length: of the longest, or more.
            device: to put them on. A GPU fetches them by itself from page-locked memory, else from a page-locked copy, and is not
                waited for.
        """
        on_gpu, direct = device.type == "cuda", device.type == "cuda" and self.memory.pinned
        where = {"device": device} if direct else {"pin_memory": on_gpu}
        out = torch.zeros(len(rows), length, self.width, dtype=self.dtype, **where)
        for position, row in enumerate(rows):
            start, end = int(self._offsets[row]), int(self._offsets[row + 1])
            out[position, : end - start].copy_(self._values[start:end], non_blocking=direct)
        found: torch.Tensor = out.to(device, non_blocking=True)
        return found

    def will_need(self, rows: Sequence[int]) -> None:
        """Lets the kernel read these rows ahead."""
        size = self.width * self.dtype.itemsize
        for row in rows:
            start, end = int(self._offsets[row]), int(self._offsets[row + 1])
            self.memory.will_need(self._first + start * size, self._first + end * size)

    def verify(self, rows: Sequence[int], good: Collection[int] | None = None) -> np.ndarray:
        """The depth at which each of the rows is kept whole; 0 where it is not, which is then forgotten.

        Args:
            rows: row numbers.
            good: depths that are of use; None for all.
        """
        depths = np.zeros(len(rows), dtype=np.int16)
        for position, row in enumerate(rows):
            mark = self._marks[row]
            depth = int(mark["depth"])
            useful = depth > 0 and (good is None or depth in good)
            if useful and int(mark["hash"]) == self._hash(row, depth):
                depths[position] = depth
            else:
                mark["depth"] = 0
        return depths

    def forget(self, rows: Sequence[int]) -> None:
        """The rows are no longer there."""
        self._marks["depth"][np.asarray(rows, dtype=np.int64)] = 0

    def _hash(self, row: int, depth: int) -> int:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        values = self._values[start:end].view(torch.uint8).numpy()
        return xxhash.xxh3_64_intdigest(values.data, seed=depth)

    def close(self) -> None:
        """Lets go of the memory."""
        del self._marks, self._values
        self.memory.close()
