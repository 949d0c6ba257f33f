"""The backward pass ends at the lowest live block: counted, not assumed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from progscale.blocks import partition
from progscale.methods import METHODS, live_parameters
from progscale.models.family import FAMILIES
from progscale.schedule import Stage
from progscale.setup import enable_checkpointing
from tests.tiny import method_for, tiny_model

BLOCKS = 4
SMALL: dict[str, dict[str, Any]] = {"adapter": {"size": 1}, "lora": {"rank": 1}, "qlora": {"rank": 1}}
INPUTS = {"input_ids": torch.arange(24).view(2, 12) + 5}


def operations(name: str, first_block: int, *, checkpointing: bool, embeddings: bool = True) -> tuple[int, int]:
    """Floating-point operations of a forward pass, and of the backward pass after it, with the blocks from `first_block` live."""
    method = method_for("bert", name, **SMALL.get(name, {}))
    model = method.prepare(tiny_model("bert", blocks=BLOCKS)).train()
    if checkpointing:
        enable_checkpointing(model)
    stage = Stage(1, 0, 1, {"blocks": tuple(range(first_block, BLOCKS))}, embeddings=embeddings)
    live = live_parameters(stage, partition(model, FAMILIES.get("bert")), method)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in live)
    with FlopCounterMode(display=False) as forward:
        loss = model(**INPUTS).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [name for name in METHODS.names() if name != "full"])
def test_frozen_blocks_have_no_backward_pass(name: str, checkpointing: bool) -> None:
    """Embeddings stay frozen although the policy would train them; each live block adds the same, and none but live ones."""
    counts = [operations(name, first, checkpointing=checkpointing) for first in range(BLOCKS + 1)]
    forward, backward = [count for count, _ in counts], [count for _, count in counts]
    assert len(set(forward)) == 1
    # Products with quantised weights are no matrix products to the counter where no gradient is kept.
    plain = operations("bitfit", 0, checkpointing=False)[0]
    one_block = (plain - head_operations()) / BLOCKS
    assert backward[BLOCKS] <= 3 * head_operations(), "with no live block only the head has a backward pass"
    steps = [low - high for low, high in pairwise(backward)]
    # Each block's own part; the lowest live one leaves out the gradient of its own input, where nothing below asks for it.
    assert len(set(steps[:-1])) == 1
    # The gradient of the activations is as much as the forward pass, and so is recomputing it, up to the last tensor that is
    # needed; of weights little is trained.
    low, high = (1.5, 2.5) if checkpointing and name != "qlora" else (0.9, 1.5)
    assert low < steps[0] / one_block < high


def head_operations() -> int:
    """Of the pooler and the classifier, forward, on two rows of width 16."""
    return 2 * 2 * (16 * 16 + 16 * 2)


def test_trained_embeddings_keep_the_backward_pass_running() -> None:
    """What the methods avoid: full fine-tuning with the embeddings trained goes down to them."""
    trained = operations("full", BLOCKS - 1, checkpointing=False, embeddings=True)[1]
    frozen = operations("full", BLOCKS - 1, checkpointing=False, embeddings=False)[1]
    assert trained > 2 * frozen
