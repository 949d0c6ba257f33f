"""All-pairs testing: few cases in which every two values of different factors meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases that cover each pair of values of any two factors at least once; deterministic.

    Greedy: each case begins with a pair that is still missing and takes, factor by factor, the value that covers most.
    """
    names = list(factors)
    missing = {((a, va), (b, vb)) for a, b in combinations(names, 2) for va, vb in product(factors[a], factors[b])}
    cases = []
    order = {((a, va), (b, vb)): i for i, ((a, va), (b, vb)) in enumerate(sorted(missing, key=str))}
    while missing:
        (a, va), (b, vb) = min(missing, key=order.__getitem__)
        case = {a: va, b: vb}
        for name in names:
            if name not in case:
                case[name] = max(factors[name], key=lambda value: len(_covered({**case, name: value}, names) & missing))
        missing -= _covered(case, names)
        cases.append({name: case[name] for name in names})
    return cases


def full_product(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]


def _covered(case: Mapping[str, Any], names: Sequence[str]) -> set[Any]:
    present = [name for name in names if name in case]
    return {((a, case[a]), (b, case[b])) for a, b in combinations(present, 2)}
