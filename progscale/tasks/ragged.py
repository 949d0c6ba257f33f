"""Rows of unequal length in two flat arrays: no Python object for each row, and cheap to slice, save and share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np


@dataclass(frozen=True, eq=False)
class Ragged:
    """A column of rows.

    Attributes:
        values: all rows one after another, shape `(tokens, ...)`.
        offsets: row i is `values[offsets[i]:offsets[i + 1]]`; int64, shape `(rows + 1,)`.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], dtype: np.dtype | type = np.int32) -> Ragged:
        """Packs lists of numbers."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        values = np.fromiter(chain.from_iterable(rows), dtype=dtype, count=int(lengths.sum()))
        return cls(values, offsets_of(lengths))

    @classmethod
    def concatenate(cls, parts: Iterable[Ragged], dtype: np.dtype | type = np.int32) -> Ragged:
        """One column out of several, in order."""
        parts = list(parts)
        if not parts:
            return cls(np.empty(0, dtype), np.zeros(1, np.int64))
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Of each row; int64, shape `(rows,)`."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Ragged:
        """The column of the given rows, in the order given."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Ragged(self.values[index], offsets)

    def padded(self, rows: np.ndarray, length: int, fill: int, dtype: np.dtype | type = np.int64) -> np.ndarray:
        """The given rows as a rectangle filled up on the right, shape `(rows, length)`.

        Args:
            rows: row numbers.
            length: columns of the result, at least the longest of the rows.
            fill: stands where a row has ended.
            dtype: of the result.
        """
        columns = np.arange(length)
        inside = columns < self.lengths[rows][:, None]
        out = np.full(inside.shape, fill, dtype=dtype)
        out[inside] = self.values[(self.offsets[:-1][rows][:, None] + columns)[inside]]
        return out


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each row begins, and where the last one ends; int64, shape `(rows + 1,)`."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
