"""Floats in JSON, which has no NaN and no infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def encode_numbers(value: Any) -> Any:
    """JSON values with NaN and infinity as text, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: encode_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [encode_numbers(inner) for inner in value]
    return value


def decode_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, as `encode_numbers` wrote them."""
    return {name: float(value) for name, value in scores.items()}
