"""SQuAD: windows, positions, the best span over windows, and every fault of the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from progscale.errors import DataError, ModelError
from progscale.tasks.base import TASKS, evaluate_task
from progscale.tasks.demo import demo_tokenizer

CONTEXT = "The old fox sees the hare. " * 12 + "Later the wolf meets a quiet hen nearby"


def question(key: str, answer: str | None, text: str = "the fox sees") -> dict[str, Any]:
    answers = [] if answer is None else [{"text": answer, "answer_start": CONTEXT.index(answer)}]
    return {"id": key, "question": text, "answers": answers, "is_impossible": answer is None}


def official(*questions: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {"version": "x", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]}


def write(folder: Path, value: Any, version: str = "v1.1") -> str:
    (folder / f"train-{version}.json").write_text(json.dumps(value))
    (folder / f"dev-{version}.json.gz").write_bytes(gzip.compress(json.dumps(value).encode()))
    return str(folder)


def build(name: str, folder: str, **config: Any) -> Any:
    return TASKS.get(name)(SimpleNamespace(path=folder, doc_stride=8, **config), seed=0)


def perfect(task: Any, split: Any, wanted: dict[str, tuple[int, int] | None]) -> dict[int, Any]:
    """What a model that knows the characters of every answer would predict; None: says there is no answer."""
    predictions = {}
    source = split.source
    for row in range(len(split)):
        start = torch.full((1, int(split.lengths[row]) + 3), -4.0)
        end = start.clone()
        span, place = source.spans[row], wanted[source.questions.ids[source.question[row]]]
        if place is None:
            start[0, source.cls[row]] = end[0, source.cls[row]] = 6.0
        elif span[0, 0] <= place[0] and place[1] <= span[-1, 1]:
            first = int(source.first[row])
            start[0, first + int(np.flatnonzero(span[:, 0] == place[0])[0])] = 5.0
            end[0, first + int(np.flatnonzero(span[:, 1] == place[1])[0])] = 5.0
        # High scores in the padding and in the question must not matter.
        start[0, -1] = end[0, -1] = start[0, 1] = end[0, 1] = 9.0
        outputs = SimpleNamespace(start_logits=start, end_logits=end)
        predictions[row] = task.predict(outputs, [row], split)[0]
    return predictions


def characters(answer: str) -> tuple[int, int]:
    return CONTEXT.index(answer), CONTEXT.index(answer) + len(answer)


def test_windows_overlap_and_cover_the_context(tmp_path: Path) -> None:
    task = build("squad-v1", write(tmp_path, official(question("a", "quiet hen"))))
    split = task.tokenize(demo_tokenizer(), 40)["validation"]
    assert len(split) > 2 and split.lengths.max() == 40
    spans = split.source.spans
    assert spans[0][0, 0] == 0 and spans[-1][-1, 1] == len(CONTEXT)
    for before, after in zip(range(len(split) - 1), range(1, len(split)), strict=True):
        assert (spans[before][-8:] == spans[after][:8]).all()


def test_positions_mark_the_answer_or_cls(tmp_path: Path) -> None:
    task = build("squad-v1", write(tmp_path, official(question("a", "quiet hen"))))
    tokenizer = demo_tokenizer()
    split = task.tokenize(tokenizer, 40)["train"]
    found = []
    for row in range(len(split)):
        start, end = (int(split.labels[f"{side}_positions"][row]) for side in ("start", "end"))
        found.append(tokenizer.decode(split.columns["input_ids"][row][start : end + 1]))
    assert set(found) == {"[CLS]", "quiet hen"} and found[-1] == "quiet hen"


def test_perfect_outputs_score_full_marks(tmp_path: Path) -> None:
    folder = write(tmp_path, official(question("a", "quiet hen"), question("b", "old fox")))
    task = build("squad-v1", folder)
    split = task.tokenize(demo_tokenizer(), 40)["validation"]
    predictions = perfect(task, split, {"a": characters("quiet hen"), "b": characters("old fox")})
    assert evaluate_task(task, split, "validation", predictions) == {"exact_match": 100.0, "f1": 100.0}
    assert all(len(candidates) <= 20 for _, candidates in predictions.values())
    swapped = perfect(task, split, {"a": characters("hen"), "b": characters("wolf")})
    assert evaluate_task(task, split, "validation", swapped) == pytest.approx({"exact_match": 0.0, "f1": 100 / 3})


def test_version_2_refuses_what_has_no_answer(tmp_path: Path) -> None:
    folder = write(tmp_path, official(question("a", "quiet hen"), question("b", None)), "v2.0")
    task = build("squad-v2", folder)
    splits = task.tokenize(demo_tokenizer(), 40)
    train = splits["train"]
    rows = np.flatnonzero(train.source.question == 1)
    assert (train.labels["start_positions"][rows] == 0).all() and (train.labels["end_positions"][rows] == 0).all()
    split = splits["validation"]
    scores = evaluate_task(task, split, "validation", perfect(task, split, {"a": characters("quiet hen"), "b": None}))
    assert scores["f1"] == scores["HasAns_f1"] == scores["NoAns_exact_match"] == scores["best_f1"] == 100.0
    strict = build("squad-v2", folder, no_answer_threshold=-100.0)
    predictions = perfect(strict, split, {"a": characters("quiet hen"), "b": None})
    assert evaluate_task(strict, split, "validation", predictions)["f1"] == 50.0


def test_candidates_obey_length_and_order(tmp_path: Path) -> None:
    task = build("squad-v1", write(tmp_path, official(question("a", "hen"))), n_best=5, max_answer_length=3)
    split = task.tokenize(demo_tokenizer(), 40)["validation"]
    torch.manual_seed(0)
    rows = list(range(len(split)))
    shape = (len(rows), int(split.lengths.max()))
    outputs = SimpleNamespace(start_logits=torch.randn(shape), end_logits=torch.randn(shape))
    for row, (null, candidates) in zip(rows, task.predict(outputs, rows, split), strict=True):
        assert null == pytest.approx(float(outputs.start_logits[row, 0] + outputs.end_logits[row, 0]))
        scores = [score for *_, score in candidates]
        assert len(candidates) <= 5 and scores == sorted(scores, reverse=True)
        for start, end, score in candidates:
            assert 0 <= start <= end < min(start + 3, len(split.source.spans[row]))
            first = int(split.source.first[row])
            expected = outputs.start_logits[row, first + start] + outputs.end_logits[row, first + end]
            assert score == pytest.approx(float(expected))


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    model = BertForQuestionAnswering(BertConfig(**shape)).eval()
    labels = {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([0, 5, 3])}
    outputs = model(input_ids=torch.randint(20, (3, 6)), **labels)
    losses = build("squad-v1", write(tmp_path, official(question("a", "hen")))).loss(outputs, labels)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), outputs.loss)


def test_a_long_question_is_cut_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = build("squad-v1", write(tmp_path, official(question("a", "hen", "the fox sees " * 40))))
    split = task.tokenize(demo_tokenizer(), 64)["validation"]
    assert split.lengths.max() <= 64 and split.source.first[0] < 40
    assert "1 of 1 questions are too long and lose their end" in caplog.text


WRONG = [{**question(f"q{i}", "hen"), "answers": [{"text": "hen", "answer_start": 3}]} for i in range(2)]
FAULTS: dict[str, tuple[Any, str]] = {
    "offset": (official(question("a", "hen"), *WRONG), r"2 of 3 questions have an answer that is not in .*first: 'q0'"),
    "twice": (official(question("a", "hen"), question("a", "fox")), "the question id 'a' is there twice"),
    "none": ({"data": []}, "no questions"),
    "unanswerable": (official(question("a", None)), "question 'a' has no answer; for such data take task squad-v2"),
    "layout": ({"rows": []}, "not laid out as SQuAD .no 'data'.; expected data → paragraphs"),
    "missing": (official({"id": "a", "question": "x"}), r"in data\[0\].paragraphs\[0\].qas\[0\] .no 'answers'"),
    "kind": (official({**question("a", "hen"), "question": 3}), "3 where text is needed"),
    "start": (official({**question("a", "hen"), "answers": [{"text": "x", "answer_start": "1"}]}), "no integer"),
    "list": ([1], "not laid out as SQuAD"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(tmp_path: Path, case: str) -> None:
    value, message = FAULTS[case]
    with pytest.raises(DataError, match=message):
        build("squad-v1", write(tmp_path, value)).check()


def test_faults_of_files_and_settings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file like train-v1.1.json in .* \(nothing\)"):
        build("squad-v1", str(tmp_path))
    folder = write(tmp_path, official(question("a", "hen")))
    with pytest.raises(DataError, match=r"task.doc_stride: 60 leaves no room in train.max_length 64; at most 37 fits"):
        TASKS.get("squad-v1")(SimpleNamespace(path=folder, doc_stride=60)).tokenize(demo_tokenizer(), 64)
    with pytest.raises(ModelError, match="needs a fast tokenizer"):
        build("squad-v1", folder).tokenize(SimpleNamespace(is_fast=False), 64)
    with pytest.raises(DataError, match="both needed"):
        TASKS.get("squad-v1")(SimpleNamespace(train_file=f"{folder}/train-v1.1.json"))
    (tmp_path / "train-v1.1.copy.json").write_text("{}")
    with pytest.raises(DataError, match=r"several files like train-v1.1.json"):
        build("squad-v1", folder)
