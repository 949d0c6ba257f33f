"""Tiny language models in local folders, with a tokenizer that knows ninety words, and texts for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import tiny_model

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
WORDS = ("summarize", ":", *(f"w{i}" for i in range(86)))


def word_tokenizer(*, pad: bool = True, ends: bool = False, begins: bool = False) -> Any:
    """A fast tokenizer with one token for each word; pad 0, end 1, begin 2, unknown 3, as the tiny models have it.

    Args:
        pad: it has a pad token (GPT-2's and Llama's have none).
        ends: it puts the end token after every text (T5's does).
        begins: it puts the begin token before every text (Llama's does).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = " ".join(part for part, used in (("<s>", begins), ("$A", True), ("</s>", ends)) if used)
    pair = " ".join(part for part, used in (("<s>", begins), ("$A", True), ("$B", True), ("</s>", ends)) if used)
    special = [("<s>", 2), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=special)
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **names)


def model_folder(folder: Path, family: str, head: str, *, blocks: int = 4, tokenizer: Any = None, **config: Any) -> Path:
    """A tiny model with its tokenizer, as from the hub."""
    tiny_model(family, head, blocks=blocks, **config).save_pretrained(folder)
    (tokenizer or word_tokenizer(ends=family == "t5")).save_pretrained(folder)
    return folder


def sentences(count: int, *, seed: int = 0, longest: int = 12) -> list[str]:
    """Texts of 2 to `longest` words, each word of which hangs on the one before."""
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(2, longest + 1, size=count):
        start, step = rng.integers(86), rng.integers(1, 4)
        found.append(" ".join(f"w{(start + step * i) % 86}" for i in range(length)))
    return found


def write_jsonl(path: Path, **columns: Sequence[Any]) -> Path:
    """A row for each place of the columns."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
