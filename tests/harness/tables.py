"""A user's own table beside a user's own model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from progscale.tasks.demo import demo_sentences, demo_tokenizer
from tests.harness.language import write_jsonl

# Settings of a run on it in two stages, for `programs.settings`; the table's folder is the working one.
OWN_TABLE: dict[str, Any] = {
    "task__max_train_examples": ...,
    "task__max_eval_examples": ...,
    "schedule__stages": 2,
    "model__name": "model",
    "task__name": "table",
    "task__train_file": "train.jsonl",
    "task__validation_file": "dev.jsonl",
    "task__text_columns": ["text"],
    "task__label_column": "verdict",
    "train__max_length": 64,
}


def write_table(folder: Path, model: Any = None) -> None:
    """Writes 64 + 16 rows, and the demo's tokenizer and a model into the folder "model"."""
    demo_tokenizer().save_pretrained(folder / "model")
    if model is not None:
        model.save_pretrained(folder / "model")
    texts, labels = demo_sentences(80, np.random.default_rng(0))
    for name, part in (("train", slice(0, 64)), ("dev", slice(64, 80))):
        write_jsonl(folder / f"{name}.jsonl", text=texts[part], verdict=[int(label) for label in labels[part]])
