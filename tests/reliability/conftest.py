"""Fixtures of the tests that interrupt runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.forks import Forks
from tests.harness.interrupted import Runs


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised data, which all runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def forks(cache: Path) -> Iterator[Forks]:
    """The program that runs are forked from."""
    made = Forks(cache)
    yield made
    made.close()


@pytest.fixture(scope="session")
def runs(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of twelve steps, and what they compute when nobody interrupts them."""
    return Runs(forks, tmp_path_factory.mktemp("whole"))
