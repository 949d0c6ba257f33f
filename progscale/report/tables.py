"""A comparison as a table: for the terminal, markdown, csv, LaTeX, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from progscale.report.comparison import Arm, Comparison, Difference, Group
from progscale.report.quantities import quantity, seconds_text, significant

if TYPE_CHECKING:
    from rich.console import RenderableType

HEADINGS = (
    *("model", "task", "arm", "seeds", "score", "difference", "p", "p (Holm)", "updated", "of none's", "FLOP of none's"),
    *("train", "time ratio", "peak memory", "energy"),
)
# That tell nothing where no arm has them.
OPTIONAL = ("energy", "p", "p (Holm)", "difference", "time ratio")


def cells(group: Group, arm: Arm) -> list[str]:
    """Of one arm, in the order of HEADINGS."""
    against, deviation = arm.against, arm.deviation
    score = significant(arm.mean, 4) + (f" ± {significant(deviation, 2)}" if deviation is not None else "")
    updated, baseline = arm.cost("updated_parameters"), arm.cost("baseline_updated_parameters")
    flops, plain = arm.cost("flops"), arm.cost("baseline_flops")
    joules = arm.cost("energy_joules")
    return [
        group.model,
        f"{group.task} ({group.metric})",
        arm.name,
        str(len(arm.scores)),
        score,
        difference_text(against),
        p_text(None if against is None else against.p),
        p_text(None if against is None else against.p_holm),
        quantity(updated, digits=4),
        "–" if updated is None or not baseline else f"{updated / baseline:.3f}",
        "–" if flops is None or not plain else f"{flops / plain:.3f}",
        seconds_text(arm.cost("train_seconds")),
        "–" if against is None or against.time_ratio is None else f"{against.time_ratio:.3f}",
        quantity(arm.cost("peak_memory_bytes"), "B"),
        "–" if joules is None else quantity(joules / 3600, "Wh"),
    ]


def difference_text(against: Difference | None) -> str:
    """Mean and the 95 % confidence interval."""
    if against is None:
        return "–"
    half = "" if against.high is None else f" ± {significant(against.high - against.mean, 2)}"
    return f"{signed(against.mean)}{half}"


def signed(value: float) -> str:
    """With its sign."""
    return f"{'+' if value >= 0 else '-'}{significant(abs(value), 2)}"


def p_text(p: float | None) -> str:
    """Of a test."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def rows_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, without columns that say nothing, or the same everywhere."""
    rows = [cells(group, arm) for group in comparison.groups for arm in group.arms]
    empty = [index for index, name in enumerate(HEADINGS) if name in OPTIONAL and all(row[index] == "–" for row in rows)]
    kept = [index for index in range(len(HEADINGS)) if index not in empty]
    return [HEADINGS[index] for index in kept], [[row[index] for index in kept] for row in rows]


def notes(comparison: Comparison) -> list[str]:
    """All that must be read with the table."""
    of_groups = [f"{group.model}, {group.task}: {note}" for group in comparison.groups for note in group.notes]
    what = "after the last step" if comparison.which == "last" else "of the best evaluation"
    references = dict.fromkeys(
        arm.against.reference for group in comparison.groups for arm in group.arms if arm.against is not None
    )
    text = f"Scores {what}, mean ± standard deviation over seeds."
    if references:
        beside = ", or ".join(references)
        text += f" Difference and time ratio: beside {beside}, paired by seed, ± half of the 95 % confidence interval."
    return [text, *comparison.notes, *of_groups]


