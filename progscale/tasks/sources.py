"""Where the user's own data lies, and the rows of it that are set aside for evaluation."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from progscale.errors import DataError
from progscale.tasks.files import Table, find_file, listed, read_file
from progscale.tasks.hub import is_disk_folder, load_disk, load_hub, pick_split

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz")
EVAL_NAMES = ("validation", "dev", "valid", "val", "eval")
DEFAULT_FRACTION = 0.1
LINES = (".txt", ".txt.gz")

log = logging.getLogger("progscale.data")


def find_tables(config: Any, *, lines: bool = False) -> tuple[Table, Table | None]:
    """The training and, where there is one, the validation table of a task over the user's own data.

    Where they come from: `train_file` and `validation_file` (relative to `path`, if that is given); or `path`: one file, a
    folder of `datasets.save_to_disk`, or a folder with train.* and validation.* (dev.*) in it; or `hub`.

    Args:
        config: the `task` section.
        lines: a .txt file holds a text in each line (column "text"), and no table.

    Raises:
        DataError: there is no such data, or it cannot be read.
    """
    path, hub = getattr(config, "path", None), getattr(config, "hub", None)
    train_file, validation_file = getattr(config, "train_file", None), getattr(config, "validation_file", None)
    delimiter = getattr(config, "delimiter", None)
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise DataError(f"task.delimiter: {delimiter!r} has to be one character, and neither a quote nor a line end")
    base = Path(os.path.expanduser(path)) if path else Path()

    def from_file(name: str, key: str) -> Table:
        found = find_file(base / os.path.expanduser(name), key)
        if found.is_dir():
            raise DataError(f"{key}: {found} is a folder; name a file, or the folder as task.path")
        return read_file(found, delimiter, lines=lines)

    if train_file:
        train = from_file(train_file, "task.train_file")
        return train, from_file(validation_file, "task.validation_file") if validation_file else None
    if path:
        splits = _from_path(find_file(path, "task.path"), delimiter, lines)
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
    if getattr(config, "validation_fraction", None) is None:
        for name in EVAL_NAMES:
            if name in splits:
                return train, splits[name]
    return train, None


def _from_path(path: Path, delimiter: str | None, lines: bool) -> dict[str, Table]:
    if os.path.isfile(path):
        return {"train": read_file(path, delimiter, lines=lines)}
    if is_disk_folder(path):
        return load_disk(path)
    found: dict[str, Table] = {}
    endings = ENDINGS + (LINES if lines else ())
    for split in ("train", *EVAL_NAMES):
        files = [path / f"{split}{ending}" for ending in endings if (path / f"{split}{ending}").is_file()]
        if len(files) > 1:
            raise DataError(f"task.path: {path} has both {files[0].name} and {files[1].name}; name task.train_file")
        if files:
            found[split] = read_file(files[0], delimiter, lines=lines)
    if "train" not in found:
        there = listed(sorted(entry.name for entry in path.iterdir()), 10)
        raise DataError(f"task.path: {path} holds no train file ({', '.join(endings[:6])}); it holds: {there}")
    return found


def rows_aside(
    name: str, fraction: float | None, seed: int, rows: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows set aside), where there is no other data for evaluation.

    Args:
        name: of the data, for messages.
        fraction: `task.validation_fraction`; None takes a tenth, and says so.
        seed: of the draw.
        rows: of the data.
        labels: class ids of all rows, the same share of each of which is set aside; None for no classes.

    Raises:
        DataError: a side would be empty.
    """
    if fraction is None:
        fraction = DEFAULT_FRACTION
        log.info("no validation data given: %g of %s is set aside for it", fraction, name)
    if not 0 < fraction < 1:
        raise DataError(f"task.validation_fraction: {fraction} is not between 0 and 1")
    kept, aside = split_rows(np.zeros(rows) if labels is None else labels, fraction, seed, stratify=labels is not None)
    if not len(kept) or not len(aside):
        raise DataError(
            f"{name}: {rows} rows are too few to set {fraction:g} of them aside "
            "(task.validation_fraction): at least one row has to be on each side"
        )
    return kept, aside


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
