"""The user's own data: every format, every kind of label, and every fault with its message."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progscale.errors import ConfigError, DataError
from progscale.tasks.base import TASKS
from progscale.tasks.demo import demo_tokenizer
from progscale.tasks.metrics import load_own
from progscale.tasks.sources import split_rows

ROWS = [("the fox sees", "good"), ("the hare hears", "bad"), ("a wolf, twice", "good"), ('"quoted" hen', "bad")] * 5


def build(**config: Any) -> Any:
    return TASKS.get("table")(SimpleNamespace(**{"text_columns": ["sentence"], **config}), seed=0)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_metric(path: Path, inputs: dict[str, str], result: str) -> Path:
    """A module with an `evaluate.Metric` of these inputs (name: type), whose scores are the expression `result` of them."""
    kinds = ", ".join(f"{name!r}: datasets.Value({kind!r})" for name, kind in inputs.items())
    path.write_text(
        "import datasets\nimport evaluate\n"
        "class Own(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='',\n"
        f"                                   features=datasets.Features({{{kinds}}}))\n"
        f"    def _compute(self, {', '.join(inputs)}):\n"
        f"        return {result}\n"
    )
    return path


def csv_text(rows: Any, header: tuple[str, ...] = ("sentence", "label"), mark: str = ",") -> str:
    def field(value: Any) -> str:
        quoted = str(value).replace('"', '""')
        return f'"{quoted}"'

    return "\n".join(mark.join(field(value) for value in row) for row in [header, *rows])


def save(folder: Path, ending: str) -> str:
    """ROWS in a format; the path."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = folder / f"train{ending}"
    columns = {"sentence": [row[0] for row in ROWS], "label": [row[1] for row in ROWS]}
    objects = [dict(zip(columns, row, strict=True)) for row in ROWS]
    if ending == ".csv":
        write(path, "\ufeff" + csv_text(ROWS).replace("\n", "\r\n"))
    elif ending == ".csv.gz":
        path.write_bytes(gzip.compress(csv_text(ROWS).encode()))
    elif ending == ".tsv":
        # Bare quotes, as GLUE has them: quoting does not work out, so they are taken as they are.
        write(path, "\n".join("\t".join(row) for row in [("sentence", "label"), *ROWS]))
    elif ending == ".jsonl":
        write(path, "\n".join(json.dumps(value) for value in objects) + "\n\n")
    elif ending == ".json":
        write(path, json.dumps(objects))
    elif ending == ".columns.json":
        write(path, json.dumps(columns))
    elif ending == ".data.json":
        write(path, json.dumps({"version": 1, "data": objects}))
    elif ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif ending == "/disk":
        path = folder / "saved"
        features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])})
        ids = [["good", "bad"].index(value) for value in columns["label"]]
        datasets.Dataset.from_dict({**columns, "label": ids}, features=features).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize(
    "ending",
    [".csv", ".csv.gz", ".tsv", ".jsonl", ".json", ".columns.json", ".data.json", ".parquet", "/disk"],
)
def test_every_format_reads_the_same(tmp_path: Path, ending: str) -> None:
    task = build(path=save(tmp_path, ending), validation_fraction=0.2)
    splits = task.splits()
    found = [
        (text, task.label_names[label])
        for split in splits.values()
        for text, label in zip(split.texts, split.labels, strict=True)
    ]
    assert sorted(found) == sorted(ROWS)
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4}
    # Strings in sorted order; a data set's own names keep theirs.
    assert task.label_names == (("good", "bad") if ending == "/disk" else ("bad", "good"))
    assert splits["validation"].labels.tolist().count(0) == 2