def as_text(comparison: Comparison) -> RenderableType:
    """For the terminal: a table for each task, in which a number stands for each arm, whose names are long."""
    from rich import box
    from rich.console import Group as Lines
    from rich.table import Table
    from rich.text import Text

    headings, rows = rows_of(comparison)
    left_out = ("model", "task", "arm", "updated", "p" if "p (Holm)" in headings else "p (Holm)")
    shown = [index for index, heading in enumerate(headings) if heading not in left_out]
    found: list[RenderableType] = []
    names = {arm.name: str(number) for number, arm in enumerate(arms_of(comparison), start=1)}
    for group in comparison.groups:
        table = Table(title=f"{group.task} ({group.metric}), {group.model}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("arm", justify="right")
        for index in shown:
            # Headings may break into lines, figures must not.
            table.add_column(headings[index], justify="right", min_width=max(len(row[index]) for row in rows), overflow="fold")
        own = [row for row in rows if row[:2] == cells(group, group.arms[0])[:2]]
        for arm, row in zip(group.arms, own, strict=True):
            reference = "" if arm.against is None else f" − {names[arm.against.reference]}"
            table.add_row(names[arm.name] + reference, *(Text(row[index]) for index in shown))
        found.append(table)
    legend = [Text(f"{number:>3}  {name}") for name, number in names.items()]
    return Lines(*found, Text("arms"), *legend, Text(""), *map(Text, notes(comparison)))


def arms_of(comparison: Comparison) -> list[Arm]:
    """One of each name, in the order of the tables."""
    return list({arm.name: arm for group in comparison.groups for arm in group.arms}.values())


def as_markdown(comparison: Comparison) -> str:
    """A table and its notes."""
    headings, rows = rows_of(comparison)
    lines = [headings, ["---" if index < 3 else "---:" for index in range(len(headings))], *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {note}" for note in notes(comparison))


def as_csv(comparison: Comparison) -> str:
    """A row for each run, with plain numbers: for somebody's own statistics."""
    stream = io.StringIO()
    first = ("model", "task", "metric", "arm", "seed", "score")
    costs = tuple(next(iter(comparison.groups[0].arms[0].costs.values())).__dataclass_fields__)
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*first, *costs, "run"])
    for group in comparison.groups:
        for arm in group.arms:
            for seed, score in arm.scores.items():
                cost = asdict(arm.costs[seed])
                values = [group.model, group.task, group.metric, arm.name, seed, score]
                writer.writerow([*values, *("" if cost[key] is None else cost[key] for key in costs), arm.runs[seed].path])
    return stream.getvalue().rstrip("\n")


def as_latex(comparison: Comparison) -> str:
    """A table of the booktabs package, ready to be included."""
    headings, rows = rows_of(comparison)
    body = [" & ".join(map(latex, headings)) + r" \\", r"\midrule", *(" & ".join(map(latex, row)) + r" \\" for row in rows)]
    columns = "lll" + "r" * (len(headings) - 3)
    remarks = [f"% {note}" for note in notes(comparison)]
    return "\n".join([*remarks, rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])


def latex(text: str) -> str:
    """Text as LaTeX has it."""
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"}}
    return "".join(special.get(sign, sign) for sign in text)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All figures as plain data."""

    def arm_data(arm: Arm) -> dict[str, Any]:
        return {
            "name": arm.name,
            "mean": arm.mean,
            "standard_deviation": arm.deviation,
            "scores": {str(seed): score for seed, score in arm.scores.items()},
            "costs": {str(seed): asdict(cost) for seed, cost in arm.costs.items()},
            "runs": {str(seed): str(run.path) for seed, run in arm.runs.items()},
            "against": None if arm.against is None else asdict(arm.against),
        }

    groups = [
        {
            **{"model": group.model, "task": group.task, "metric": group.metric, "higher_is_better": group.higher_is_better},
            "arms": [arm_data(arm) for arm in group.arms],
        }
        for group in comparison.groups
    ]
    return {"which": comparison.which, "groups": groups, "notes": notes(comparison)}


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
    "json": lambda comparison: json.dumps(as_json(comparison), indent=2),
}


def run_rows(comparison: Comparison) -> Sequence[Sequence[str]]:
    """Every run with its score and its folder."""
    return [
        [arm.runs[seed].name, group.model, group.task, arm.name, str(seed), significant(score, 4), str(arm.runs[seed].path)]
        for group in comparison.groups
        for arm in group.arms
        for seed, score in arm.scores.items()
    ]
