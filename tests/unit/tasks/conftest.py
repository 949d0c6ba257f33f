"""Every test of tasks has a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for tokenised data."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PROGSCALE_CACHE", str(folder))
    return folder
