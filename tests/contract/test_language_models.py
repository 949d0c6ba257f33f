"""Language models under every engine: the mean over target tokens, two stacks, and writing in step."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from progscale.data import collate, pad_values
from tests.harness.cases import ENGINES
from tests.harness.language import Outcome, run, token_split, word_tokenizer
from tests.harness.worker import TwoRanks
from tests.tiny import tiny_model

SEVERAL = [name for name in ENGINES if name != "plain"]
# The encoder is trained on when the decoder is frozen, and the other way round: the gradient runs through what is frozen.
STACKS = {"first_blocks": {"encoder": [0, 2], "decoder": [4, 0]}}


@cache
def alone(family: str, by_stack: bool = False) -> Outcome:
    return run("plain", family, options=STACKS if by_stack else None)


@pytest.mark.parametrize("engine", SEVERAL)
@pytest.mark.parametrize(("family", "by_stack"), [("gpt2", False), ("t5", False), ("t5", True)])
def test_one_and_two_processes_agree(two_ranks: TwoRanks, engine: str, family: str, by_stack: bool) -> None:
    options: dict[str, Any] | None = STACKS if by_stack else None
    outcome = two_ranks.run("tests.harness.language:run", engine=engine, family=family, options=options)[0]
    expected = alone(family, by_stack)
    assert outcome.losses == pytest.approx(expected.losses, abs=2e-6)
    assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert outcome.evaluation_loss == pytest.approx(expected.evaluation_loss, abs=2e-5)
    for name, value in expected.parameters.items():
        assert (outcome.parameters[name] - value).abs().max().item() < 5e-5, name
    assert len({len(tokens) for tokens in expected.written.values()}) > 1, "no row is done before another"
    assert outcome.written == expected.written


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_loss_is_transformers_mean_over_tokens(family: str) -> None:
    """The whole global batch at once through the model's own loss."""
    split = token_split(family, 9)
    model = tiny_model(family, "seq2seq_lm" if family == "t5" else "causal_lm").train()
    rows = run_rows(split)
    batch = collate(split, rows, pad_values(word_tokenizer(), model.config))
    with torch.no_grad():
        wanted = model(**batch.inputs, labels=batch.labels["labels"]).loss.item()
    assert alone(family).losses[0] == pytest.approx(wanted, abs=2e-6)


def run_rows(split: Any) -> Any:
    """The rows of the first global batch of `run`."""
    from progscale.data import global_batches

    return global_batches(split.lengths, 6, seed=0, epoch=0, group_by_length=False)[0]


def test_frozen_stacks_stay_as_they_are() -> None:
    """In a stage that trains no block of the decoder, the encoder moves all the same."""
    before = dict(tiny_model("t5", "seq2seq_lm").named_parameters())
    after = run("plain", "t5", steps=2, options={"first_blocks": {"encoder": [0, 4], "decoder": [4, 0]}}).parameters
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert all(name in moved for name in before), "each stack has a stage of its own"
