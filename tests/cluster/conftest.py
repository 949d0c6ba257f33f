"""Fixtures: a SLURM of two nodes, and what runs compute that nobody interrupts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, why_not
from tests.reliability.conftest import cache, forks, runs

__all__ = ["cache", "forks", "runs"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They take minutes, and what they need is not on every machine: a list of their own (make test-cluster)."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """SLURM's daemons, for the whole test run."""
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as made:
        yield made
