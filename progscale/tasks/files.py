"""Reads the files users have: every fault ends in a DataError that names the file and the place in it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progscale.errors import DataError, nearest

log = logging.getLogger("progscale.data")

DELIMITER_NAMES = {"\t": "a tab", ";": "';'", ",": "','", "|": "'|'"}


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length.

    Attributes:
        name: of the file or data set, for messages.
        columns: by name, in the order of the file.
        where: row index → its place in the source ("line 7", "row 3").
        textual: whether every value was read from text, so that numbers are still strings.
        class_names: names of the classes of those columns whose source says them.
        hint: what may be wrong when a column is missing.
    """

    name: str
    columns: dict[str, list[Any]]
    where: Callable[[int], str]
    textual: bool = False
    class_names: dict[str, list[str]] | None = None
    hint: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, key: str) -> list[Any]:
        """The values of a column that the config names under `key`.

        Raises:
            DataError: no such column; the message lists those there are.
        """
        if name not in self.columns:
            close = nearest(name, filter(str.isprintable, self.columns))
            raise DataError(f"{key}: '{name}' is not a column of {self.name} ({listed(self.columns)}){close}{self.hint}")
        return self.columns[name]


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names for a message, however many and long they are and whatever is in them: a file's first line may be anything."""
    found = [text if text.isprintable() else repr(text) for text in map(str, names)]
    shown = [text if len(text) <= 40 else f"{text[:37]}…" for text in found[:most]]
    return ", ".join(shown) + (f", … ({len(found)} in all)" if len(found) > most else "") or "none"


def find_file(path: str | Path, key: str) -> Path:
    """The path of a file or folder that is there.

    Raises:
        DataError: it is not, and the message lists close names of the same folder; or it is a device or a pipe.
    """
    # Those of os.path take any text; Path's own fail for a user that does not exist or a name that is too long.
    found = Path(os.path.expanduser(path))
    if os.path.isdir(found) and not os.access(found, os.R_OK | os.X_OK):
        raise DataError(f"{key}: the folder {found} cannot be read (no permission)")
    if os.path.isfile(found) or os.path.isdir(found):
        return found
    if os.path.exists(found):
        raise DataError(f"{key}: {found} is neither a file nor a folder")
    parent = found.parent
    if not os.path.isdir(parent):
        raise DataError(f"{key}: no such file: {found} (there is no folder {parent})")
    try:
        beside = sorted(entry.name for entry in parent.iterdir())
    except OSError as error:
        raise DataError(f"{key}: no such file: {found} (its folder cannot be read: {error.strerror})") from None
    there = listed(beside, 10) if beside else "nothing"
    raise DataError(f"{key}: no such file: {found} (in its folder: {there}){nearest(found.name, beside)}")


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where its name ends in .gz.

    Raises:
        DataError: it is empty, cannot be read or unpacked.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    return data


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        DataError: it is empty or not UTF-8; the message gives line and byte offset.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding"
        raise DataError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}); "
            f"it looks like {kind}, save it as UTF-8"
        ) from None


def read_tsv_header(path: Path) -> list[str]:
    """The columns that the first line names, without reading the rest.

    Raises:
        DataError: the file is empty or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            first = file.readline().decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        first = ""
    # Reading it all says what is wrong with a file that has no first line.
    return (first or read_text(path).split("\n")[0]).split("\t")


def read_tsv(path: Path, header: list[str] | None = None, *, skip_broken: bool = False) -> Table:
    """A table in GLUE's layout: tabs divide, quotes mean nothing, one row a line.

    Args:
        path: the file.
        header: names of the columns where the file has no header.
        skip_broken: leave out lines with too few fields (at most one in a hundred), and say how many.

    Raises:
        DataError: a line has another number of fields than the header.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    first = 0 if header else 1
    names = header or lines[0].split("\t")
    rows: list[list[str]] = []
    numbers: list[int] = []
    broken: list[int] = []
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) == len(names):
            rows.append(fields)
            numbers.append(number)
        elif skip_broken and len(fields) < len(names) and len(broken) <= len(lines) / 100:
            broken.append(number)
        else:
            raise DataError(f"{path}: line {number} has {len(fields)} fields, {len(names)} are expected ({listed(names)})")
    if broken:
        log.warning("%s: %d lines with too few fields are left out, first: line %d", path, len(broken), broken[0])
    return _from_rows(str(path), names, rows, numbers)


def read_csv(path: Path, delimiter: str | None = None) -> Table:
    """A table with a header; fields may stand in double quotes.

    In a file divided by tabs, quotes are taken literally where reading them as quotes does not work out, or would join lines
    each of which is a whole row by itself.

    Args:
        path: the file.
        delimiter: None takes a tab for `.tsv` and `.tab`, else a comma.

    Raises:
        DataError: it cannot be read as such a table.
    """
    text = read_text(path)
    delimiter = delimiter or ("\t" if path.name.removesuffix(".gz").endswith((".tsv", ".tab")) else ",")
    try:
        table = _parse_csv(path, text, delimiter)
    except DataError:
        if delimiter != "\t":
            raise
        return read_tsv(path)
    if delimiter == "\t" and _joins_whole_lines(text, len(table)):
        return read_tsv(path)
    if len(table.columns) == 1:
        (only,) = table.columns
        for other, shown in DELIMITER_NAMES.items():
            if other != delimiter and other in only:
                used = DELIMITER_NAMES.get(delimiter, repr(delimiter))
                hint = (
                    f"; split at {used} its header is one column, but it contains {shown}: "
                    f"set task.delimiter to {json.dumps(other)}"
                )
                return Table(table.name, table.columns, table.where, textual=True, hint=hint)
    return table


