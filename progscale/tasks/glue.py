"""The nine tasks of GLUE, from a folder in the official layout or from the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from progscale.errors import DataError
from progscale.tasks.base import register
from progscale.tasks.files import Table, find_file, listed, read_tsv, read_tsv_header
from progscale.tasks.hub import load_hub, pick_split
from progscale.tasks.labels import UNLABELLED, numbers_of
from progscale.tasks.sentence import Examples, SentenceTask

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueSpec:
    """How one task of GLUE is laid out.

    Attributes:
        folder: of the official download.
        texts: text columns of the official files.
        label: label column of the official files.
        hub_texts: text columns on the hub, whose label column is always "label".
        classes: names in the order of the hub's ids; empty for regression.
        raw_classes: the classes as the official files write them, in the same order.
        metrics: the primary one first.
        header: columns of the official files where these have no header.
        evaluation: split → official file.
        skips_broken_lines: the official files hold a few lines that are cut off; every known loader leaves them out.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    hub_texts: tuple[str, ...]
    classes: tuple[str, ...]
    raw_classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] = ()
    evaluation: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)
    skips_broken_lines: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_BINARY = ("0", "1")

GLUE: dict[str, GlueSpec] = {
    "cola": GlueSpec(
        "CoLA",
        ("sentence",),
        "label",
        ("sentence",),
        ("unacceptable", "acceptable"),
        _BINARY,
        metrics=("matthews_correlation", "accuracy"),
        header=("source", "label", "original_mark", "sentence"),
    ),
    "sst2": GlueSpec("SST-2", ("sentence",), "label", ("sentence",), ("negative", "positive"), _BINARY),
    "mrpc": GlueSpec(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        _PAIR,
        ("not_equivalent", "equivalent"),
        _BINARY,
        metrics=("accuracy", "f1"),
    ),
    "stsb": GlueSpec("STS-B", _PAIR, "score", _PAIR, (), (), metrics=("pearson", "spearman")),
    "qqp": GlueSpec(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        _BINARY,
        metrics=("accuracy", "f1"),
        skips_broken_lines=True,
    ),
    "mnli": GlueSpec(
        "MNLI",
        _PAIR,
        "gold_label",
        ("premise", "hypothesis"),
        _NLI,
        _NLI,
        evaluation=(("validation_matched", "dev_matched.tsv"), ("validation_mismatched", "dev_mismatched.tsv")),
    ),
    "qnli": GlueSpec("QNLI", ("question", "sentence"), "label", ("question", "sentence"), _ENTAILMENT, _ENTAILMENT),
    "rte": GlueSpec("RTE", _PAIR, "label", _PAIR, _ENTAILMENT, _ENTAILMENT),
    "wnli": GlueSpec("WNLI", _PAIR, "label", _PAIR, ("not_entailment", "entailment"), _BINARY),
}


class GlueTask(SentenceTask):
    """One task of GLUE.

    With `task.path` the official files are read: `train.tsv` and `dev.tsv` in that folder, or in the task's own folder
    (`CoLA`, `STS-B`) below it. Otherwise the data comes from the hub (`task.hub`, by default nyu-mll/glue).

    Args:
        config: the `task` section.
        seed: of subsets.
        name: "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte" or "wnli".

    Raises:
        DataError: a file is not there, or lacks a column.
    """

    def __init__(self, config: Any, *, seed: int = 0, name: str) -> None:
        self.spec = GLUE[name]
        self.label_names = self.spec.classes
        self.metric_names = self.spec.metrics
        super().__init__(name, config, seed=seed)
        self._files = self._find_files() if self.config_value("path") else {}
        header = list(self.spec.header) or None
        for path in self._files.values():
            self._require_columns(path, header or read_tsv_header(path))

    def read(self) -> dict[str, Examples]:
        """The splits "train" and "validation"; for MNLI "validation_matched" and "validation_mismatched"."""
        spec = self.spec
        if self._files:
            return {split: self._from_tsv(path) for split, path in self._files.items()}
        splits = load_hub(self.config_value("hub", HUB), self.name)
        return {
            split: self._from_hub(pick_split(splits, split, self.config_value("hub", HUB)))
            for split in ("train", *dict(spec.evaluation))
        }

    def _find_files(self) -> dict[str, Path]:
        folder = find_file(self.config_value("path"), "task.path")
        if not folder.is_dir():
            raise DataError(f"task.path: {folder} is a file; {self.name} needs the folder with train.tsv and dev.tsv")
        names = {"train": self.config_value("train_file", "train.tsv"), **dict(self.spec.evaluation)}
        if self.config_value("validation_file"):
            names[next(iter(dict(self.spec.evaluation)))] = self.config_value("validation_file")
        if not os.path.exists(folder / names["train"]):
            # A download of all of GLUE: the task's folder lies below, whatever its spelling.
            wanted = self.spec.folder.replace("-", "").lower()
            for entry in sorted(folder.iterdir()):
                if entry.is_dir() and entry.name.replace("-", "").replace("_", "").lower() == wanted:
                    folder = entry
                    break
        return {split: find_file(folder / file, f"task.path ({self.name}, {split})") for split, file in names.items()}

    def _require_columns(self, path: Path, header: list[str]) -> None:
        missing = [name for name in (*self.spec.texts, self.spec.label) if name not in header]
        if missing:
            raise DataError(
                f"{path}: line 1: {self.name} needs the columns {', '.join((*self.spec.texts, self.spec.label))}; "
                f"'{missing[0]}' is not among those found ({listed(header)})"
            )

    def _from_tsv(self, path: Path) -> Examples:
        spec = self.spec
        table = read_tsv(path, list(spec.header) or None, skip_broken=spec.skips_broken_lines)
        self._require_columns(path, list(table.columns))
        return self._examples(table, spec.texts, spec.label, spec.raw_classes)

    def _from_hub(self, table: Table) -> Examples:
        return self._examples(table, self.spec.hub_texts, "label", tuple(range(len(self.spec.classes))))

    def _examples(self, table: Table, columns: tuple[str, ...], label: str, values: tuple[Any, ...]) -> Examples:
        if not len(table):
            raise DataError(f"{table.name}: 0 rows")
        texts = []
        for name in columns:
            texts.append(table.column(name, self.name))
            for row, text in enumerate(texts[-1]):
                # An empty text is let through: QQP has some.
                if not isinstance(text, str):
                    raise DataError(f"{table.name}: {table.where(row)}: '{name}' is {text!r}, text is needed")
        if not self.label_names:
            labels = numbers_of(table, label)
            if (unlabelled := np.flatnonzero(labels == -1)).size:
                raise DataError(f"{table.name}: {table.where(int(unlabelled[0]))}: the label is -1; {UNLABELLED}")
        else:
            labels = self._class_ids(table, label, values)
        return Examples(texts[0], texts[1] if len(texts) == 2 else None, labels, table.name)

    def _class_ids(self, table: Table, label: str, values: tuple[Any, ...]) -> np.ndarray:
        ids = {value: i for i, value in enumerate(values)}
        found = table.column(label, self.name)
        for row, value in enumerate(found):
            if value not in ids:
                reason = f"; {UNLABELLED}" if str(value) == "-1" else ""
                allowed = ", ".join(str(known) for known in values)
                raise DataError(
                    f"{table.name}: {table.where(row)}: the label '{label}' is {value!r}, not one of {allowed}{reason}"
                )
        return np.fromiter((ids[value] for value in found), dtype=np.int64, count=len(found))


for _name in GLUE:
    register(_name)(partial(GlueTask, name=_name))  # type: ignore[arg-type]
