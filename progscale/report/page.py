"""One HTML file from figures and tables: it opens offline, in light and dark, on a phone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from progscale import __version__
from progscale.report.figures import Figure


@dataclass(frozen=True)
class Tile:
    """A figure that people ask for first; `good` colours it (False is a fault)."""

    label: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Table:
    """Cells as text; the columns whose headings are in `text` stand to the left, as the first always does."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """What a page shows, from the top: title, a sentence, remarks, tiles, figures, tables, and what is folded away."""

    title: str
    lead: str
    tiles: Sequence[Tile] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()


def render_page(page: Page) -> str:
    """The page, with everything that it needs inside of it."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_asset("page.html.j2"))
    # `<` could end the script that the data stands in.
    data = json.dumps(list(page.figures), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    scripts = [_asset(name) for name in ("d3.min.js", "plot.umd.min.js", "figures.js")]
    return template.render(page=page, data=data, style=_asset("page.css"), scripts=scripts, version=__version__)


@cache
def _asset(name: str) -> str:
    return (files("progscale.report") / "assets" / name).read_text(encoding="utf-8")