def test_a_folder_with_both_splits_and_a_pair_of_columns(tmp_path: Path) -> None:
    rows = [("a", "b", 0), ("c", "d", 1)]
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.csv", csv_text(rows, ("one", "two", "label")))
    task = build(path=str(tmp_path), text_columns=["one", "two"])
    assert task.splits()["validation"].pairs == ["b", "d"]
    assert (task.num_labels, task.problem_type, task.primary_metric) == (2, "single_label_classification", "accuracy")
    tokens = task.tokenize(demo_tokenizer(), 16)["train"]
    assert tokens.columns["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1]


def test_a_column_called_text_needs_no_name(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", csv_text([("a", 0), ("b", 1)] * 5, ("text", "label")))
    assert build(train_file=path, text_columns=None).splits()["train"].texts[0] in ("a", "b")
    path = write(tmp_path / "u.csv", csv_text([("a", 0), ("b", 1)] * 5, ("review", "label")))
    with pytest.raises(DataError, match=r"task.text_columns: one or two .* are needed, not 0 \(none\); .* has: review, label"):
        build(train_file=path, text_columns=None)


def test_regression(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", csv_text([("a", "1.5"), ("b", "-2e-1"), ("c", "3")]))
    task = build(train_file=path, validation_file=path, problem_type="regression")
    assert task.splits()["train"].labels.tolist() == pytest.approx([1.5, -0.2, 3.0])
    assert (task.num_labels, task.problem_type, task.primary_metric) == (1, "regression", "pearson")
    scores = task.score({0: [1.5], 1: [-0.2], 2: [3.0]}, task.tokenize(demo_tokenizer(), 8)["train"], "validation")
    assert scores == pytest.approx({"pearson": 1.0, "spearman": 1.0, "mse": 0.0, "mae": 0.0}, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "names", "classes", "ids"),
    [
        ([0, 1, 0, 1], None, ("0", "1"), [0, 1, 0, 1]),
        ([5, 3, 5, 10], None, ("3", "5", "10"), [1, 0, 1, 2]),
        ([1, 0, 1, 1], ["no", "yes"], ("no", "yes"), [1, 0, 1, 1]),
        (["b", "a", "b", "a"], ["b", "a", "c"], ("b", "a", "c"), [0, 1, 0, 1]),
        ([-1, 1, -1, 1], ["-1", "1"], ("-1", "1"), [0, 1, 0, 1]),
        ([True, False, True, True], None, ("false", "true"), [1, 0, 1, 1]),
    ],
)
def test_labels_become_ids(tmp_path: Path, labels: list[Any], names: Any, classes: Any, ids: list[int]) -> None:
    value = [{"sentence": "x", "label": label} for label in labels]
    path = write(tmp_path / "t.json", json.dumps(value))
    task = build(train_file=path, validation_file=path, labels=names)
    assert task.label_names == classes
    assert task.splits()["train"].labels.tolist() == ids


GOOD = csv_text(ROWS)
JSON_FAULTS: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "float": ([("a", 0.0), ("b", 1.0)], r"row 1: the label 'label' is 0.0, a decimal number; .*'regression'"),
    "minus": ([("a", 0), ("b", -1)], r"row 2: the label 'label' is -1; -1 marks rows without a label"),
    "single": ([("a", 1), ("b", 1)], r"one class only \(1\); two or more"),
    "null text": ([("a", 1), (None, 0)], r"row 2: 'sentence' has no text \(null or empty\)"),
    "mixed text": ([("a", 1), (7, 0)], r"row 2: 'sentence' holds 7, a int; text is needed"),
    "mixed labels": ([("a", 1), ("b", "x")], r"row 2: the label 'label' is 'x', a str; the ones before are int"),
    "null label": ([("a", 1), ("b", None)], r"row 2: the label 'label' is missing"),
    "list label": ([("a", 1), ("b", [1])], r"row 2: the label 'label' is \[1\], a list"),
    "surrogate": ([("a", 1), ("b \ud800", 0)], r"example 1 holds U\+D800"),
}


@pytest.mark.parametrize("case", JSON_FAULTS)
def test_faults_in_rows(tmp_path: Path, case: str) -> None:
    rows, message = JSON_FAULTS[case]
    path = write(tmp_path / "t.json", json.dumps([{"sentence": text, "label": label} for text, label in rows]))
    with pytest.raises(DataError, match=message):
        build(train_file=path, validation_file=path).check()


def test_the_type_of_the_labels_tells_the_problem(tmp_path: Path) -> None:
    fractions = write(tmp_path / "a.csv", csv_text([("a", "0.5"), ("b", "1"), ("c", "2")]))
    assert build(train_file=fractions, validation_file=fractions).problem_type == "regression"
    with pytest.raises(DataError, match=r"line 2: the label 'label' is 0.5, a decimal number"):
        build(train_file=fractions, validation_file=fractions, problem_type="classification")


FILE_FAULTS: dict[str, tuple[str, str | bytes, dict[str, Any], str]] = {
    "empty": ("t.csv", " \n", {}, "the file is empty"),
    "no rows": ("t.csv", "sentence,label\n", {}, "t.csv: 0 rows"),
    "column": (
        "t.csv",
        GOOD,
        {"text_columns": ["sentense"]},
        r"task.text_columns: 'sentense' is not a column of .*t.csv \(sentence, label\); did you mean 'sentence'\?",
    ),
    "label column": ("t.csv", GOOD, {"label_column": "lable"}, r"task.label_column: 'lable' is not .*mean 'label'\?"),
    "no columns": ("t.csv", GOOD, {"text_columns": []}, "one or two different columns are needed, not 0"),
    "semicolon": (
        "t.csv",
        "sentence;label\nthe fox;1\nthe hen;0\n",
        {},
        r"its header is one column, but it contains ';': set task.delimiter to \";\"",
    ),
    "semicolon and commas": ("t.csv", "sentence;label\nthe fox, once;1\n", {}, r"line 2 has 2 fields.*task.delimiter"),
    "tab": ("t.csv", "sentence\tlabel\nthe fox\t1\n", {}, r"it contains a tab: set task.delimiter to \"\\t\""),
    "fields": ("t.csv", 'sentence,label\n"a\nb",1\nc,d,e\n', {}, r"line 4 has 3 fields, the header has 2"),
    "quotes": ("t.csv", 'sentence,label\n"a"b,1\n', {}, "line 2 is not valid CSV"),
    "twice": ("t.csv", "sentence,label,label\na,1,1\n", {}, "the column 'label' twice"),
    "latin": ("t.csv", "sentence,label\ncaf\xe9,1\n".encode("latin-1"), {}, "byte 0xe9 at offset 18 .line 2.*UTF-8"),
    "utf16": ("t.csv", GOOD.encode("utf-16"), {}, "looks like UTF-16"),
    "empty cell": ("t.csv", "sentence,label\na,1\n,0\n", {}, r"line 3: 'sentence' has no text"),
    "decimal": ("t.csv", "sentence,label\na,1\nb,1.0\n", {}, "line 3: the label 'label' is 1.0, a decimal number"),
    "no number": ("t.csv", GOOD, {"problem_type": "regression"}, "line 2: the label 'label' is 'good', a finite number"),
    "nan": ("t.csv", "sentence,label\na,nan\n", {"problem_type": "regression"}, "'nan', a finite number is needed"),
    "parquet": ("t.parquet", b"PAR1 this is not it", {}, "not a readable parquet file"),
    "empty parquet": ("t.parquet", b"", {}, "the file is empty"),
    "gzip": ("t.csv.gz", b"no gzip at all", {}, "cannot be unpacked"),
    "json": ("t.json", '[{"sentence": "a", ]', {}, "not JSON: .* at line 1 column 20"),
    "json kind": ("t.json", "3", {}, "a list of objects or an object of lists is needed, not a int"),
    "json columns": ("t.json", '{"a": [1], "b": [1, 2]}', {}, "its columns differ in length"),
    "jsonl": ("t.jsonl", '{"sentence": "a", "label": 1}\n{oops\n', {}, "line 2 is not JSON"),
    "jsonl kind": ("t.jsonl", "[1]\n", {}, "line 1 is a list, an object is needed"),
    "ending": ("t.xlsx", "x", {}, r"the ending '.xlsx' is not known; known: .csv"),
    "labels": ("t.csv", GOOD, {"labels": ["good", "baad"]}, r"is 'bad', which is none of the 2 known .*mean 'baad'\?"),
    "fraction": ("t.csv", GOOD, {"validation_fraction": 1.5}, "task.validation_fraction: 1.5 is not between 0 and 1"),
    "few": ("t.csv", "sentence,label\na,1\nb,0\n", {"validation_fraction": 0.1}, "2 rows are too few"),
    "delimiter": ("t.csv", GOOD, {"delimiter": ";;"}, "has to be one character"),
}


@pytest.mark.parametrize("case", FILE_FAULTS)
def test_faults_of_files(tmp_path: Path, case: str) -> None:
    name, content, config, message = FILE_FAULTS[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        build(path=path, **config).check()


def test_places_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", GOOD)
    with pytest.raises(DataError, match=r"no such file: .*trian.csv \(in its folder: .*\); did you mean 'train.csv'"):
        build(train_file=str(tmp_path / "trian.csv"))
    with pytest.raises(DataError, match="there is no folder"):
        build(path=str(tmp_path / "nowhere" / "train.csv"))
    with pytest.raises(DataError, match=r"set task.train_file, task.path or task.hub"):
        build()
    with pytest.raises(DataError, match="holds no train file"):
        (tmp_path / "other").mkdir()
        build(path=str(tmp_path / "other"))
    with pytest.raises(DataError, match="is a folder"):
        build(train_file=str(tmp_path))
    write(tmp_path / "train.tsv", GOOD)
    with pytest.raises(DataError, match=r"both train.csv and train.tsv"):
        build(path=str(tmp_path))
    with pytest.raises(DataError, match="'clustering' is not one of classification, regression"):
        build(problem_type="clustering")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    write(damaged / "dataset_info.json", "{}")
    with pytest.raises(DataError, match=r"not a readable folder of datasets.save_to_disk"):
        build(path=str(damaged))


def test_an_unknown_label_in_validation(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", GOOD)
    other = write(tmp_path / "dev.csv", csv_text([("x", "good"), ("y", "goood")]))
    with pytest.raises(DataError, match=r"dev.csv: line 3: .* 'goood', which is none of the 2 known \(bad, good\)"):
        build(train_file=train, validation_file=other)
    assert DataError.exit_code == 2


def test_rows_that_are_cut_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "train.csv", csv_text([("the fox sees the hare", 1), ("the hen", 0)] * 2))
    task = build(train_file=path, validation_file=path)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        tokens = task.tokenize(demo_tokenizer(), 4)["train"]
        assert tokens.lengths.tolist() == [4, 4, 4, 4]
        assert r"train: 2 of 4 rows (50.0 %) are longer than train.max_length 4" in caplog.text


def test_a_ranking_metric_gets_what_ranks(tmp_path: Path) -> None:
    """Two logits rank by their difference: 3 over 2 is a surer yes than 4 over 5."""
    path = write(tmp_path / "train.csv", GOOD)
    result = "{'highest': max(range(len(references)), key=lambda row: prediction_scores[row])}"
    own = write_metric(tmp_path / "highest.py", {"prediction_scores": "float32", "references": "int64"}, result)
    task = build(train_file=path, validation_file=path, metric=f"evaluate:{own}")
    tokens = task.tokenize(demo_tokenizer(), 8)["validation"]
    outputs = {row: [5.0, 4.0] for row in range(len(tokens))} | {3: [2.0, 3.0]}
    assert task.score(outputs, tokens, "validation")["highest"] == 3


def test_quotes_that_close_by_chance_join_no_rows(tmp_path: Path) -> None:
    text = 'sentence\tlabel\n"I went home.\t1\nIt rained.\t0\nThen I slept."\t0\n' + "a\t1\n" * 9
    task = build(train_file=write(tmp_path / "a.tsv", text), validation_file=write(tmp_path / "b.tsv", text))
    read = task.read()["train"]
    assert read.texts[:3] == ['"I went home.', "It rained.", 'Then I slept."']
    assert len(read) == 12
    real = 'sentence\tlabel\n"two\nlines"\t1\nb\t0\n'
    task = build(train_file=write(tmp_path / "c.tsv", real), validation_file=write(tmp_path / "d.tsv", real))
    assert task.read()["train"].texts == ["two\nlines", "b"], "a quoted field may hold a line end"


def test_unlabelled_rows_of_named_classes_are_told_as_such(tmp_path: Path) -> None:
    kinds = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"sentence": ["a", "b", "c"], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / "disk"))
    with pytest.raises(DataError, match=r"the label 'label' is -1; "):
        build(path=str(tmp_path / "disk"))


