"""Any content of a data file ends in usable splits, or in one line that says what is wrong; never in another exception."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import example
from hypothesis import strategies as st

from progscale.errors import ConfigError, DataError
from progscale.tasks.base import TASKS
from progscale.tasks.glue import GLUE
from tests.harness.fuzz import fuzz

NAMES = ("text", "other", "label", "Label", "", " text ")
# What cells of real files are made of, and what divides and quotes them.
PIECES = (
    "a",
    "the fox",
    "0",
    "1",
    "-1",
    "2.5",
    "nan",
    "1e999",
    "yes",
    "no",
    "true",
    " ",
    "",
    '"',
    '""',
    "'",
    "\\",
    "é",
    "\u2028",
)
MARKS = (",", ";", "\t", "|", "\n", "\r\n", "\r", "\0", "\ufeff", "\x85")
PIECE = st.sampled_from(PIECES) | st.text(max_size=3)
CELL = st.lists(PIECE, max_size=3).map("".join)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-1, 2) | st.floats() | CELL | st.just("\ud800") | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
    max_leaves=3,
)
OBJECT = st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=4) | st.fixed_dictionaries({"text": CELL, "label": VALUE})
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "text_columns": st.lists(st.sampled_from(["text", "other", "label", "txt"]), min_size=1, max_size=2, unique=True),
        "label_column": st.sampled_from(["label", "Label", "other", "lable"]),
        "labels": st.lists(CELL.filter(bool), min_size=2, max_size=4, unique=True),
        "problem_type": st.sampled_from(["classification", "regression"]),
        "delimiter": st.sampled_from([",", ";", "\t", "|", '"', " ", "a", "\n", "é"]),
        "validation_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "max_train_examples": st.integers(1, 5),
        "max_eval_examples": st.integers(1, 5),
        "metric": st.sampled_from(["accuracy", "pearson", "f2"]),
    },
)


@st.composite
def tables(draw: st.DrawFn) -> str:
    """A file of rows and fields, most of them well formed; now and then a stray piece, quote or line end."""
    mark = draw(st.sampled_from(MARKS[:4]))
    header = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4) | st.just(["text", "label"]))
    rows = draw(st.lists(st.lists(CELL, min_size=len(header), max_size=len(header)), max_size=6))
    quoted = draw(st.booleans())

    def field(cell: str) -> str:
        doubled = cell.replace('"', '""')
        return f'"{doubled}"' if quoted else cell

    lines = [mark.join(map(field, row)) for row in [header, *rows]]
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(PIECE | st.sampled_from(MARKS)) + text[place:]
    return text


def outcome(options: dict[str, Any], name: str = "table") -> Any:
    """The task, checked; or what is said instead, which is one line. Any other exception fails the test."""
    try:
        task = TASKS.get(name)(SimpleNamespace(**options), seed=0)
        task.check()
    except (DataError, ConfigError) as error:
        message = str(error)
    else:
        return task
    assert len(message.splitlines()) == 1 and len(message) < 1500, message
    return message


def usable(task: Any) -> None:
    """What follows relies on this."""
    splits = task.splits()
    assert {"train"} < set(splits)
    for name, split in splits.items():
        assert len(split) == len(split.labels) >= 1
        assert split.pairs is None or len(split.pairs) == len(split)
        assert all(isinstance(text, str) for text in [*split.texts, *(split.pairs or [])])
        limit = task.config_value("max_train_examples" if name == "train" else "max_eval_examples")
        assert limit is None or len(split) <= limit
        if task.label_names:
            assert split.labels.dtype == np.int64
            assert set(split.labels) <= set(range(len(task.label_names)))
        else:
            assert np.isfinite(split.labels).all()
    assert task.label_names == () or len(set(task.label_names)) == len(task.label_names) >= 2


def check(path: Path, options: dict[str, Any], second: Path | None = None) -> None:
    files = {"train_file": str(path), "validation_file": str(second)} if second else {"path": str(path)}
    options = {"text_columns": ["text"], **options, **files}
    if second:
        options.pop("validation_fraction", None)
    found = outcome(options)
    if not isinstance(found, str):
        usable(found)


@fuzz(tables(), OPTIONS, st.sampled_from([".csv", ".tsv", ".txt", ".csv.gz"]))
@example("a\u2028a,text,text", {}, ".csv")  # a line end of Unicode in a name that is told
def test_any_rows_of_text(tmp_path: Path, text: str, options: dict[str, Any], ending: str) -> None:
    path, content = tmp_path / f"t{ending}", text.encode(errors="surrogatepass")
    path.write_bytes(gzip.compress(content, 1) if ending.endswith(".gz") else content)
    check(path, options)


@fuzz(st.lists(OBJECT, max_size=6), OPTIONS, st.sampled_from([".jsonl", ".ndjson", ".json", ".data.json", ".columns.json"]))
@example([{"text": "a", "label": 10**400}, {"text": "b", "label": 1}], {"problem_type": "regression"}, ".jsonl")
@example([{"text": "a", "label": "\ud800"}, {"text": "b", "label": "x"}], {}, ".json")
def test_any_objects(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], ending: str) -> None:
    path = tmp_path / f"t{ending}"
    if ending in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, rows)))
    elif ending == ".columns.json":
        names = {name: None for row in rows for name in row}
        path.write_text(json.dumps({name: [row.get(name) for row in rows] for name in names}))
    else:
        path.write_text(json.dumps({"data": rows} if ending == ".data.json" else rows))
    check(path, options)


@fuzz(VALUE | st.lists(VALUE, max_size=3), OPTIONS, st.sampled_from([".jsonl", ".json"]))
def test_any_json(tmp_path: Path, value: Any, options: dict[str, Any], ending: str) -> None:
    path = tmp_path / f"t{ending}"
    path.write_text(json.dumps(value))
    check(path, options)


@fuzz(st.binary(max_size=100), st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz", ".json.gz", ".xlsx"]))
def test_any_bytes(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    path.write_bytes(content)
    check(path, {})


@fuzz(tables(), st.lists(OBJECT, max_size=5), OPTIONS, st.booleans())
def test_any_two_files(tmp_path: Path, text: str, rows: list[dict[str, Any]], options: dict[str, Any], swapped: bool) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.jsonl"
    one.write_bytes(text.encode(errors="surrogatepass"))
    other.write_text("\n".join(map(json.dumps, rows)))
    check(*((other, options, one) if swapped else (one, options, other)))


# Columns of one type each, as parquet has them.
TYPED: list[st.SearchStrategy[Any]] = [
    CELL,
    st.integers(-1, 2),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.dates(datetime.date(1900, 1, 1)),
    st.datetimes(datetime.datetime(1900, 1, 1)),
    st.decimals(-9, 9, places=2).map(decimal.Decimal),
    st.lists(CELL, max_size=2),
    st.fixed_dictionaries({"a": st.integers(0, 3)}),
]


@st.composite
def columns(draw: st.DrawFn) -> pyarrow.Table:
    """A table with two or three columns, with gaps, and perhaps a column of categories."""
    rows = draw(st.integers(0, 5))
    found = {}
    for name in draw(st.sampled_from([("text", "label"), ("text", "other", "label"), ("label", "Label")])):
        kind = st.sampled_from(TYPED) if name != "text" else st.sampled_from([TYPED[0], TYPED[0], *TYPED])
        values = draw(
            kind.flatmap(lambda one: st.lists(one | st.none() if draw(st.booleans()) else one, min_size=rows, max_size=rows))
        )
        column = pyarrow.array(values)
        found[name] = column.dictionary_encode() if pyarrow.types.is_string(column.type) and draw(st.booleans()) else column
    return pyarrow.table(found)


@fuzz(columns(), OPTIONS)
def test_any_columns_of_parquet(tmp_path: Path, table: pyarrow.Table, options: dict[str, Any]) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table, path)
    check(path, options)


@fuzz(st.sampled_from(sorted(GLUE)), st.data())
def test_any_lines_of_glue(tmp_path: Path, name: str, data: st.DataObject) -> None:
    spec = GLUE[name]
    names = list(spec.header or ("index", *spec.texts, spec.label))
    labels = st.sampled_from([*(spec.raw_classes or ("1.0", "5")), "-1", "", "x"])
    cells = [labels if column == spec.label else CELL for column in names]
    for file in ("train.tsv", *dict(spec.evaluation).values()):
        rows = data.draw(st.lists(st.tuples(*cells) | st.lists(CELL, max_size=5), max_size=5))
        lines = ["\t".join(row) for row in ([] if spec.header else [names]) + rows]
        (tmp_path / file).write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    found = outcome({"path": str(tmp_path)}, name)
    if not isinstance(found, str):
        usable(found)


LEAF = st.none() | st.booleans() | st.integers(-2, 30) | CELL | st.sampled_from(["the fox", "the fox sees the hen"])
ANSWER = st.fixed_dictionaries({"text": st.just("fox") | LEAF, "answer_start": st.just(4) | LEAF}) | LEAF
QUESTION = st.fixed_dictionaries(
    {"id": st.uuids().map(str) | LEAF, "question": CELL | LEAF},
    optional={"answers": st.lists(ANSWER, max_size=2) | LEAF, "is_impossible": st.booleans() | LEAF},
)
PARAGRAPH = st.fixed_dictionaries(
    {"context": st.just("the fox sees") | LEAF, "qas": st.lists(QUESTION | LEAF, max_size=3) | LEAF}
)
ARTICLE = st.fixed_dictionaries({"paragraphs": st.lists(PARAGRAPH | LEAF, max_size=2) | LEAF}) | LEAF
SQUAD = st.fixed_dictionaries({"data": st.lists(ARTICLE, max_size=2) | LEAF}) | VALUE


@fuzz(SQUAD, SQUAD, st.sampled_from(["squad-v1", "squad-v2"]))
def test_any_json_for_squad(tmp_path: Path, train: Any, dev: Any, name: str) -> None:
    for split, value in (("train", train), ("dev", dev)):
        (tmp_path / f"{split}.json").write_text(json.dumps(value))
    found = outcome({"path": str(tmp_path), "doc_stride": 8}, name)
    if not isinstance(found, str):
        assert all(len(split) >= 1 for split in found.splits().values())
