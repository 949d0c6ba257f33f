"""Labels as users write them, to class ids or numbers; text columns, checked. Faults name the row."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from progscale.errors import DataError, nearest
from progscale.tasks.files import Table, listed

# Canonical only: "01" and "1" stay two different names.
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
UNLABELLED = "-1 marks rows without a label, as in GLUE's test files; leave them out"
FLOAT32_MAX = float(np.finfo(np.float32).max)

log = logging.getLogger("progscale.data")


def texts_of(table: Table, column: str, key: str = "task.text_columns") -> list[str]:
    """A text column, which the config names under `key`.

    Raises:
        DataError: no such column, or a value is null, an empty cell of a text file, or no text.
    """
    values = table.column(column, key)
    for row, value in enumerate(values):
        if value is None or (table.textual and not value):
            raise DataError(f"{table.name}: {table.where(row)}: '{column}' has no text (null or empty)")
        if not isinstance(value, str):
            raise DataError(
                f"{table.name}: {table.where(row)}: '{column}' holds {_show(value)}, a {type(value).__name__}; text is needed"
            )
    return values


def numbers_of(table: Table, column: str) -> np.ndarray:
    """A label column for regression; float32, shape `(rows,)`.

    Raises:
        DataError: no such column, or a value is no finite number.
    """
    values = table.column(column, "task.label_column")
    result = np.empty(len(values), dtype=np.float32)
    for row, value in enumerate(values):
        if table.textual and isinstance(value, str):
            # float() alone would also take "1_000", "nan" and digits of other scripts.
            number = float(value) if _DECIMAL.fullmatch(value.strip()) else math.nan
        else:
            real = isinstance(value, int | float) and not isinstance(value, bool)
            number = _as_float(value) if real else math.nan
        if not abs(number) <= FLOAT32_MAX:
            raise DataError(
                f"{table.name}: {table.where(row)}: the label '{column}' is {_show(value)}, a finite number is needed"
            )
        result[row] = number
    return result


def has_fractions(table: Table, column: str) -> bool:
    """Whether all labels are numbers and some have a decimal fraction; 1.0 has none and may stand for a class."""
    values = table.columns.get(column, [])
    if table.textual:
        values = [float(value) if _DECIMAL.fullmatch(value.strip()) else value for value in values]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and any(isinstance(value, float) and not value.is_integer() for value in values)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def class_values(table: Table, column: str, names: Sequence[str] | None) -> list[int] | list[str]:
    """A label column for classification: integers, or strings.

    Args:
        table: the data.
        column: of the labels.
        names: the classes that the config gives; numbers among them are then names like any other.

    Raises:
        DataError: no such column, or a value is null, a decimal number, or of another type than the one before.
    """
    values = table.column(column, "task.label_column")
    if table.class_names and column in table.class_names:
        known = table.class_names[column]
        _refuse_unlabelled(table, column, values)
        values = [known[v] if type(v) is int and 0 <= v < len(known) else v for v in values]
    kind: type | None = None
    for row, value in enumerate(values):
        place = f"{table.name}: {table.where(row)}: the label '{column}'"
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{place} is missing (null or empty)")
        if isinstance(value, float):
            raise DataError(f"{place} is {value!r}, a decimal number; for numbers set task.problem_type to 'regression'")
        if not isinstance(value, bool | int | str):
            raise DataError(f"{place} is {_show(value)}, a {type(value).__name__}; an integer or a string is needed")
        if kind is not None and type(value) is not kind:
            raise DataError(f"{place} is {_show(value)}, a {type(value).__name__}; the ones before are {kind.__name__}")
        kind = type(value)
    if kind is bool:
        return [str(value).lower() for value in values]
    if kind is str:
        values = [value.strip() for value in values]
        if table.textual:
            return _from_text(table, column, values, names)
    return values


def _from_text(table: Table, column: str, values: list[str], names: Sequence[str] | None) -> list[int] | list[str]:
    if names is not None and set(values) <= set(names):
        return values
    if all(_INTEGER.fullmatch(value) and len(value) < 19 for value in values):
        return [int(value) for value in values]
    if all(_DECIMAL.fullmatch(value) for value in values):
        row = next(row for row, value in enumerate(values) if not _INTEGER.fullmatch(value))
        raise DataError(
            f"{table.name}: {table.where(row)}: the label '{column}' is {values[row]}, a decimal number; "
            "for numbers set task.problem_type to 'regression'"
        )
    return values


def find_classes(table: Table, column: str, names: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in the order of their ids: as the config or the data set gives them, else the values, sorted.

    Raises:
        DataError: the labels cannot be used; a row has -1; there is one class only.
    """
    if names is not None and len(set(names)) != len(names):
        raise DataError(f"task.labels: a name is there twice: {', '.join(names)}")
    values = class_values(table, column, names)
    if names is not None:
        found: tuple[str, ...] = tuple(names)
    elif table.class_names and column in table.class_names:
        found = tuple(table.class_names[column])
        _refuse_unlabelled(table, column, values)
    else:
        _refuse_unlabelled(table, column, values)
        found = tuple(str(value) for value in sorted(set(values)))  # type: ignore[type-var]
        if len(found) > 1 and any(isinstance(value, str) for value in values[:1]):
            ids = listed(f"{name} = {i}" for i, name in enumerate(found))
            log.info("%s: classes of '%s' in sorted order: %s", table.name, column, ids)
        if len(values) >= 20 and len(found) > len(values) / 2:
            log.warning(
                "%s: '%s' has %d different labels in %d rows: is it the label column, or is this a regression?",
                table.name,
                column,
                len(found),
                len(values),
            )
    present = {str(value) for value in values}
    if len(found) < 2 or len(present) < 2:
        shown = listed(present)
        raise DataError(f"{table.name}: the label column '{column}' has one class only ({shown}); two or more are needed")
    return found


def class_ids(table: Table, column: str, classes: Sequence[str], names: Sequence[str] | None) -> np.ndarray:
    """The id of each row's class; int64, shape `(rows,)`.

    Args:
        table: the data.
        column: of the labels.
        classes: from `find_classes`.
        names: the classes that the config gives, None where it gives none.

    Raises:
        DataError: a label is none of the classes.
    """
    values = class_values(table, column, names)
    ids = {name: i for i, name in enumerate(classes)}
    given: dict[Any, int] = dict(ids)
    if not all(str(value) in ids for value in values) and names is not None and values and type(values[0]) is int:
        # Integers beside a list of names are ids already.
        given = {i: i for i in range(len(classes))}
    else:
        values = [str(value) for value in values]
    if any(value not in given for value in values):
        row = next(row for row, value in enumerate(values) if value not in given)
        _refuse_unlabelled(table, column, values)
        close = nearest(str(values[row]), filter(str.isprintable, classes))
        raise DataError(
            f"{table.name}: {table.where(row)}: the label '{column}' is {_show(values[row])}, "
            f"which is none of the {len(given)} known ({listed(given)}){close}"
        )
    return np.fromiter((given[value] for value in values), dtype=np.int64, count=len(values))


def _refuse_unlabelled(table: Table, column: str, values: Sequence[Any]) -> None:
    for row, value in enumerate(values):
        if value in (-1, "-1"):
            raise DataError(f"{table.name}: {table.where(row)}: the label '{column}' is -1; {UNLABELLED}")


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "…"
