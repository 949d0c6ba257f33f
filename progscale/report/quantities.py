"""Numbers as people read them, with their units."""

from __future__ import annotations

import math

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A value with an SI prefix, e.g. `243 M`, `1.21 TFLOP`; a dash where there is none.

    >>> quantity(243_397_634, digits=4)
    '243.4 M'
    """
    if value is None or not math.isfinite(value):
        return "–"
    size, prefix = next(((size, prefix) for size, prefix in PREFIXES if abs(value) >= size), (1.0, ""))
    return f"{significant(value / size, digits)} {prefix}{unit}".rstrip()


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits, and no exponent.

    >>> significant(0.012345), significant(1234.5), significant(0)
    ('0.0123', '1234', '0')
    """
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def seconds_text(value: float | None) -> str:
    """Seconds, minutes or hours.

    >>> seconds_text(3.14), seconds_text(75), seconds_text(7260)
    ('3.1 s', '1 min 15 s', '2 h 1 min')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percent."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


# Metrics of which less is better, with or without the name of a split behind.
ERRORS = ("loss", "perplexity", "mse", "mae", "rmse", "error")


def is_error(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.startswith(ERRORS)
