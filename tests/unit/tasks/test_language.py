"""Language-modelling tasks: which tokens are learned, what is cut, what is scored."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from progscale.data import collate, pad_values, shift_right
from progscale.errors import DataError, ModelError
from progscale.tasks.base import IGNORED, TASKS, Tokenized
from progscale.tasks.language import ended, token_losses
from progscale.tasks.metrics.rouge import rouge_scores
from tests.harness.language import sentences, token_split, word_tokenizer, write_jsonl
from tests.tiny import tiny_model


def task_of(name: str, **config: Any) -> Any:
    return TASKS.get(name)(SimpleNamespace(**config), seed=1)


def rows_of(split: Tokenized) -> list[list[int]]:
    return [split.columns["input_ids"][row].tolist() for row in range(len(split))]


def learned(split: Tokenized, row: int) -> list[int]:
    """The targets of a row of a decoder: its labels but the first, where they are not ignored."""
    return [int(label) for label in split.labels["labels"][row][1:] if label != IGNORED]


def text_file(folder: Path, texts: list[str], dev: list[str] | None = None) -> dict[str, Any]:
    (folder / "train.txt").write_text("\n".join(texts))
    (folder / "validation.txt").write_text("\n".join(dev or texts[:2]))
    return {"path": str(folder)}


def test_blocks_hold_every_token_once(tmp_path: Path) -> None:
    texts, tokenizer = sentences(30), word_tokenizer()
    split = task_of("causal_lm", **text_file(tmp_path, texts)).tokenize(tokenizer, 16)["train"]
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], 1]]
    found = [token for row in rows_of(split) for token in row]
    assert found == stream[: len(found)] and len(stream) - len(found) <= 1
    assert set(split.lengths[:-1]) == {16}
    assert split.weight() == sum(len(row) - 1 for row in rows_of(split))
    assert all(learned(split, row) == ids[1:] for row, ids in enumerate(rows_of(split)))


@pytest.mark.parametrize("count", [31, 32, 33])
def test_a_rest_of_one_token_is_left_out(tmp_path: Path, count: int) -> None:
    """It would have no token before it."""
    split = task_of("causal_lm", **text_file(tmp_path, [" ".join(["w1"] * (count - 1))])).tokenize(word_tokenizer(), 16)["train"]
    assert split.lengths.tolist() == {31: [16, 15], 32: [16, 16], 33: [16, 16]}[count]


def test_a_row_for_each_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["w1 w2", " ".join(["w3"] * 20), "w4"]
    task = task_of("causal_lm", packing=False, **text_file(tmp_path, texts, ["w5 w6"]))
    with caplog.at_level(logging.WARNING):
        split = task.tokenize(word_tokenizer(begins=True), 8)["train"]
    assert [len(row) for row in rows_of(split)] == [4, 8, 3]
    assert rows_of(split)[0][0] == 2 and rows_of(split)[0][-1] == 1
    assert rows_of(split)[1][-1] != 1, "a text that is cut does not end"
    assert "1 of 3 texts (33.3 %) are longer than train.max_length 8 and are cut" in caplog.text


def test_texts_without_a_target_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", text=["", "w1", "w2 w3"])
    task = task_of("causal_lm", packing=False, train_file=str(data), validation_file=str(data))
    with caplog.at_level(logging.WARNING):
        assert len(task.tokenize(word_tokenizer(), 8)["train"]) == 2
    assert "1 of 3 texts have fewer than two tokens and are left out" in caplog.text
    empty = write_jsonl(tmp_path / "empty.jsonl", text=["", ""])
    with pytest.raises(DataError, match=r"no text of two tokens or more"):
        task_of("causal_lm", packing=False, train_file=str(empty), validation_file=str(empty)).tokenize(word_tokenizer(), 8)


def pairs_task(tmp_path: Path, prompts: list[str], completions: list[str], name: str = "causal_lm", **more: Any) -> Any:
    data = write_jsonl(tmp_path / "pairs.jsonl", p=prompts, c=completions)
    return task_of(
        name, train_file=str(data), validation_file=str(data), source_column="p", target_column="c", max_target_length=4, **more
    )


def test_the_completion_alone_is_learned(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(begins=True, ends=True)
    task = pairs_task(tmp_path, ["w1 w2 w3", "w1"], ["w4 w5", "w6"], source_prefix="summarize : ", generate=True)
    split = task.tokenize(tokenizer, 16)["train"]
    first, second = tokenizer("w4 w5", add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(["w6"])
    assert [learned(split, 0), learned(split, 1)] == [[*first, 1], [*second, 1]]
    assert split.targets is not None and split.targets.tolist() == [3, 2]
    inputs = task.prompts({}, [0, 1], split)
    prompt = tokenizer("summarize : w1 w2 w3")["input_ids"][:-1]
    assert inputs["input_ids"][0].tolist() == prompt, "what the tokenizer ends a text with is no part of a prompt"
    assert inputs["attention_mask"].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert inputs["input_ids"][1].tolist()[:3] == [0, 0, 2], "padded on the left"
    assert split.source.references == ["w4 w5", "w6"]


def test_a_prompt_without_room_loses_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer(begins=True)
    prompt, completion = [f"w{i}" for i in range(20)], [f"w{i}" for i in range(30, 40)]
    with caplog.at_level(logging.WARNING):
        split = pairs_task(tmp_path, [" ".join(prompt)], [" ".join(completion)]).tokenize(tokenizer, 10)["train"]
    assert rows_of(split)[0] == [2, *tokenizer.convert_tokens_to_ids([*prompt[-5:], *completion[:3]]), 1]
    assert "1 of 1 completions (100.0 %) are longer than task.max_target_length 4 and are cut" in caplog.text


def test_an_empty_prompt_is_the_begin_token(tmp_path: Path) -> None:
    split = pairs_task(tmp_path, [""], ["w1"]).tokenize(word_tokenizer(), 10)["train"]
    assert rows_of(split)[0][0] == 2
    assert split.targets is not None and split.targets.tolist() == [2]


def test_sequence_to_sequence(tmp_path: Path) -> None:
    """What the decoder gets is what the model itself makes of the labels."""
    tokenizer, model = word_tokenizer(ends=True), tiny_model("t5", "seq2seq_lm")
    task = pairs_task(tmp_path, ["w1 w2 w3", "w4"], ["w5", "w6 w7 w8 w9"], "summarization")
    split = task.tokenize(tokenizer, 16)["train"]
    assert [row[-1] for row in rows_of(split)] == [1, 1]
    assert split.labels["labels"].lengths.tolist() == [2, 4] and split.weight() == 6
    batch = collate(split, np.array([0, 1]), pad_values(tokenizer, model.config))
    assert batch.labels["labels"][0].tolist()[2:] == [IGNORED, IGNORED]
    wanted = model.prepare_decoder_input_ids_from_labels(batch.labels["labels"])
    assert torch.equal(batch.inputs["decoder_input_ids"], wanted)
    assert task.prompts(batch.inputs, [0, 1], split).keys() == {"input_ids", "attention_mask"}
    assert batch.tokens == int(split.lengths.sum()) == 4 + 2 + 2 + 4


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=4))
def test_shifting(rows: list[list[int]]) -> None:
    width = max(map(len, rows))
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])
    shifted = shift_right(labels, 7, 0)
    for row, found in zip(rows, shifted.tolist(), strict=True):
        assert found == ([7, *row] + [0] * width)[:width]


def test_the_loss_of_a_row_is_the_sum_over_its_targets() -> None:
    logits, labels = torch.randn(2, 4, 11), torch.tensor([[3, IGNORED, 5, IGNORED], [1, 2, 3, 4]])
    found = token_losses(logits, labels)
    logs = logits.log_softmax(-1)
    assert found[0].item() == pytest.approx(-(logs[0, 0, 3] + logs[0, 2, 5]).item(), abs=1e-5)
    assert found[1].item() == pytest.approx(-sum(logs[1, i, i + 1].item() for i in range(4)), abs=1e-5)
    assert token_losses(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_weights_count_targets(family: str) -> None:
    split = token_split(family, 9)
    assert split.targets is not None
    assert split.weight() == sum(split.targets) != len(split)
    assert split.weight(np.array([2, 5])) == split.targets[2] + split.targets[5]


def test_targets_end() -> None:
    assert ended([5, 6], 1, 4) == ([5, 6, 1], False)
    assert ended([5, 6, 1], 1, 3) == ([5, 6, 1], False)
    assert ended([5, 6, 7], 1, 3) == ([5, 6, 1], True)
    assert ended([], 1, 3) == ([1], False)


def test_rouge() -> None:
    """Figures worked out by hand: 2 of 3 words, 1 of 2 pairs of words; stems count."""
    scores = rouge_scores(["the cat sat"], ["the cat ran"])
    assert scores == pytest.approx({"rouge1": 200 / 3, "rouge2": 50.0, "rougeL": 200 / 3})
    assert rouge_scores(["cats running"], ["cat run"])["rouge1"] == pytest.approx(100)
    assert rouge_scores(["", "a b"], ["x", "a b"])["rouge1"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("causal_lm", {"text_columns": ["txt"]}, r"task.text_columns: 'txt' is not a column.*did you mean 'text'"),
        ("causal_lm", {"source_column": "text"}, r"task.target_column: missing; .* has: text, other"),
        ("causal_lm", {"source_column": "q", "target_column": "other"}, r"task.source_column: 'q' is not a column"),
        ("causal_lm", {"source_column": "text", "target_column": "a"}, r"task.target_column: 'a' is not a column"),
        ("summarization", {"target_column": "text"}, r"task.source_column: missing"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, name: str, config: dict[str, Any], message: str) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", text=["a b"] * 12, other=["c"] * 12)
    with pytest.raises(DataError, match=message):
        task_of(name, train_file=str(data), **config).check()


def test_other_bad_inputs(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", t=["a b"] * 12, n=[3] * 12)
    with pytest.raises(DataError, match=r"task.text_columns: one column is needed, not 0 \(none\); .* has: t, n"):
        task_of("causal_lm", train_file=str(data)).check()
    with pytest.raises(DataError, match=r"'n' holds 3, a int; text is needed"):
        task_of("causal_lm", train_file=str(data), source_column="t", target_column="n").check()
    no_end = word_tokenizer()
    no_end.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no end token"):
        task_of("causal_lm", train_file=str(data), text_columns=["t"]).tokenize(no_end, 8)


def test_scores_of_texts(tmp_path: Path) -> None:
    task = pairs_task(tmp_path, ["w1", "w2"], ["w5 w6", "w7"], "summarization")
    split = task.tokenize(word_tokenizer(ends=True), 16)["train"]
    ids = word_tokenizer().convert_tokens_to_ids
    written = task.predict(torch.tensor([[*ids(["w5", "w6"]), 1, 0], [*ids(["w8"]), 1, 0, 0]]), [0, 1], split)
    assert written == ["w5 w6", "w8"]
    assert task.score(dict(enumerate(written)), split, "train")["rouge1"] == pytest.approx(50)
    assert (task.primary_metric, task.higher_is_better) == ("rougeL", True)
    plain = task_of("causal_lm", **text_file(tmp_path, ["a b"]))
    assert (plain.primary_metric, plain.higher_is_better, plain.generation) == ("loss", False, None)
