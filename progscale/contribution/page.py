"""The page of a contribution: the paper's figure 1 for one's own model and task, and the proxies beside it."""

from __future__ import annotations

import json

from progscale.contribution.cells import ALL, NONE
from progscale.contribution.result import Contribution
from progscale.report import figures
from progscale.report.page import Page, Table, Tile, render_page
from progscale.report.quantities import significant

PROXIES = {"gradient_norm": "gradient norm", "weight_change": "weight change"}


def render_contribution(found: Contribution, title: str, about: str) -> str:
    """The page, as one HTML file.

    Args:
        found: what to show.
        title: of the page.
        about: model, task and settings, in a sentence.
    """
    rows = []
    for target in found.targets:
        group = {NONE: "no block", ALL: "every block"}.get(target.name, "one block")
        label = {NONE: "embeddings and head alone", ALL: "every block"}.get(target.name, target.name.replace("-", " "))
        spread, mean = found.deviation(target.name), found.mean(target.name)
        ends = (None, None) if spread is None else (mean - spread, mean + spread)
        rows.append(
            {"label": label, "group": group, "mean": mean, "low": ends[0], "high": ends[1], "points": found.scores[target.name]}
        )
    names = [target.name.replace("block-", "") for target in found.blocks]
    drawn = [
        figures.intervals(
            "scores",
            "The score with one block trained",
            x=f"{found.metric} ({'higher' if found.higher_is_better else 'lower'} is better)",
            y="what is trained",
            rows=rows,
            note="Head always trained, embeddings by their policy. Filled: the mean. Open: seeds. Line: one standard deviation.",
        )
    ]
    gains = [found.gain(target.name) for target in found.blocks]
    drawn.append(
        figures.bars(
            "gain",
            "What a block adds",
            x="block",
            y=f"gain in {found.metric}",
            groups=names,
            series={"above embeddings and head alone": gains},
        )
    )
    if found.proxies is not None:
        units = {"gradient_norm": "L2 norm of the gradient", "weight_change": "share of the weights' norm"}
        for key, word in PROXIES.items():
            correlation = found.rank_correlation(key)
            drawn.append(
                figures.bars(
                    key.replace("_", "-"),
                    f"A cheap proxy: {word}",
                    x="block",
                    y=units[key],
                    groups=names,
                    series={word: [found.proxy(key, target) for target in found.blocks]},
                    note=f"From {found.proxies.steps} steps with every block trained. Rank correlation with what a block adds: "
                    + ("not defined." if correlation is None else f"{correlation:+.2f} (1 would be the same order)."),
                )
            )
    headings = ["block", f"mean {found.metric}", "gain", *PROXIES.values()]
    table = [
        [
            target.name,
            significant(found.mean(target.name), 4),
            f"{found.gain(target.name):+.4f}",
            *("–" if (value := found.proxy(key, target)) is None else significant(value) for key in PROXIES),
        ]
        for target in found.targets
    ]
    best = max(found.blocks, key=lambda target: found.gain(target.name))
    tiles = [
        Tile("best single block", best.name.replace("-", " "), f"{found.metric} {significant(found.mean(best.name), 4)}"),
        Tile("every block", significant(found.mean(ALL), 4), f"{found.metric}, plain fine-tuning"),
        Tile("no block", significant(found.mean(NONE), 4), f"{found.metric}, embeddings and head alone"),
    ]
    weights = found.weights
    remarks = (
        []
        if weights is None
        else [f"Weights for the schedule 'weighted': {json.dumps(weights)} (weights.json beside this file)."]
    )
    return render_page(Page(title, about, tiles, drawn, [Table("Scores", headings, table)], remarks=remarks))
