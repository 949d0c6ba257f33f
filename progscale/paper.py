"""The paper's numbers of updated parameters beside ours, counted on real models on the meta device.

Source: Progtuning (arXiv 2506.21119), section 4: figure 4, as far as the text gives its numbers, and tables 2 and 3 whole. The
PEFT rows are counted from the models that the methods make, as a run trains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from progscale.models.family import HeadKind
from progscale.plan import Plan, plan_for

if TYPE_CHECKING:
    from rich.console import RenderableType


# As the adapters' and LoRA's own papers have them where this one says nothing: the sizes that give its figures.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"size": 48},
    "lora": {"rank": 8, "targets": ["query", "value"]},
}


@dataclass(frozen=True)
class PaperRow:
    """One figure of the paper and the setting that it was counted in.

    Attributes:
        source: the figure or table.
        task: as the paper names it; MNLI stands for its two columns, matched and mismatched.
        model: well-known architecture.
        method: registered, with its options in `OPTIONS`.
        epochs: of the run, a stage each.
        paper_baseline: the paper's updated parameters without stages, in millions; None where it does not say.
        paper_updated: with progtuning, in millions; None where the text gives no number.
        paper_saving_percent: as the text rounds it ("approximately 25%"); None where it does not say.
        head: of the model.
        num_labels: outputs of a classification head.
        why_not: the reason when the rule does not give the paper's number.
    """

    source: str
    task: str
    model: str
    method: str
    epochs: int
    paper_baseline: float | None = None
    paper_updated: float | None = None
    paper_saving_percent: int | None = None
    head: HeadKind = "sequence_classification"
    num_labels: int = 2
    why_not: str = field(default="")

    def plan(self) -> Plan:
        """The plan of this setting: progtuning, a stage for each epoch, embeddings always."""
        return _plan(self.model, self.method, self.epochs, self.head, self.num_labels)


_HALF = (
    "the rule trains all blocks in the first epoch and equally many fewer in each further one, on average more than half "
    "of them, so it cannot go below half of the baseline; the paper's value is a third, and no rule that it states gives it"
)

_Cells = tuple[tuple[str, ...], float, float]

# Table 3 by method: model, and for each number of epochs the tasks and the two values. The paper does not give the epochs: LoRA's
# are those of its own paper (table 9), the others the only ones that give the table's value without stages.
_TABLE_3: Mapping[str, tuple[str, Mapping[int, _Cells]]] = {
    "adapter": (
        "bert-base-uncased",
        {16: (("CoLA", "MRPC", "RTE", "SST-2", "STS-B"), 28.6, 9.9), 20: (("MNLI", "QNLI", "QQP"), 35.8, 11.9)},
    ),
    "bitfit": (
        "bert-base-uncased",
        {8: (("CoLA", "MRPC", "RTE", "SST-2", "STS-B"), 0.8, 0.5), 10: (("MNLI", "QNLI", "QQP"), 1.0, 0.6)},
    ),
    "lora": (
        "roberta-base",
        {
            80: (("CoLA", "RTE"), 70.9, 60.2),
            30: (("MNLI", "MRPC"), 26.6, 22.6),
            25: (("QNLI", "QQP"), 22.2, 18.9),
            60: (("SST-2",), 53.2, 45.1),
            40: (("STS-B",), 35.4, 30.1),
        },
    ),
}
# Outputs of the head where they are not two.
_NUM_LABELS = {"MNLI": 3, "STS-B": 1}
# The text gives the saving of these alone.
_SAVING_PERCENT = {("adapter", 20): 67}


def _table_3() -> list[PaperRow]:
    """A row for each method and task, in the order of the table."""
    rows = []
    for method, (model, cells) in _TABLE_3.items():
        of_task = {task: epochs for epochs, (tasks, _, _) in cells.items() for task in tasks}
        for task, epochs in sorted(of_task.items()):
            _, baseline, updated = cells[epochs]
            saving = _SAVING_PERCENT.get((method, epochs))
            row = PaperRow("table 3", task, model, method, epochs, baseline, updated, saving)
            rows.append(replace(row, num_labels=_NUM_LABELS.get(task, 2), why_not=_HALF if method == "adapter" else ""))
    return rows


ROWS: tuple[PaperRow, ...] = (
    PaperRow("figure 4", "GLUE", "bert-base-uncased", "full", 3, paper_saving_percent=25),
    PaperRow("figure 4", "GLUE", "bert-large-uncased", "full", 3, 1005.4, 703.1, 30),
    PaperRow("figure 4", "GLUE", "roberta-base", "full", 3, paper_saving_percent=25),
    PaperRow("table 2", "SQuAD v1.1", "bert-base-uncased", "full", 3, None, 241.6, 26, head="question_answering"),
    PaperRow("table 2", "SQuAD v2.0", "bert-base-uncased", "full", 2, 217.7, 175.3, 20, head="question_answering"),
    *_table_3(),
)

TOLERANCE = 0.1
"""Millions: the paper gives one decimal, and rounds up in some places and down in others."""


@cache
def _plan(model: str, method: str, epochs: int, head: HeadKind, num_labels: int) -> Plan:
    options = OPTIONS.get(method)
    return plan_for(model, epochs=epochs, method=method, method_options=options, head=head, num_labels=num_labels)


def paper_table() -> list[dict[str, Any]]:
    """The paper's values and ours for every setting, in millions, as plain data.

    `reproduced` is true where all of the paper's values are met within 0.1 M, false where not (`note` says why), and
    None where the text gives none in millions; the rounded shares that it gives are shown, and not judged.
    """
    table = []
    for row in ROWS:
        plan = row.plan()
        ours = (float(plan.baseline_updated_parameters) / 1e6, float(plan.updated_parameters) / 1e6)
        pairs = [(p, o) for p, o in zip((row.paper_baseline, row.paper_updated), ours, strict=True) if p is not None]
        table.append(
            {
                "source": row.source,
                "task": row.task,
                "model": row.model,
                "method": plan.method,
                "epochs": row.epochs,
                "paper_baseline_millions": row.paper_baseline,
                "paper_updated_millions": row.paper_updated,
                "baseline_millions": ours[0],
                "updated_millions": ours[1],
                "paper_saving_percent": row.paper_saving_percent,
                "saving_fraction": 1 - plan.share,
                "reproduced": all(abs(p - o) <= TOLERANCE for p, o in pairs) if pairs else None,
                "note": row.why_not,
            }
        )
    return table


def render_paper(table: list[dict[str, Any]] | None = None) -> RenderableType:
    """The table for the terminal; the reasons for values that are not reproduced stand below it."""
    from rich.table import Table
    from rich.text import Text

    table = paper_table() if table is None else table
    notes = list(dict.fromkeys(row["note"] for row in table if row["note"]))
    lines = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    caption = "\n".join(["(≈): the saving as the paper's text rounds it", *lines])
    shown = Table(title="Updated parameters (M): without stages → progtuning", caption=Text(caption), caption_justify="left")
    for name in ("of the paper", "model", "method"):
        shown.add_column(name, no_wrap=True)
    for name in ("epochs", "paper", "computed", "saved %"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("met", no_wrap=True)
    for row, after in zip(table, [*table[1:], None], strict=True):
        verdict = {True: "yes", False: "no", None: "–"}[row["reproduced"]]
        if row["note"]:
            verdict += f" [{notes.index(row['note']) + 1}]"
        stated = row["paper_saving_percent"]
        cells = (
            f"{row['source']} {row['task']}",
            row["model"],
            row["method"],
            str(row["epochs"]),
            f"{_paper(row['paper_baseline_millions'])} → {_paper(row['paper_updated_millions'])}",
            f"{_ours(row['baseline_millions'])} → {_ours(row['updated_millions'])}",
            f"{100 * row['saving_fraction']:.1f}" + ("" if stated is None else f" (≈{stated})"),
            verdict,
        )
        last = after is None or (after["source"], after["method"]) != (row["source"], row["method"])
        shown.add_row(*(Text(cell) for cell in cells), end_section=last)
    return shown


def _paper(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def _ours(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"
