"""Windows that all pages are looked at in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.browser import DESKTOP, PHONE, browser


@pytest.fixture(params=["desktop-light", "phone-dark"], scope="module")
def window(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A desktop's in light colours, and a phone's in dark ones."""
    phone = request.param.startswith("phone")
    with browser(PHONE if phone else DESKTOP, dark=phone) as driver:
        yield driver
