"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from tests.harness.worker import TwoRanks


@pytest.fixture(autouse=True)
def denormals_as_before() -> Iterator[None]:
    """A run in the test process flushes denormals, which hypothesis refuses to work with."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """Stage switches collect garbage: what pytest and earlier tests hold need not be looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """Two ranks over gloo that stay up for the whole test run."""
    ranks = TwoRanks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[TwoRanks]:
    """Three of them."""
    ranks = TwoRanks(ranks=3)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[TwoRanks]:
    """Four, for groups of two; they go when the module is done."""
    ranks = TwoRanks(ranks=4)
    yield ranks
    ranks.close()
