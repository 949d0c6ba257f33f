"""The real GLUE and SQuAD files: nothing is lost in reading, and full marks for a model that knows the answers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from progscale.tasks.base import TASKS, evaluate_task
from progscale.tasks.demo import demo_tokenizer
from progscale.tasks.metrics.squad import exact_match

FOLDER = Path(os.environ.get("PROGSCALE_REAL_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real data at {FOLDER} (PROGSCALE_REAL_DATA)"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGSCALE_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "train", "dev"), [("cola", 8551, 1043), ("mrpc", 3668, 408), ("rte", 2490, 277), ("stsb", 5749, 1500)]
)
def test_glue(name: str, train: int, dev: int) -> None:
    task = TASKS.get(name)(SimpleNamespace(path=str(FOLDER / "glue")), seed=0)
    splits = task.splits()
    assert {key: len(split) for key, split in splits.items()} == {"train": train, "validation": dev}
    assert all(all(split.texts) for split in splits.values())
    split = task.tokenize(demo_tokenizer(), 128)["validation"]
    labels = split.labels["labels"]
    if task.label_names:
        assert set(labels.tolist()) == set(range(task.num_labels))
        right: list[Any] = np.eye(task.num_labels)[labels].tolist()
    else:
        assert labels.min() >= 0 and labels.max() <= 5
        right = labels[:, None].tolist()
    scores = evaluate_task(task, split, "validation", dict(enumerate(right)))
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))


def test_squad_files() -> None:
    task = TASKS.get("squad-v1")(SimpleNamespace(path=str(FOLDER / "squad")), seed=0)
    splits = task.splits()
    assert len(splits["validation"]) == 10570
    assert len(splits["train"]) in (87599, 11877), "the whole training set, or its first 44 articles"


def test_squad_windows() -> None:
    """Training targets spell the answer, and a model that marks the answer's tokens scores full marks."""
    config = SimpleNamespace(path=str(FOLDER / "squad"), max_train_examples=300, max_eval_examples=300, doc_stride=32)
    task = TASKS.get("squad-v1")(config, seed=0)
    splits = task.tokenize(demo_tokenizer(), 128)
    train = splits["train"]
    marked = train.source.question[train.labels["start_positions"] > 0]
    assert len(set(marked.tolist())) == 300 < len(train)

    split = splits["validation"]
    source = split.source
    predictions = {}
    spelled = []
    for row in range(len(split)):
        start = torch.full((1, int(split.lengths[row])), -5.0)
        end = start.clone()
        question = int(source.question[row])
        gold, begin = source.questions.answers[question][0], source.questions.starts[question][0]
        span, first = source.spans[row], int(source.first[row])
        if span[0, 0] <= begin and begin + len(gold) <= span[-1, 1]:
            left = int(np.searchsorted(span[:, 0], begin, side="right")) - 1
            right = int(np.searchsorted(span[:, 1], begin + len(gold)))
            start[0, first + left] = end[0, first + right] = 5.0
            spelled.append(exact_match(source.questions.contexts[question][span[left, 0] : span[right, 1]], gold))
        outputs = SimpleNamespace(start_logits=start, end_logits=end)
        predictions[row] = task.predict(outputs, [row], split)[0]
    scores = evaluate_task(task, split, "validation", predictions)
    # Words are the tokens here: an answer that is a part of a word cannot be spelled exactly.
    assert scores["exact_match"] >= 100 * np.mean(spelled) - 2 and scores["f1"] > 95
