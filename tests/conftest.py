"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.worker import TwoRanks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """Two ranks over gloo that stay up for the whole test run."""
    ranks = TwoRanks()
    yield ranks
    ranks.close()
