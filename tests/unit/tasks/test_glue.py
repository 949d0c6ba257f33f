"""GLUE from its official layout, and from tables as the hub gives them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from progscale.errors import DataError
from progscale.tasks import glue
from progscale.tasks.base import TASKS
from progscale.tasks.demo import demo_tokenizer
from progscale.tasks.files import Table
from progscale.tasks.glue import GLUE

HEADERS = {
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
RAW = {"mrpc": "10", "qqp": "01"}


def official(folder: Path, name: str) -> None:
    """A folder of the official layout with a row of each class in every file, the last line without its end."""
    spec = GLUE[name]
    columns = list(spec.header) or HEADERS[name].lstrip("\ufeff").split("\t")
    lines = [] if spec.header else [HEADERS[name]]
    for label in spec.raw_classes or ("0.5", "4.75"):
        row = dict.fromkeys(columns, "-")
        row |= {column: f'the "fox {i}' for i, column in enumerate(spec.texts)} | {spec.label: label}
        lines.append("\t".join(row.values()))
    folder.mkdir(parents=True)
    for file in ("train.tsv", *dict(spec.evaluation).values()):
        (folder / file).write_text("\n".join(lines), encoding="utf-8")


def build(name: str, **config: Any) -> Any:
    return TASKS.get(name)(SimpleNamespace(**config), seed=0)


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("below", [False, True])
def test_every_task_reads_the_official_layout(tmp_path: Path, name: str, below: bool) -> None:
    official(tmp_path / GLUE[name].folder, name)
    task = build(name, path=str(tmp_path if below else tmp_path / GLUE[name].folder))
    splits = task.splits()
    assert list(splits) == ["train", *dict(GLUE[name].evaluation)]
    for split in splits.values():
        assert split.texts[0] == 'the "fox 0'
        assert (split.pairs or [None])[0] == ('the "fox 1' if len(GLUE[name].texts) == 2 else None)
        assert split.labels.tolist() == (list(range(len(task.label_names))) or [0.5, 4.75])
    assert task.num_labels == (len(GLUE[name].classes) or 1)
    tokens = task.tokenize(demo_tokenizer(), 32)
    for split_name, split in tokens.items():
        right = [[float(i == label) for i in range(task.num_labels)] for label in split.labels["labels"]]
        right = right if task.label_names else [[float(label)] for label in split.labels["labels"]]
        scores = task.score(dict(enumerate(right)), split, split_name)
        suffix = "_mismatched" if split_name == "validation_mismatched" else ""
        assert scores == pytest.approx({f"{metric}{suffix}": 1.0 for metric in GLUE[name].metrics})


@pytest.mark.parametrize("name", GLUE)
def test_every_task_reads_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec = GLUE[name]
    labels = list(range(len(spec.classes))) or [0.5, 4.75]
    columns: dict[str, list[Any]] = {column: ["x"] * len(labels) for column in spec.hub_texts}
    table = Table("hub", {**columns, "label": labels}, lambda row: f"row {row + 1}")
    asked = []

    def load(hub: str, config: str) -> dict[str, Table]:
        asked.append((hub, config))
        return dict.fromkeys(("train", "test", *dict(spec.evaluation)), table)

    monkeypatch.setattr(glue, "load_hub", load)
    task = build(name)
    assert task.splits()["train"].labels.tolist() == labels
    assert asked == [("nyu-mll/glue", name)]


def test_unlabelled_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("hub/test", {"sentence": ["a", "b"], "label": [1, -1]}, lambda row: f"row {row + 1}")
    monkeypatch.setattr(glue, "load_hub", lambda *_: {"train": table, "validation": table})
    with pytest.raises(DataError, match="row 2: the label 'label' is -1, not one of 0, 1; -1 marks rows without a label"):
        build("sst2").check()


FAULTS = {
    "fields": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", r"line 2 has 3 fields, 4 are expected \(index, sentence1"),
    "columns": ("index\tsentence\n0\ta\n", "line 1: rte needs the columns sentence1, sentence2, label; 'sentence1' is not"),
    "label": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tperhaps\n", "line 2: the label 'label' is 'perhaps', not one of"),
    "rows": ("index\tsentence1\tsentence2\tlabel\n", "0 rows"),
    "empty": ("\n", "the file is empty"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(tmp_path: Path, case: str) -> None:
    content, message = FAULTS[case]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build("rte", path=str(tmp_path)).check()


def test_missing_files_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task.path: no such file"):
        build("rte", path=str(tmp_path / "nowhere"))
    (tmp_path / "train.tsv").write_text("x")
    with pytest.raises(DataError, match=r"task.path \(rte, validation\): no such file: .*dev.tsv"):
        build("rte", path=str(tmp_path))
    with pytest.raises(DataError, match="is a file; rte needs the folder"):
        build("rte", path=str(tmp_path / "train.tsv"))


def test_qqp_leaves_out_broken_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = "\n".join(f"{i}\t1\t2\tq\tr\t{i % 2}" for i in range(300))
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(f"{HEADERS['qqp']}\n{good}\n5\t1\tcut\n")
    assert len(build("qqp", path=str(tmp_path)).splits()["train"]) == 300
    assert "1 lines with too few fields are left out, first: line 302" in caplog.text


def test_limits_draw_a_part(tmp_path: Path) -> None:
    rows = "\n".join(f"{i}\ta {i}\tb\tentailment" for i in range(50))
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(f"{HEADERS['rte']}\n{rows}")
    splits = build("rte", path=str(tmp_path), max_train_examples=10, max_eval_examples=5).splits()
    assert [len(split) for split in splits.values()] == [10, 5]
    numbers = [int(text.split()[1]) for text in splits["train"].texts]
    assert numbers == sorted(numbers) and numbers != list(range(10))


@pytest.mark.parametrize("classes", [3, 1])
def test_the_loss_is_that_of_transformers(tmp_path: Path, classes: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    kind = "regression" if classes == 1 else "single_label_classification"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    model = BertForSequenceClassification(BertConfig(**shape, num_labels=classes, problem_type=kind)).eval()
    labels = torch.tensor([0, 2, 1, 2]) if classes > 1 else torch.tensor([0.5, 1.0, -2.0, 3.0])
    outputs = model(input_ids=torch.randint(20, (4, 6)), labels=labels)
    name = "mnli" if classes > 1 else "stsb"
    official(tmp_path / "x", name)
    losses = build(name, path=str(tmp_path / "x")).loss(outputs, {"labels": labels})
    assert losses.shape == (4,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), outputs.loss)
