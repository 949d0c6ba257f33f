"""The page of a comparison: scores with their spread, differences with their intervals, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from progscale.report import figures
from progscale.report.comparison import Arm, Comparison, Group
from progscale.report.figures import Figure
from progscale.report.page import Page, Table, Tile, render_page
from progscale.report.quantities import percent
from progscale.report.run_page import is_number
from progscale.report.tables import notes, rows_of, run_rows

# Name → how it is read off an arm, beside the arm that it is measured against.
COSTS = {
    "training time": "train_seconds",
    "operations": "flops",
    "updated": "updated_parameters",
    "peak memory": "peak_memory_bytes",
    "last stage's memory": "last_peak_memory_bytes",
    "energy": "energy_joules",
}
RUN_WORDS = ("run", "model", "task", "arm", "folder")
OF_A_MACHINE = ("train_seconds", "peak_memory_bytes", "last_peak_memory_bytes", "energy_joules")


def render_comparison(comparison: Comparison, title: str = "Runs compared") -> str:
    """The page, as one HTML file."""
    headings, rows = rows_of(comparison)
    runs = sum(len(arm.runs) for group in comparison.groups for arm in group.arms)
    tasks = sorted({group.task for group in comparison.groups})
    models = sorted({group.model for group in comparison.groups})
    arms = dict.fromkeys(arm.name for group in comparison.groups for arm in group.arms)
    found: list[Figure | None] = []
    for number, group in enumerate(comparison.groups):
        found += [score_figure(group, number), difference_figure(group, number), cost_figure(group, number)]
        found += [score_by_step(group, number)]
    return render_page(
        Page(
            title=title,
            lead=f"{runs} runs: {', '.join(models)} on {', '.join(tasks)}; {len(arms)} ways of training.",
            tiles=tiles(comparison),
            figures=[figure for figure in found if figure is not None],
            tables=[
                Table("Comparison", headings, rows, " ".join(notes(comparison)[:1]), text=("model", "task", "arm")),
                Table("Runs", [*RUN_WORDS[:-1], "seed", "score", RUN_WORDS[-1]], run_rows(comparison), text=RUN_WORDS),
            ],
            remarks=notes(comparison)[1:],
        )
    )


def tiles(comparison: Comparison) -> list[Tile]:
    """What a reader asks first of the arms that are measured against another."""
    found = []
    tested = [arm for group in comparison.groups for arm in group.arms if arm.against is not None]
    signs = [sign_of(group, arm) for group in comparison.groups for arm in group.arms if arm.against is not None]
    if tested:
        found.append(Tile("differences tested", str(len(tested)), "arm beside its reference, by task"))
        words = {1: "better", -1: "worse", 0: "not told apart"}
        for sign, word in words.items():
            found.append(
                Tile(word, str(signs.count(sign)), "p < 0.05 after Holm" if sign else "p ≥ 0.05 after Holm, or one seed")
            )
    ratios = [arm.against.time_ratio for arm in tested if arm.against is not None and arm.against.time_ratio is not None]
    if ratios:
        found.append(Tile("training time", percent(statistics.median(ratios)), "of the reference's, median over arms and tasks"))
    return found


def sign_of(group: Group, arm: Arm) -> int:
    """1 where the arm is better than its reference beyond chance, -1 where it is worse, else 0."""
    against = arm.against
    if against is None or against.p_holm is None or against.p_holm >= 0.05:
        return 0
    return 1 if (against.mean > 0) == group.higher_is_better else -1


def heading(group: Group) -> str:
    """Of a group's figures."""
    return f"{group.task}, {group.model}"


def row(label: str, group: str, values: Sequence[float], low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Of an interval figure."""
    return {"label": label, "group": group, "mean": statistics.fmean(values), "low": low, "high": high, "points": list(values)}


def score_figure(group: Group, number: int) -> Figure:
    """Scores of each arm."""
    rows = []
    for arm in group.arms:
        spread = arm.deviation
        ends = (None, None) if spread is None else (arm.mean - spread, arm.mean + spread)
        rows.append(row(arm.name, "arms", list(arm.scores.values()), *ends))
    better = "higher" if group.higher_is_better else "lower"
    return figures.intervals(
        f"score-{number}",
        f"Scores: {heading(group)}",
        x=f"{group.metric} ({better} is better)",
        y="arm",
        rows=rows,
        note="Filled: the mean. Open: single seeds. Line: one standard deviation to each side.",
    )


def difference_figure(group: Group, number: int) -> Figure | None:
    """Paired differences."""
    rows = []
    for arm in group.arms:
        if arm.against is not None:
            reference = next(other for other in group.arms if other.name == arm.against.reference)
            values = [arm.scores[seed] - reference.scores[seed] for seed in arm.against.seeds]
            rows.append(row(f"{arm.name} − {reference.name}", "arms", values, arm.against.low, arm.against.high))
    if not rows:
        return None
    return figures.intervals(
        f"difference-{number}",
        f"Differences by seed: {heading(group)}",
        x=f"difference in {group.metric}",
        y="arm − reference",
        rows=rows,
        zero=True,
        note="Filled: the mean. Open: single seeds. Line: 95 % confidence interval of the mean; at 0 there is no difference.",
    )


def cost_figure(group: Group, number: int) -> Figure | None:
    """What each arm takes, as a share of what its reference takes."""
    compared = [arm for arm in group.arms if arm.against is not None]
    series: dict[str, list[float | None]] = {}
    for name, key in COSTS.items():
        values = [cost_share(group, arm, key) for arm in compared]
        if any(value is not None for value in values):
            series[name] = values
    if not series:
        return None
    return figures.bars(
        f"cost-{number}",
        f"Cost: {heading(group)}",
        x="what it takes",
        y="share of the reference's",
        groups=list(series),
        series={arm.name: [values[index] for values in series.values()] for index, arm in enumerate(compared)},
        colours=colours_of(group),
        note="1 is what the reference takes. Seconds and memory are left out where the machines differ.",
    )


def cost_share(group: Group, arm: Arm, key: str) -> float | None:
    """Mean over the seeds that both have."""
    if arm.against is None or (key in OF_A_MACHINE and not arm.same_machine):
        return None
    reference = next(other for other in group.arms if other.name == arm.against.reference)
    pairs = [(getattr(arm.costs[seed], key), getattr(reference.costs[seed], key)) for seed in arm.against.seeds]
    known = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs]
    return statistics.fmean(mine / theirs for mine, theirs in known) if len(known) == len(pairs) and known else None


def colours_of(group: Group) -> dict[str, int]:
    """Arm → the number of its colour in all figures of the group."""
    return {arm.name: number for number, arm in enumerate(group.arms)}


def score_by_step(group: Group, number: int) -> Figure | None:
    """The metric over the steps, mean over seeds."""
    series: dict[str, list[tuple[float, float]]] = {}
    for arm in group.arms:
        by_step: dict[int, list[float]] = {}
        for run in arm.runs.values():
            for record in run.evaluations:
                if is_number(record.get(group.metric)):
                    by_step.setdefault(int(record["step"]), []).append(record[group.metric])
        series[arm.name] = [
            (step, statistics.fmean(values)) for step, values in sorted(by_step.items()) if len(values) == len(arm.runs)
        ]
    if max(map(len, series.values())) < 2:
        return None
    return figures.lines(
        f"curve-{number}",
        f"Scores over the run: {heading(group)}",
        x="optimizer step",
        y=group.metric,
        series=series,
        dots=list(series),
        colours=colours_of(group),
        note="Mean over seeds.",
    )
