"""All-pairs testing: few cases in which every two values of different factors meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Allowed = Callable[[Mapping[str, Any]], bool]


def all_pairs(factors: Mapping[str, Sequence[Any]], allowed: Allowed = lambda case: True) -> list[dict[str, Any]]:
    """Cases that cover each allowed pair of values of any two factors at least once; deterministic.

    Greedy: each case begins with a pair that is still missing and takes, factor by factor, the value that covers most.

    Args:
        factors: name → values.
        allowed: whether values of some of the factors go together; what it refuses is in no case.
    """
    names = list(factors)
    missing = {((a, va), (b, vb)) for a, b in combinations(names, 2) for va, vb in product(factors[a], factors[b])}
    missing = {pair for pair in missing if allowed(dict(pair))}
    cases = []
    order = {((a, va), (b, vb)): i for i, ((a, va), (b, vb)) in enumerate(sorted(missing, key=str))}
    while missing:
        (a, va), (b, vb) = min(missing, key=order.__getitem__)
        case = {a: va, b: vb}
        for name in names:
            if name not in case:
                fitting = [value for value in factors[name] if allowed({**case, name: value})]
                case[name] = max(fitting, key=lambda value: len(_covered({**case, name: value}, names) & missing))
        missing -= _covered(case, names)
        cases.append({name: case[name] for name in names})
    return cases


def full_product(factors: Mapping[str, Sequence[Any]], allowed: Allowed = lambda case: True) -> list[dict[str, Any]]:
    """Every combination that is allowed."""
    every = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in every if allowed(case)]


def part_of(cases: Sequence[Mapping[str, Any]], part: str, together: str) -> list[Mapping[str, Any]]:
    """Every n-th case for a part "k/n" of them; those that differ in the factor `together` alone stay together.

    Raises:
        ValueError: no such part.
    """
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"part '{part}'; k/n is needed with 1 <= k <= n, e.g. 3/12")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault(str([value for name, value in case.items() if name != together]), []).append(case)
    return [case for group in list(groups.values())[int(number) - 1 :: int(parts)] for case in group]


def _covered(case: Mapping[str, Any], names: Sequence[str]) -> set[Any]:
    present = [name for name in names if name in case]
    return {((a, case[a]), (b, case[b])) for a, b in combinations(present, 2)}
