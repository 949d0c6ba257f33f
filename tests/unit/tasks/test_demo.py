"""The demo's data cannot be told by its words alone, and a tiny encoder learns it in seconds."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from progscale.data import TrainLoader, eval_batches, evaluate_task, pad_values
from progscale.tasks.base import TASKS
from progscale.tasks.demo import DEMO_MODEL, LABELS, demo_tokenizer

BATCH, EPOCHS, PEAK, WARMUP, DECAY = 32, 3, 5e-4, 0.1, 0.01


def test_the_same_seed_gives_the_same_sentences() -> None:
    one, same, other = (TASKS.get("demo")(SimpleNamespace(), seed=seed).splits()["train"] for seed in (1, 1, 2))
    assert one.texts == same.texts and (one.labels == same.labels).all()
    assert one.texts != other.texts
    assert abs(one.labels.mean() - 0.5) < 0.01


def test_sizes_are_chosen_by_the_config() -> None:
    task = TASKS.get("demo")(SimpleNamespace(max_train_examples=50, max_eval_examples=7), seed=0)
    assert {name: len(split) for name, split in task.splits().items()} == {"train": 50, "validation": 7}
    assert (task.num_labels, task.label_names) == (2, LABELS)


def test_tokenizer_knows_every_word_and_can_be_saved(tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = demo_tokenizer()
    texts = TASKS.get("demo")(SimpleNamespace(), seed=0).splits()["train"].texts
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert len(tokenizer) == DEMO_MODEL["vocab_size"]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts[:5])["input_ids"] == ids[:5]


@pytest.mark.parametrize("seed", range(3))
def test_a_bag_of_words_stays_at_chance(seed: int) -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    splits = TASKS.get("demo")(SimpleNamespace(), seed=seed).splits()
    words = CountVectorizer()
    train = words.fit_transform(splits["train"].texts)
    model = LogisticRegression(max_iter=500).fit(train, splits["train"].labels)
    assert model.score(words.transform(splits["validation"].texts), splits["validation"].labels) < 0.6


@pytest.mark.parametrize("stages", [1, 3])
def test_a_tiny_encoder_learns_it(stages: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    task, tokenizer = TASKS.get("demo")(SimpleNamespace(), seed=0), demo_tokenizer()
    splits, pad = task.tokenize(tokenizer, 64), pad_values(tokenizer)
    model = BertForSequenceClassification(BertConfig(**DEMO_MODEL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=DECAY)
    loader = TrainLoader(splits["train"], pad, global_batch_size=BATCH, micro_batch_size=BATCH, seed=0)
    total = loader.steps_per_epoch * EPOCHS
    for epoch in range(EPOCHS):
        stage = epoch * stages // EPOCHS + 1
        for i, block in enumerate(model.bert.encoder.layer):
            block.requires_grad_(i >= (stage - 1) * 6 // stages)
        for batch in loader.epoch(epoch):
            step = epoch * loader.steps_per_epoch + batch.index
            optimizer.param_groups[0]["lr"] = PEAK * min(
                (step + 1) / math.ceil(WARMUP * total), (total - step) / (total - WARMUP * total)
            )
            micro = batch.micro_batches[0]
            optimizer.zero_grad()
            (task.loss(model(**micro.inputs), micro.labels).sum() / batch.size).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    predictions = {}
    model.eval()
    for micro in eval_batches(splits["validation"], 64, 1, 0, pad=pad):
        with torch.no_grad():
            found = task.predict(model(**micro.inputs), micro.rows, splits["validation"])
        predictions.update(zip(np.asarray(micro.rows).tolist(), found, strict=True))
    assert evaluate_task(task, splits["validation"], "validation", predictions)["accuracy"] > 0.95
