"""What a figure shows, as plain data: the page draws it. Every axis has a label with its unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# More points than pixels would make a page large and no clearer.
MOST_POINTS = 1000

Figure = dict[str, Any]


def lines(
    name: str,
    title: str,
    *,
    x: str,
    y: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    marks: Sequence[tuple[float, str]] = (),
    dots: Sequence[str] = (),
    colours: Mapping[str, int] | None = None,
    note: str = "",
    logarithmic: bool = False,
) -> Figure:
    """Curves over a common axis.

    Args:
        name: of the figure in the page.
        title: above it.
        x: label of the axis, with its unit.
        y: the same.
        series: points by what they are.
        marks: vertical lines, with a word each.
        dots: series of few points, each of which is shown.
        colours: series → the number of its colour, where it must be the same in several figures; else by their order.
        note: a sentence below.
        logarithmic: the y axis is.
    """
    thinned = {key: thin(points) for key, points in series.items() if points}
    merged = {len(points) // len(thinned[key]) for key, points in series.items() if points and len(points) > MOST_POINTS}
    if merged:
        note = " ".join(filter(None, (note, f"A point is the mean of up to {max(merged) + 1} records.")))
    return {
        **{"kind": "lines", "name": name, "title": title, "x": x, "y": y, "note": note, "logarithmic": logarithmic},
        "series": [
            {"name": key, "points": points, "dots": key in dots, **coloured(key, colours)} for key, points in thinned.items()
        ],
        "marks": [{"x": place, "text": text} for place, text in marks],
    }


def coloured(name: str, colours: Mapping[str, int] | None) -> dict[str, int]:
    """The colour of a series, where one was given."""
    return {} if colours is None else {"colour": colours[name]}


def bars(
    name: str,
    title: str,
    *,
    x: str,
    y: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    colours: Mapping[str, int] | None = None,
    note: str = "",
) -> Figure:
    """Bars side by side in each group; `colours` as for `lines`."""
    return {
        **{"kind": "bars", "name": name, "title": title, "x": x, "y": y, "note": note, "groups": list(groups)},
        "series": [{"name": key, "values": list(values), **coloured(key, colours)} for key, values in series.items()],
    }


def shares(name: str, title: str, *, x: str, parts: Mapping[str, float], note: str = "") -> Figure:
    """One bar of parts."""
    found = [{"name": key, "value": value} for key, value in parts.items() if value > 0]
    return {"kind": "shares", "name": name, "title": title, "x": x, "y": "", "note": note, "parts": found}


def timeline(
    name: str,
    title: str,
    *,
    x: str,
    y: str,
    rows: Sequence[str],
    cells: Sequence[Mapping[str, Any]],
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Figure:
    """Which row is trained from when to when.

    Args:
        name: as for `lines`, and so are title, x, y, marks and note.
        title: see there.
        x: see there.
        y: see there.
        marks: see there.
        note: see there.
        rows: from the lowest to the highest.
        cells: `row`, `from`, `to`, `trained` and the `stage`.
    """
    return {
        **{"kind": "timeline", "name": name, "title": title, "x": x, "y": y, "note": note, "rows": list(rows)},
        "cells": [dict(cell) for cell in cells],
        "marks": [{"x": place, "text": text} for place, text in marks],
    }


def intervals(
    name: str, title: str, *, x: str, y: str, rows: Sequence[Mapping[str, Any]], note: str = "", zero: bool = False
) -> Figure:
    """A mean with an interval and its single values, a row each.

    Args:
        name: as for `lines`, and so are title, x, y and note.
        title: see there.
        x: see there.
        y: see there.
        note: see there.
        rows: `label`, `group`, `mean`, `low`, `high` (None where there is one value) and the `points`.
        zero: a line is drawn at 0.
    """
    return {
        **{"kind": "intervals", "name": name, "title": title, "x": x, "y": y, "note": note, "zero": zero},
        "rows": [dict(row) for row in rows],
    }


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[list[float]]:
    """At most so many points: means of neighbours, the last point as it is."""
    if len(points) <= most:
        return [[x, y] for x, y in points]
    size = -(-(len(points) - 1) // (most - 1))
    found = []
    for start in range(0, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        found.append([part[-1][0], sum(y for _, y in part) / len(part)])
    return [*found, list(points[-1])]
