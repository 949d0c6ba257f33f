"""Layouts of flat optimizer state, at random."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st


@st.composite
def layouts(draw: Any, sizes: Mapping[str, int]) -> list[list[tuple[str, int, int]]]:
    """All elements of all parameters (elements by name) as (name, start, end), cut and dealt into one to three shards."""
    pieces = []
    for name, size in sizes.items():
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        pieces += [(name, start, end) for start, end in pairwise(cuts)]
    pieces = draw(st.permutations(pieces))
    count = draw(st.integers(1, 3))
    return [pieces[index::count] for index in range(count) if pieces[index::count]]
