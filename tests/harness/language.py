"""Tiny language models in local folders, with a tokenizer that knows ninety words, and texts for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progscale.data import TrainLoader, eval_batches, pad_values
from progscale.tasks.base import IGNORED, Tokenized
from progscale.tasks.causal_lm import CausalLanguageModel
from progscale.tasks.language import Written
from progscale.tasks.ragged import Ragged
from progscale.tasks.summarization import Summarization
from tests.harness.cases import builds_of, make_engine
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


@dataclass
class Outcome:
    """What a run of a language model showed on this rank."""

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, torch.Tensor]
    evaluation_loss: float
    written: dict[int, list[int]]


def token_split(family: str, rows: int) -> Tokenized:
    """Rows of unequal length, whose targets are few in some and many in others."""
    rng = np.random.default_rng(5)
    ids = Ragged.from_rows([rng.integers(5, 101, size=size).tolist() for size in rng.integers(4, 20, size=rows)])
    if family == "t5":
        labels = Ragged.from_rows([rng.integers(5, 101, size=size).tolist() for size in rng.integers(1, 15, size=rows)])
        return Tokenized({"input_ids": ids}, ids.lengths + labels.lengths, {"labels": labels}, targets=labels.lengths)
    prompts = rng.integers(1, ids.lengths)
    values = ids.values.copy()
    for row, prompt in enumerate(prompts):
        values[ids.offsets[row] : ids.offsets[row] + prompt] = IGNORED
    written = Written([""] * rows, prompts)
    return Tokenized({"input_ids": ids}, ids.lengths, {"labels": Ragged(values, ids.offsets)}, written, ids.lengths - prompts)


def run(
    engine: str = "plain",
    family: str = "gpt2",
    steps: int = 4,
    options: dict[str, Any] | None = None,
    precision: str = "fp32",
) -> Outcome:
    """Trains two stages on batches whose ranks have unequally many target tokens, evaluates, and lets the model write.

    Args:
        engine: a key of ENGINES.
        family: "gpt2" or "t5".
        steps: of both stages; the last batch of an epoch of two is short.
        options: of the schedule `custom`; None for `progtuning`.
        precision: of the engine.
    """
    module = tiny_model(family, "seq2seq_lm" if family == "t5" else "causal_lm")
    module.train()
    made = make_engine(module, engine, precision=precision)
    schedule = "progtuning" if options is None else "custom"
    _, builds = builds_of(module, schedule, "first_stage", 2, steps, options or {})
    split, pad = token_split(family, 9), pad_values(word_tokenizer(), module.config)
    kind: Any = Summarization if family == "t5" else CausalLanguageModel
    task = kind.__new__(kind)  # its data is ours
    task._tokenizer = word_tokenizer()
    loader = TrainLoader(
        split, pad, global_batch_size=6, micro_batch_size=2, world_size=made.world_size, rank=made.rank, group_by_length=False
    )
    batches = [batch for epoch in range(steps // 2) for batch in loader.epoch(epoch)]
    losses, norms = [], []
    for build in builds:
        made.begin_stage(build)
        for step in range(build.stage.start_step, build.stage.end_step):
            result = made.train_step(batches[step].micro_batches, batches[step].weight, task.loss, 1e-3)
            losses.append(result.loss)
            norms.append(result.grad_norm)
    summed, written = 0.0, {}
    with made.evaluating():
        for micro in eval_batches(split, 2, made.world_size, made.rank, pad=pad):
            rows = micro.rows.tolist()
            loss = task.loss(made.forward(micro.inputs), micro.labels).sum().item()
            # So many end tokens that rows, and ranks, are done at different times.
            ends = [*range(1, 40), 82]
            prompts = task.prompts(micro.inputs, rows, split)
            # A T5 whose outputs are tied to its embeddings would write its start token, the pad token, for ever.
            how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends, "suppress_tokens": [0]}
            ids = made.generate(prompts, **how).tolist()
            if micro.weight:
                summed += loss
                written |= {row: [token for token in tokens if token] for row, tokens in zip(rows, ids, strict=True)}
    everyone = made.gather_objects((summed, written))
    parameters = {name: value.clone() for name, value in made.full_parameters() if value is not None}
    made.close()
    return Outcome(
        losses,
        norms,
        parameters,
        sum(part for part, _ in everyone) / split.weight(),
        {row: tokens for _, part in everyone for row, tokens in part.items()},
    )
