"""The frozen blocks at the bottom: eval mode up to their end, skipped from the inside, and nothing of it left afterwards."""

from __future__ import annotations

import pytest
import torch

from progscale.blocks import partition
from progscale.models.loading import family_of
from progscale.prefix import Prefix, frozen_names
from tests.harness.cases import builds_of, make_engine
from tests.tiny import FAMILY_NAMES, tiny_model

TOKENS = torch.randint(5, 101, (3, 12), generator=torch.Generator().manual_seed(1))


def prepared(family: str = "bert", dropout: float = 0.0, depth: int = 2) -> tuple[Prefix, dict[str, torch.Tensor]]:
    module = tiny_model(family, dropout=dropout).train()
    tokens = TOKENS.clone()
    if module.config.is_encoder_decoder:
        tokens[:, -1] = module.config.eos_token_id
    engine = make_engine(module, "plain")
    _, builds = builds_of(module, "progtuning", "first_stage", 2, 4, {})
    engine.begin_stage(builds[1])
    prefix = Prefix(engine, family_of(module))
    prefix.freeze(depth)
    return prefix, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits(prefix: Prefix, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs: torch.Tensor = prefix._engine.forward(inputs).logits
    return outputs.detach()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_skipped_blocks_make_no_difference(family: str) -> None:
    prefix, inputs = prepared(family)
    with prefix.running() as passage:
        expected = logits(prefix, inputs)
    assert passage.output is not None
    length = inputs["input_ids"].shape[1]
    whole = passage.output[:, :length].clone()
    half = prefix.compute(inputs)[:, :length]
    assert torch.equal(half, whole)
    ran = [0]
    for block in prefix._blocks[:2]:
        next(child for child in block.modules() if isinstance(child, torch.nn.LayerNorm | torch.nn.Linear)).register_forward_hook(
            lambda *_: ran.__setitem__(0, ran[0] + 1)
        )
    with prefix.running(2, whole):
        assert torch.equal(logits(prefix, inputs), expected)
    assert ran == [0], "a block that is skipped computes nothing"
    with prefix.running(2, whole + 1):
        assert not torch.equal(logits(prefix, inputs), expected)


def test_dropout_is_off_below_and_on_above() -> None:
    prefix, inputs = prepared(dropout=0.5)
    with prefix.running() as first:
        one = logits(prefix, inputs)
    with prefix.running() as second:
        two = logits(prefix, inputs)
    assert first.output is not None
    assert second.output is not None
    assert torch.equal(first.output, second.output)
    assert not torch.equal(one, two)
    module = prefix._engine.module
    assert module.training
    assert [block.training for block in prefix._blocks] == [False, False, True, True]


def test_evaluation_leaves_all_in_eval_mode() -> None:
    prefix, inputs = prepared(dropout=0.5)
    with prefix._engine.evaluating():
        with prefix.running():
            one = logits(prefix, inputs)
        assert not any(child.training for child in prefix._engine.module.modules())
        with prefix.running():
            assert torch.equal(logits(prefix, inputs), one)


def test_a_forward_pass_that_fails_leaves_training_mode() -> None:
    prefix, inputs = prepared()
    with pytest.raises(RuntimeError, match="no memory"), prefix.running():
        raise RuntimeError("no memory")
    assert prefix._engine.module.training
    with prefix.running():
        logits(prefix, inputs)


def test_other_passes_are_left_alone() -> None:
    """What does not come by the loop, such as writing a text, computes all blocks."""
    prefix, inputs = prepared()
    with prefix.running():
        expected = logits(prefix, inputs)
    assert torch.equal(logits(prefix, inputs), expected)


def test_released_a_model_is_as_it_was() -> None:
    prefix, inputs = prepared()
    with prefix.running():
        logits(prefix, inputs)
    prefix.freeze(1)
    assert prefix._blocks[1].training, "a block that is trained again has its dropout again"
    block = prefix._blocks[0]
    assert "forward" in vars(block)
    prefix.release()
    assert not any("forward" in vars(block) for block in prefix._blocks)
    with prefix.running() as passage:
        logits(prefix, inputs)
    assert passage.output is None


def test_blocks_that_hand_on_more_than_hidden_states_are_told() -> None:
    prefix, inputs = prepared("t5")
    prefix._hand_on = None
    with prefix.running():
        logits(prefix, inputs)
    assert prefix.opaque == "its blocks hand on more than hidden states"
    assert not prefix.understands(1)


def test_what_is_still_trained_below_is_told() -> None:
    """A module of somebody's own model that stands in no part of it, say."""
    prefix, inputs = prepared()
    next(iter(prefix._engine.module.parameters())).requires_grad_(True)
    with prefix.running():
        logits(prefix, inputs)
    assert prefix.opaque == "something below them is still trained"


def test_what_decides_the_output_of_the_frozen_blocks() -> None:
    module = tiny_model("bert")
    names = frozen_names(partition(module, family_of(module)), 2)
    assert {name.split(".")[1] for name in names} == {"embeddings", "encoder"}
    assert {name.split(".")[3] for name in names if "encoder" in name} == {"0", "1"}