def test_a_metric_of_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", GOOD)
    result = "{'count': sum(p == r for p, r in zip(predictions, references))}"
    own = write_metric(tmp_path / "hits.py", {"predictions": "int64", "references": "int64"}, result)
    task = build(train_file=path, validation_file=path, metric=f"evaluate:{own}")
    assert (task.primary_metric, task.higher_is_better) == ("hits", True)
    tokens = task.tokenize(demo_tokenizer(), 8)["validation"]
    right = {row: [1.0 - label, float(label)] for row, label in enumerate(tokens.labels["labels"])}
    assert task.score(right, tokens, "validation")["hits"] == 20
    task.check()
    own.write_text(own.read_text().replace("'count': sum(", "'count': 1 / 0 + sum("))
    load_own.cache_clear()
    with pytest.raises(ConfigError, match=r"task.metric: evaluate:.*hits.py failed: ZeroDivisionError"):
        build(train_file=path, validation_file=path, metric=f"evaluate:{own}").check()
    with pytest.raises(ConfigError, match=r"task.metric: evaluate:.*nowhere.py cannot be loaded"):
        build(train_file=path, metric=f"evaluate:{tmp_path}/nowhere.py")
    with pytest.raises(ConfigError, match=r"task.metric: 'acuracy' is not .*did you mean 'accuracy'\?"):
        build(train_file=path, metric="acuracy")


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=200), st.floats(0.05, 0.5), st.integers(0, 3))
def test_rows_set_aside_are_stratified(labels: list[int], fraction: float, seed: int) -> None:
    array = np.asarray(labels)
    kept, aside = split_rows(array, fraction, seed, stratify=True)
    assert sorted([*kept, *aside]) == list(range(len(labels)))
    assert set(array[kept]) == set(labels)
    for label in set(labels):
        count = labels.count(label)
        assert abs((array[aside] == label).sum() - fraction * count) <= 1.5
    again = split_rows(array, fraction, seed, stratify=True)
    assert (again[1] == aside).all()


def complaint(**config: Any) -> str:
    """The DataError's text, or the path where the data was fine; any other exception fails the test."""
    try:
        build(**config).check()
    except DataError as error:
        return str(error)
    return str(config["path"])


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet", ".csv.gz"]))
def test_any_bytes_end_in_data_or_a_data_error(tmp_path_factory: Any, content: bytes, ending: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"t{ending}"
    path.write_bytes(content)
    assert path.name in complaint(path=str(path))


CELL = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"sentence": CELL, "label": CELL}), max_size=6), st.sampled_from([None, "regression"]))
def test_any_rows_end_in_data_or_a_data_error(tmp_path_factory: Any, rows: list[Any], kind: str | None) -> None:
    path = tmp_path_factory.mktemp("any") / "t.json"
    path.write_text(json.dumps(rows))
    assert "\n" not in complaint(path=str(path), problem_type=kind)
