"""The user's own data: classes or numbers for one or two texts, out of a file, a saved data set or the hub."""

from __future__ import annotations

import logging
from typing import Any

from progscale.errors import DataError
from progscale.tasks.base import register
from progscale.tasks.files import Table, listed
from progscale.tasks.labels import class_ids, find_classes, has_fractions, numbers_of, texts_of
from progscale.tasks.sentence import Examples, SentenceTask
from progscale.tasks.sources import find_tables, rows_aside

log = logging.getLogger("progscale.data")

# The column that is read where no other is named, as data sets on the hub call it.
DEFAULT_TEXT = "text"


@register("table")
class TableTask(SentenceTask):
    """Classification or regression over one or two text columns.

    Where `problem_type` does not say which, labels with a decimal fraction make it a regression.
    The files are read when the task is built, because the labels decide the head. Where they come from:
    `train_file` and `validation_file` (relative to `path`, if that is given); or `path`: one file, a folder of
    `datasets.save_to_disk`, or a folder with train.* and validation.* (dev.*) in it; or `hub`. Without validation
    data `validation_fraction` of the training rows is set aside, the same share of each class.

    Args:
        config: the `task` section.
        seed: decides which rows are set aside.

    Raises:
        DataError: the data cannot be used.
    """

    def __init__(self, config: Any, *, seed: int = 0) -> None:
        self.config = config
        kind = self.config_value("problem_type")
        if kind not in ("classification", "regression", None):
            raise DataError(f"task.problem_type: '{kind}' is not one of classification, regression")
        self._tables = find_tables(config)
        label = self.config_value("label_column", "label")
        if kind is None and not self.config_value("labels") and has_fractions(self._tables[0], label):
            kind = "regression"
            log.info("the labels '%s' have decimal fractions: task.problem_type is taken as regression", label)
        self._regression = kind == "regression"
        self.metric_names = ("pearson", "spearman", "mse", "mae") if self._regression else ("accuracy", "f1")
        super().__init__("table", config, seed=seed)
        self._read = self._load()

    def read(self) -> dict[str, Examples]:
        """The splits "train" and "validation"."""
        return self._read

    def _load(self) -> dict[str, Examples]:
        train, validation = self._tables
        names: list[str] | None = self.config_value("labels")
        names = [str(name) for name in names] if names else None
        columns = self._text_columns(train)
        label = self.config_value("label_column", "label")
        for table in (train, validation):
            if table is not None and not len(table):
                raise DataError(f"{table.name}: 0 rows")
        # The columns first: a wrong name is said before what is wrong inside another column.
        for name in columns:
            train.column(name, "task.text_columns")
        train.column(label, "task.label_column")
        if not self._regression:
            self.label_names = find_classes(train, label, names)
        examples = self._examples(train, columns, label, names)
        if validation is not None:
            return {"train": examples, "validation": self._examples(validation, columns, label, names)}
        kept, aside = rows_aside(
            train.name,
            self.config_value("validation_fraction"),
            self.seed,
            len(examples),
            None if self._regression else examples.labels,
        )
        return {"train": examples.take(kept), "validation": examples.take(aside)}

    def _text_columns(self, table: Table) -> list[str]:
        columns = self.config_value("text_columns")
        if columns is None and DEFAULT_TEXT in table.columns:
            return [DEFAULT_TEXT]
        columns = [columns] if isinstance(columns, str) else list(columns or [])
        if len(columns) not in (1, 2) or len(set(columns)) != len(columns):
            raise DataError(
                f"task.text_columns: one or two different columns are needed, not {len(columns)} "
                f"({', '.join(columns) or 'none'}); {table.name} has: {listed(table.columns)}{table.hint}"
            )
        return columns

    def _examples(self, table: Table, columns: list[str], label: str, names: list[str] | None) -> Examples:
        texts = [texts_of(table, name) for name in columns]
        if self._regression:
            labels = numbers_of(table, label)
        else:
            labels = class_ids(table, label, self.label_names, names)
        return Examples(texts[0], texts[1] if len(texts) == 2 else None, labels, table.name)
