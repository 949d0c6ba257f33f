"""SQuAD's questions: read from the official JSON or the hub, and cut into windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from progscale.errors import DataError
from progscale.tasks.cache import Arrays, batches_with_progress
from progscale.tasks.files import Table, read_json
from progscale.tasks.ragged import Ragged, offsets_of

TOKENIZE_QUESTIONS = 500
# What a window has to hold besides the overlap, and what is left of a question at least.
NEW_TOKENS = 16
QUESTION_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Questions:
    """One split before tokenising.

    Attributes:
        ids: of the questions.
        questions: their texts, spaces at the ends removed.
        contexts: the passage of each question.
        answers: the right answers of each question; none where it cannot be answered.
        starts: character offset of each of the answers in its passage.
        origin: where they come from, for messages.
    """

    ids: list[str]
    questions: list[str]
    contexts: list[str]
    answers: list[list[str]]
    starts: list[list[int]]
    origin: str

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> Questions:
        """The given questions, in the order given."""
        return Questions(
            [self.ids[row] for row in rows],
            [self.questions[row] for row in rows],
            [self.contexts[row] for row in rows],
            [self.answers[row] for row in rows],
            [self.starts[row] for row in rows],
            self.origin,
        )


def read_squad(path: Path) -> Questions:
    """The questions of an official file.

    Raises:
        DataError: it is not JSON, or not laid out as SQuAD is.
    """
    value = read_json(path)
    found = Questions([], [], [], [], [], str(path))
    place = ""
    try:
        for a, article in enumerate(value["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{a}].paragraphs[{p}]"
                context = _text(paragraph["context"])
                for q, question in enumerate(paragraph["qas"]):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    impossible = question.get("is_impossible", False)
                    answers = [] if impossible else question["answers"]
                    _append(found, question["id"], question["question"], context, answers)
    except (KeyError, TypeError, AttributeError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        where = f" in {place}" if place else ""
        raise DataError(
            f"{path}: not laid out as SQuAD{where} ({missing}); expected data → paragraphs → context, qas → id, "
            "question, answers → text, answer_start"
        ) from None
    return found


def from_hub_table(table: Table) -> Questions:
    """The questions of a split of the hub's data set.

    Raises:
        DataError: a column is missing.
    """
    found = Questions([], [], [], [], [], table.name)
    names = ("id", "question", "context", "answers")
    for row, (key, question, context, answers) in enumerate(
        zip(*(table.column(name, "task.hub") for name in names), strict=True)
    ):
        try:
            pairs = [
                {"text": text, "answer_start": start}
                for text, start in zip(answers["text"], answers["answer_start"], strict=True)
            ]
            _append(found, key, question, _text(context), pairs)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{table.name}: {table.where(row)}: not laid out as SQuAD ({error})") from None
    return found


def _append(found: Questions, key: Any, question: Any, context: str, answers: Any) -> None:
    found.ids.append(_text(key))
    # Some questions begin with many spaces, which would become tokens with some tokenizers.
    found.questions.append(_text(question).strip())
    found.contexts.append(context)
    found.answers.append([_text(answer["text"]) for answer in answers])
    starts = [answer["answer_start"] for answer in answers]
    if not all(type(start) is int for start in starts):
        raise TypeError("answer_start is no integer")
    found.starts.append(starts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} where text is needed")
    return value


def check_questions(questions: Questions, *, version_2: bool) -> None:
    """Raises DataError where the questions cannot be used.

    They are: none at all; an id twice; no valid Unicode; (1.1) a question without an answer; an answer that does not
    stand in the passage where its offset says.
    """
    origin = questions.origin
    if not len(questions):
        raise DataError(f"{origin}: no questions")
    if len(set(questions.ids)) < len(questions):
        seen: set[str] = set()
        twice = next(key for key in questions.ids if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DataError(f"{origin}: the question id '{twice}' is there twice")
    wrong = []
    for i, (context, texts, starts) in enumerate(zip(questions.contexts, questions.answers, questions.starts, strict=True)):
        if not texts and not version_2:
            raise DataError(f"{origin}: question '{questions.ids[i]}' has no answer; for such data take task squad-v2")
        if any(
            start < 0 or not text.strip() or not context.startswith(text, start)
            for text, start in zip(texts, starts, strict=True)
        ):
            wrong.append(questions.ids[i])
    if wrong:
        raise DataError(
            f"{origin}: {len(wrong)} of {len(questions)} questions have an answer that is not in the passage at its "
            f"answer_start, first: '{wrong[0]}'; offsets count characters, not bytes"
        )
    for key, question, context in zip(questions.ids, questions.questions, questions.contexts, strict=True):
        try:
            question.encode()
            context.encode()
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            message = f"{origin}: question '{key}' holds U+{ord(character):04X}, which is no character"
            raise DataError(message) from None


def encode_windows(
    tokenizer: Any,
    data: Questions,
    max_length: int,
    doc_stride: int,
    *,
    targets: bool,
    name: str,
) -> Arrays:
    """The windows of all questions.

    Args:
        tokenizer: a fast one.
        data: the questions.
        max_length: tokens of a window at most, question and special tokens included.
        doc_stride: tokens of the passage that a window shares with the one before.
        targets: make start and end positions (training); else the character spans that scoring needs.
        name: of the split, for the progress line.

    Returns:
        "input_ids" (and "token_type_ids") flat over windows with "offsets"; for each window "question" (its index),
        "first" (the first context token) and "cls"; "cut", how many questions lost their end; "start_positions" and
        "end_positions", or "spans" `(context tokens, 2)` with "span_offsets".

    Raises:
        DataError: the stride leaves no room in a window.
    """
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - doc_stride - NEW_TOKENS
    if room < QUESTION_TOKENS:
        fit = doc_stride + room - QUESTION_TOKENS
        advice = f"at most {fit} fits" if fit >= 0 else "train.max_length has to grow as well"
        raise DataError(f"task.doc_stride: {doc_stride} leaves no room in train.max_length {max_length}; {advice}")
    inputs = [column for column in ("input_ids", "token_type_ids") if column in tokenizer.model_input_names]
    parts: dict[str, list[Ragged]] = {column: [] for column in inputs}
    question_of: list[int] = []
    first: list[int] = []
    cls: list[int] = []
    spans: list[np.ndarray] = []
    positions: list[tuple[int, int]] = []
    cut = 0
    for begin, end in batches_with_progress(len(data), TOKENIZE_QUESTIONS, f"tokenising {name}"):
        questions, shortened = _shorten(tokenizer, data.questions[begin:end], room)
        cut += shortened
        batch = tokenizer(
            questions,
            data.contexts[begin:end],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for column in inputs:
            parts[column].append(Ragged.from_rows(batch[column]))
        for window, within in enumerate(batch["overflow_to_sample_mapping"]):
            question = begin + within
            sequence = batch.sequence_ids(window)
            # A context without any token (empty, or spaces only) has no span at all.
            count = sequence.count(1)
            start = sequence.index(1) if count else len(sequence)
            ids = batch["input_ids"][window]
            span = np.asarray(batch["offset_mapping"][window][start : start + count], dtype=np.int32).reshape(-1, 2)
            question_of.append(question)
            first.append(start)
            cls.append(ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0)
            if targets:
                positions.append(_positions(data, question, span, start, cls[-1]))
            else:
                spans.append(span)
    columns = {column: Ragged.concatenate(parts[column]) for column in inputs}
    arrays = {column: ragged.values for column, ragged in columns.items()}
    if "token_type_ids" in arrays:
        arrays["token_type_ids"] = arrays["token_type_ids"].astype(np.uint8)
    arrays |= {
        "offsets": columns["input_ids"].offsets,
        "question": np.asarray(question_of, dtype=np.int64),
        "first": np.asarray(first, dtype=np.int64),
        "cls": np.asarray(cls, dtype=np.int64),
        "cut": np.asarray(cut),
    }
    if targets:
        both = np.asarray(positions, dtype=np.int64).reshape(-1, 2)
        arrays |= {"start_positions": both[:, 0].copy(), "end_positions": both[:, 1].copy()}
    else:
        lengths = np.asarray([len(span) for span in spans], dtype=np.int64)
        values = np.concatenate(spans) if spans else np.empty((0, 2), np.int32)
        arrays |= {"spans": values, "span_offsets": offsets_of(lengths)}
    return arrays


def _shorten(tokenizer: Any, questions: list[str], limit: int) -> tuple[list[str], int]:
    """(questions of at most `limit` tokens, how many were cut): a longer one would push the passage out."""
    spans = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    cut = 0
    result = list(questions)
    for i, offsets in enumerate(spans["offset_mapping"]):
        if len(offsets) > limit:
            result[i] = questions[i][: offsets[limit - 1][1]]
            cut += 1
    return result, cut


def _positions(data: Questions, question: int, span: np.ndarray, first: int, cls: int) -> tuple[int, int]:
    """First and last token of the first answer within a window; the CLS token where it is not wholly in it."""
    if not data.answers[question] or not len(span):
        return cls, cls
    text = data.answers[question][0]
    begin = data.starts[question][0] + len(text) - len(text.lstrip())
    end = begin + len(text.strip())
    if begin < span[0, 0] or end > span[-1, 1]:
        return cls, cls
    start_token = int(np.searchsorted(span[:, 0], begin, side="right")) - 1
    end_token = int(np.searchsorted(span[:, 1], end, side="left"))
    return first + start_token, first + max(start_token, end_token)