def _joins_whole_lines(text: str, rows: int) -> bool:
    """Whether quotes made fewer rows than there are lines, all of which have the header's number of tabs."""
    lines = [line for line in text.splitlines() if line]
    return rows < len(lines) - 1 and len({line.count("\t") for line in lines}) == 1


def _parse_csv(path: Path, text: str, delimiter: str) -> Table:
    with _wide_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows: list[list[str]] = []
        numbers: list[int] = []
        begin = 1
        try:
            names = next(reader)
            begin = reader.line_num + 1
            for row in reader:
                if row:
                    if len(row) != len(names):
                        raise DataError(
                            f"{path}: line {begin} has {len(row)} fields, the header has {len(names)} "
                            f"({listed(names)}){_delimiter_hint(names, delimiter)}"
                        )
                    rows.append(row)
                    numbers.append(begin)
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}: the row at line {begin} is not valid CSV ({error}); a quote inside quotes is doubled"
            ) from None
    return _from_rows(str(path), names, rows, numbers)


def _delimiter_hint(names: list[str], delimiter: str) -> str:
    for other, shown in DELIMITER_NAMES.items():
        if len(names) == 1 and other != delimiter and other in names[0]:
            return f"; the header contains {shown}: set task.delimiter to {json.dumps(other)}"
    return ""


@contextmanager
def _wide_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 128 KiB a field, which is global to the process, for the time of a reading."""
    old = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(old)


def _from_rows(name: str, names: list[str], rows: list[list[str]], numbers: list[int]) -> Table:
    names = [column.strip() for column in names]
    if len(set(names)) != len(names):
        twice = sorted({column for column in names if names.count(column) > 1})
        raise DataError(f"{name}: the header has the column '{listed(twice[:1])}' twice ({listed(names)})")
    columns: dict[str, list[Any]] = {column: list(values) for column, values in zip(names, zip(*rows, strict=True), strict=False)}
    if not rows:
        columns = {column: [] for column in names}
    return Table(name, columns, lambda row: f"line {numbers[row]}", textual=True)


def read_json(path: Path) -> Any:
    """Any JSON value.

    Raises:
        DataError: not JSON (line, column).
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None


def read_json_table(path: Path) -> Table:
    """A list of objects, an object of columns, or an object with such a list under "data".

    Raises:
        DataError: it is none of these.
    """
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        sizes = {name: len(column) for name, column in value.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"{path}: its columns differ in length: {listed(f'{name} {size}' for name, size in sizes.items())}")
        return Table(str(path), value, lambda row: f"row {row + 1}")
    if not isinstance(value, list):
        raise DataError(f"{path}: a list of objects or an object of lists is needed, not a {type(value).__name__}")
    return _from_objects(path, value, [f"row {i + 1}" for i in range(len(value))])


def read_jsonl(path: Path) -> Table:
    """One object a line.

    Raises:
        DataError: a line is not a JSON object.
    """
    objects, places = [], []
    # Only "\n" ends a line: JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error.msg} at column {error.colno}") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}: line {number} cannot be read as JSON ({error})") from None
        places.append(f"line {number}")
    return _from_objects(path, objects, places)


def _from_objects(path: Path, objects: list[Any], places: list[str]) -> Table:
    names: dict[str, None] = {}
    for value, place in zip(objects, places, strict=True):
        if not isinstance(value, dict):
            raise DataError(f"{path}: {place} is a {type(value).__name__}, an object is needed")
        names.update(dict.fromkeys(value))
    columns = {name: [value.get(name) for value in objects] for name in names}
    if objects and not names:
        raise DataError(f"{path}: its rows have no columns")
    return Table(str(path), columns, places.__getitem__)


def read_parquet(path: Path) -> Table:
    """A parquet file.

    Raises:
        DataError: it is damaged or not parquet.
    """
    import pyarrow
    import pyarrow.parquet

    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty")
    try:
        # Without memory mapping and partition discovery: one file, read whole.
        table = pyarrow.parquet.ParquetFile(path).read()
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    return Table(str(path), columns, lambda row: f"row {row + 1}")


def read_lines(path: Path) -> Table:
    """A text in each line that is not blank, as the column "text".

    Raises:
        DataError: it is empty or not UTF-8.
    """
    kept = [(number, line) for number, line in enumerate(read_text(path).splitlines(), start=1) if line.strip()]
    return Table(str(path), {"text": [line for _, line in kept]}, lambda row: f"line {kept[row][0]}", textual=True)


def read_file(path: Path, delimiter: str | None = None, *, lines: bool = False) -> Table:
    """A table by the ending of its file name.

    Args:
        path: the file.
        delimiter: of a csv file.
        lines: a .txt file holds a text in each line, and no table.

    Raises:
        DataError: the ending is not known, or the content cannot be read.
    """
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    if lines and ending == ".txt":
        return read_lines(path)
    if ending in (".csv", ".tsv", ".tab", ".txt"):
        return read_csv(path, delimiter)
    readers = {".json": read_json_table, ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".parquet": read_parquet}
    if ending not in readers:
        known = ".csv, .tsv, .json, .jsonl, .parquet (or a folder of datasets.save_to_disk)"
        raise DataError(f"{path}: the ending '{ending}' is not known; known: {known}")
    return readers[ending](path)
