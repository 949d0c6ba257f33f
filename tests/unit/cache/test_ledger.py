"""Every rank knows what is kept where, and rows come back to their node."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from progscale.cache.ledger import Ledger, Nodes
from progscale.data import split_batch


def test_nodes() -> None:
    nodes = Nodes(world_size=8, local=4, rank=5)
    assert (nodes.count, nodes.own, nodes.local_rank, nodes.first) == (2, 1, 1, False)
    assert [nodes.of(rank) for rank in range(8)] == [0] * 4 + [1] * 4


def test_what_one_rank_keeps_its_node_has() -> None:
    ledger = Ledger(Nodes(4, 2), rows=6)
    ledger.keep([np.array([0]), np.array([1, 2]), np.array([3]), np.array([], dtype=int)], 2)
    rows = np.arange(6)
    assert ledger.depths(0, rows).tolist() == ledger.depths(1, rows).tolist() == [2, 2, 2, 0, 0, 0]
    assert ledger.depths(2, rows).tolist() == ledger.depths(3, rows).tolist() == [0, 0, 0, 2, 0, 0]


def test_what_an_earlier_process_left_is_put_together() -> None:
    ledger = Ledger(Nodes(2, 2), rows=4)
    ledger.restore(
        [{"rows": np.array([0, 2]), "depths": np.array([1, 0])}, {"rows": np.array([1, 3]), "depths": np.array([3, 3])}]
    )
    assert ledger.depths(0, np.arange(4)).tolist() == [1, 3, 0, 3]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    nodes=st.integers(1, 4),
    local=st.integers(1, 3),
    micro=st.integers(1, 5),
    tokens=st.none() | st.integers(1, 60),
)
def test_dealing_by_node_keeps_every_row_and_every_size(
    lengths: list[int], nodes: int, local: int, micro: int, tokens: int | None
) -> None:
    rows = np.arange(len(lengths))
    how = {"world_size": nodes * local, "micro_batch_size": micro, "max_tokens": tokens}
    plain = split_batch(rows, lengths, **how)  # type: ignore[arg-type]
    dealt = split_batch(rows, lengths, **how, nodes=nodes)  # type: ignore[arg-type]
    for before, after in zip(plain, dealt, strict=True):
        assert [len(part) for part in before] == [len(part) for part in after]
        assert sorted(np.concatenate(before)) == sorted(np.concatenate(after))
        assert len(after[0]) > 0


@pytest.mark.parametrize("nodes", [2, 4])
def test_most_rows_come_to_the_same_node_each_time(nodes: int) -> None:
    rng = np.random.default_rng(0)
    seen: dict[int, set[int]] = {}
    home = 0
    for _ in range(20):
        for rows in np.split(rng.permutation(1024), 8):
            (step,) = split_batch(rows, np.full(1024, 9), world_size=nodes, micro_batch_size=1024 // nodes, nodes=nodes)
            for node, part in enumerate(step):
                home += int((part % nodes == node).sum())
                for row in part.tolist():
                    seen.setdefault(row, set()).add(node)
    # By chance it would be one in `nodes`.
    assert home / (20 * 1024) > 0.9
