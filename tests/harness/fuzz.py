"""Generated tests in two lengths: 200 examples in the ordinary run, always the same; 10,000 new ones in the slow run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

ORDINARY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NIGHTLY = settings(max_examples=10_000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
LENGTHS = [pytest.param(ORDINARY, id="200"), pytest.param(NIGHTLY, id="10000", marks=pytest.mark.slow)]

Test = Callable[..., None]


def fuzz(*strategies: SearchStrategy[Any], **named: SearchStrategy[Any]) -> Callable[[Test], Test]:
    """`given` in both lengths; an `example` stands below it. Fixtures come first, and are the same for all examples."""

    def decorate(body: Test) -> Test:
        # `updated`: an `example` is the inner test's.
        @functools.wraps(body, updated=())
        def test(length: settings, **fixtures: Any) -> None:
            length(given(*strategies, **named)(body))(**fixtures)

        # What pytest is to fill in.
        fixtures = inspect.signature(given(*strategies, **named)(body)).parameters.values()
        length = inspect.Parameter("length", inspect.Parameter.KEYWORD_ONLY)
        filled = [*(fixture.replace(kind=inspect.Parameter.KEYWORD_ONLY) for fixture in fixtures), length]
        test.__signature__ = inspect.Signature(filled)  # type: ignore[attr-defined]
        marked: Test = pytest.mark.parametrize("length", LENGTHS)(test)
        return marked

    return decorate
