"""The paper's numbers of updated parameters beside ours, counted on real models on the meta device.

Source: Progtuning (arXiv 2506.21119), section 4.2, Tables 2 and 3. The PEFT rows are counted from the models that the methods
make, as a run trains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """One line of the paper and the setting that it was counted in.

    Attributes:
        task: as the paper names it.
        model: well-known architecture.
        method: registered, with its options in `OPTIONS`.
        epochs: of the run, a stage each.
        paper_baseline: the paper's updated parameters without stages, in millions; None where it does not say.
        paper_updated: with progtuning, in millions; None where the text gives no number.
        head: of the model.
        num_labels: outputs of a classification head.
        why_not: the reason when the rule does not give the paper's number.
    """

    task: str
    model: str
    method: str
    epochs: int
    paper_baseline: float | None
    paper_updated: float | None
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

ROWS: tuple[PaperRow, ...] = (
    PaperRow("GLUE", "bert-base-uncased", "full", 3, None, None),
    PaperRow("GLUE", "bert-large-uncased", "full", 3, 1005.4, 703.1),
    PaperRow("SQuAD v1.1", "bert-base-uncased", "full", 3, None, 241.6, head="question_answering"),
    PaperRow("SQuAD v2.0", "bert-base-uncased", "full", 2, 217.7, 175.3, head="question_answering"),
    PaperRow("GLUE", "bert-base-uncased", "bitfit", 8, 0.8, 0.5),
    PaperRow("GLUE", "bert-base-uncased", "bitfit", 10, 1.0, 0.6),
    PaperRow("GLUE", "roberta-base", "lora", 25, 22.2, 18.9),
    PaperRow("GLUE", "roberta-base", "lora", 30, 26.6, 22.6),
    PaperRow("GLUE, 3 labels", "roberta-base", "lora", 30, 26.6, 22.6, num_labels=3),
    PaperRow("GLUE, regression", "roberta-base", "lora", 40, 35.4, 30.1, num_labels=1),
    PaperRow("GLUE", "roberta-base", "lora", 60, 53.2, 45.1),
    PaperRow("GLUE", "roberta-base", "lora", 80, 70.9, 60.2),
    PaperRow("GLUE", "bert-base-uncased", "adapter", 16, 28.6, 9.9, why_not=_HALF),
    PaperRow("GLUE", "bert-base-uncased", "adapter", 20, 35.8, 11.9, why_not=_HALF),
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
    None where the paper gives no number.
    """
    table = []
    for row in ROWS:
        plan = row.plan()
        ours = (float(plan.baseline_updated_parameters) / 1e6, float(plan.updated_parameters) / 1e6)
        pairs = [(p, o) for p, o in zip((row.paper_baseline, row.paper_updated), ours, strict=True) if p is not None]
        table.append(
            {
                "task": row.task,
                "model": row.model,
                "method": plan.method,
                "epochs": row.epochs,
                "paper_baseline_millions": row.paper_baseline,
                "paper_updated_millions": row.paper_updated,
                "baseline_millions": ours[0],
                "updated_millions": ours[1],
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
    caption = "\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1))
    shown = Table(title="Updated parameters (M): without stages → progtuning", caption=Text(caption), caption_justify="left")
    for name in ("task", "model", "method"):
        shown.add_column(name)
    for name in ("epochs", "paper", "computed", "saving"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("reproduced")
    for row in table:
        verdict = {True: "yes", False: "no", None: "(no number)"}[row["reproduced"]]
        if row["note"]:
            verdict += f" [{notes.index(row['note']) + 1}]"
        cells = (
            row["task"],
            row["model"],
            row["method"],
            str(row["epochs"]),
            f"{_paper(row['paper_baseline_millions'])} → {_paper(row['paper_updated_millions'])}",
            f"{_ours(row['baseline_millions'])} → {_ours(row['updated_millions'])}",
            f"{100 * row['saving_fraction']:.1f} %",
            verdict,
        )
        shown.add_row(*(Text(cell) for cell in cells))
    return shown


def _paper(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def _ours(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"
