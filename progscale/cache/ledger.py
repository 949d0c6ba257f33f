"""Which rows are kept at which depth on which node: every rank counts along, so that no rank has to ask another.

What is kept follows from which rows were run where, and every rank knows that of all ranks. So all of them come to the same
decision about a micro-batch without a word, as ZeRO-3 needs it: there a rank that skips blocks and one that runs them would wait
for each other for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Nodes:
    """The ranks of a run by node; as many on each.

    Attributes:
        world_size: ranks.
        local: ranks of a node.
        rank: of this process.
    """

    world_size: int = 1
    local: int = 1
    rank: int = 0

    @property
    def count(self) -> int:
        """Of nodes."""
        return -(-self.world_size // self.local)

    def of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.local

    @property
    def own(self) -> int:
        """The node of this process."""
        return self.of(self.rank)

    @property
    def local_rank(self) -> int:
        """Of this process on its node."""
        return self.rank % self.local

    @property
    def first(self) -> bool:
        """Whether this process is its node's first."""
        return self.local_rank == 0


class Ledger:
    """For each node and row of a split the depth at which it is kept; 0 where it is not."""

    def __init__(self, nodes: Nodes, rows: int) -> None:
        self._nodes = nodes
        self._depths = np.zeros((nodes.count, rows), dtype=np.int16)

    def depths(self, rank: int, rows: np.ndarray) -> np.ndarray:
        """Of rows as a rank finds them on its node."""
        found: np.ndarray = self._depths[self._nodes.of(rank), rows]
        return found

    def keep(self, by_rank: Sequence[np.ndarray], depth: int) -> None:
        """The rows that each rank has run are now kept at `depth` on its node."""
        for rank, rows in enumerate(by_rank):
            self._depths[self._nodes.of(rank), rows] = depth

    def restore(self, found: Sequence[Mapping[str, np.ndarray]]) -> None:
        """What each rank has found whole on its node, as `rows` and their `depths`."""
        for rank, part in enumerate(found):
            self._depths[self._nodes.of(rank), part["rows"]] = part["depths"]
