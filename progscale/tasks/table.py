"""The user's own data: classes or numbers for one or two texts, out of a file, a saved data set or the hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from progscale.errors import DataError
from progscale.tasks.base import register
from progscale.tasks.files import Table, find_file, listed, read_file
from progscale.tasks.hub import is_disk_folder, load_disk, load_hub, pick_split
from progscale.tasks.labels import class_ids, find_classes, has_fractions, numbers_of, texts_of
from progscale.tasks.sentence import Examples, SentenceTask

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz")
EVAL_NAMES = ("validation", "dev", "valid", "val", "eval")
DEFAULT_FRACTION = 0.1

log = logging.getLogger("progscale.data")


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
        self._tables = self._find_tables()
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
        fraction = self.config_value("validation_fraction")
        if fraction is None:
            fraction = DEFAULT_FRACTION
            log.info("no validation data given: %g of %s is set aside for it", fraction, train.name)
        if not 0 < fraction < 1:
            raise DataError(f"task.validation_fraction: {fraction} is not between 0 and 1")
        kept, aside = split_rows(examples.labels, fraction, self.seed, stratify=not self._regression)
        if not len(kept) or not len(aside):
            raise DataError(
                f"{train.name}: {len(examples)} rows are too few to set {fraction:g} of them aside "
                "(task.validation_fraction): at least one row has to be on each side"
            )
        return {"train": examples.take(kept), "validation": examples.take(aside)}

    def _text_columns(self, table: Table) -> list[str]:
        columns = self.config_value("text_columns") or []
        columns = [columns] if isinstance(columns, str) else list(columns)
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

    def _find_tables(self) -> tuple[Table, Table | None]:
        """The training and, where there is one, the validation table."""
        path, hub = self.config_value("path"), self.config_value("hub")
        train_file, validation_file = self.config_value("train_file"), self.config_value("validation_file")
        delimiter = self.config_value("delimiter")
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise DataError(f"task.delimiter: {delimiter!r} has to be one character, and neither a quote nor a line end")
        base = Path(os.path.expanduser(path)) if path else Path()

        def from_file(name: str, key: str) -> Table:
            found = find_file(base / os.path.expanduser(name), key)
            if found.is_dir():
                raise DataError(f"{key}: {found} is a folder; name a file, or the folder as task.path")
            return read_file(found, delimiter)

        if train_file:
            train = from_file(train_file, "task.train_file")
            return train, from_file(validation_file, "task.validation_file") if validation_file else None
        if path:
            splits = self._from_path(find_file(path, "task.path"), delimiter)
        elif hub:
            splits = load_hub(hub)
        else:
            raise DataError("task: no data given: set task.train_file, task.path or task.hub")
        train = pick_split(splits, "train", str(path or hub))
        if validation_file:
            if os.path.isfile(base):
                base = base.parent
            return train, from_file(validation_file, "task.validation_file")
        # A fraction asked for by name wins over a split that happens to lie there.
        if self.config_value("validation_fraction") is None:
            for name in EVAL_NAMES:
                if name in splits:
                    return train, splits[name]
        return train, None

    @staticmethod
    def _from_path(path: Path, delimiter: str | None) -> dict[str, Table]:
        if os.path.isfile(path):
            return {"train": read_file(path, delimiter)}
        if is_disk_folder(path):
            return load_disk(path)
        found: dict[str, Table] = {}
        for split in ("train", *EVAL_NAMES):
            files = [path / f"{split}{ending}" for ending in ENDINGS if (path / f"{split}{ending}").is_file()]
            if len(files) > 1:
                raise DataError(f"task.path: {path} has both {files[0].name} and {files[1].name}; name task.train_file")
            if files:
                found[split] = read_file(files[0], delimiter)
        if "train" not in found:
            there = listed(sorted(entry.name for entry in path.iterdir()), 10)
            raise DataError(f"task.path: {path} holds no train file ({', '.join(ENDINGS[:6])}); it holds: {there}")
        return found


def split_rows(labels: np.ndarray, fraction: float, seed: int, *, stratify: bool) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows set aside), both ascending; the same for the same arguments.

    Args:
        labels: of all rows, shape `(rows,)`.
        fraction: to set aside.
        seed: of the draw.
        stratify: take the same share of each class; every class keeps a row to train on.
    """
    order = np.random.default_rng([seed, 11]).permutation(len(labels))
    if not stratify:
        count = round(fraction * len(labels))
        return np.sort(order[count:]), np.sort(order[:count])
    # Rows of a class in random order, each at its quantile: the lowest quantiles overall are the same share of each.
    quantile = np.empty(len(labels))
    first = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        quantile[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        first[rows[-1]] = True
    count = round(fraction * len(labels))
    candidates = np.lexsort((order.argsort(), quantile))
    aside = candidates[~first[candidates]][:count]
    kept = np.setdiff1d(np.arange(len(labels)), aside)
    return kept, np.sort(aside)
