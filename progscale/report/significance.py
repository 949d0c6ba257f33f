"""Whether a difference may be chance: pure statistics over a few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def paired_test(differences: Sequence[float]) -> tuple[float, float, float | None]:
    """The 95 % confidence interval of the mean, and p of Student's t-test that it is 0; None where all are alike and not 0.

    Args:
        differences: at least two.
    """
    from scipy import stats

    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    # Differences that are all alike, but for rounding, have no spread by which chance could be judged.
    if error <= 1e-9 * max(1e-12, max(map(abs, differences))):
        return mean, mean, 1.0 if mean == 0 else None
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return mean - half, mean + half, float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(tests: Sequence[float]) -> dict[float, float]:
    """P → adjusted p, after Holm (1979), for all tests together.

    >>> holm([0.01, 0.04, 0.03])
    {0.01: 0.03, 0.03: 0.06, 0.04: 0.06}
    """
    found: dict[float, float] = {}
    highest = 0.0
    for position, p in enumerate(sorted(tests)):
        highest = max(highest, min(1.0, (len(tests) - position) * p))
        found[p] = max(found.get(p, 0.0), highest)
    return found
