"""The operations that the plan counts are those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from progscale.blocks import partition
from progscale.cost import Flops, work_of
from progscale.methods import live_parameters
from progscale.models.loading import family_of
from progscale.plan import Plan, make_plan
from progscale.schedule import Stage, build_stages
from progscale.setup import enable_checkpointing
from tests.tiny import FAMILY_NAMES, method_for, tiny_model

ROWS, LENGTH, BLOCKS = 2, 16, 4
# Of torch's count. Windows, relative positions in the scores, embeddings that are projected, and a decoder's second attention are
# not in the formula.
TOLERANCE = {"longformer": 0.3, "deberta": 0.3, "deberta-v2": 0.35, "electra": 0.05, "t5": 0.1, "modernbert": 0.06}


def eager(model: Any) -> Any:
    """Torch counts nothing for its own attention on a CPU."""
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    return model


def plan_of(family: str, method: str = "full", checkpointing: bool = False) -> tuple[Any, Plan, tuple[Stage, ...]]:
    trained = method_for(family, method)
    model = trained.prepare(eager(tiny_model(family, blocks=BLOCKS))).train()
    parts = partition(model, family_of(model))
    stages = build_stages("progtuning", num_blocks=parts.num_blocks, stages=3, total_steps=3, embeddings="first_stage")
    width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    plan = make_plan(parts, stages, trained, 1, width=width, checkpointing=checkpointing)
    if checkpointing:
        enable_checkpointing(model)
    return model, plan, stages


def counted(model: Any, live: tuple[str, ...]) -> tuple[int, int]:
    """Forward and backward, as torch counts them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in live)
        parameter.grad = None
    tokens = torch.randint(5, 101, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    if model.config.is_encoder_decoder:
        tokens[tokens == model.config.eos_token_id] = 7
        tokens[:, -1] = model.config.eos_token_id
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=tokens).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def planned(plan: Plan, stage: int) -> Flops:
    return plan.stages[stage].work.flops(LENGTH, plan.width).times(ROWS)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family(family: str) -> None:
    model, plan, _ = plan_of(family)
    everything = tuple(name for name, _ in model.named_parameters())
    forward, backward = counted(model, everything)
    found, tolerance = planned(plan, 0), TOLERANCE.get(family, 0.03)
    assert found.forward == pytest.approx(forward, rel=tolerance)
    assert found.activation_gradient + found.weight_gradient == pytest.approx(backward, rel=2 * tolerance)


@pytest.mark.parametrize("method", ["full", "lora", "bitfit", "adapter"])
def test_every_stage_and_method(method: str) -> None:
    """The gradient of the lowest live block's own input is in the plan's count, and nobody computes it."""
    model, plan, stages = plan_of("bert", method)
    parts = partition(model, family_of(model))
    for number, stage in enumerate(stages):
        forward, backward = counted(model, live_parameters(stage, parts, method_for("bert", method)))
        found = planned(plan, number)
        assert found.forward == pytest.approx(forward, rel=0.01)
        mine = found.activation_gradient + found.weight_gradient
        one_block = found.forward / BLOCKS
        assert backward - 0.02 * forward <= mine <= backward + 0.6 * one_block


def test_checkpointing_runs_forward_once_more() -> None:
    model, plan, stages = plan_of("bert", checkpointing=True)
    parts = partition(model, family_of(model))
    for number, stage in enumerate(stages):
        forward, backward = counted(model, live_parameters(stage, parts, method_for("bert", "full")))
        found = planned(plan, number)
        # Recomputing stops at the last tensor that is needed.
        assert found.total == pytest.approx(forward + backward, rel=0.08)
        assert found.forward > forward


def test_a_language_models_output_counts_where_it_is_tied() -> None:
    model = eager(tiny_model("gpt2", "causal_lm", blocks=2))
    trained = method_for("gpt2", "full", head="causal_lm")
    parts = partition(model, family_of(model))
    stages = build_stages("none", num_blocks=parts.num_blocks, stages=1, total_steps=1, embeddings="always")
    plan = make_plan(parts, stages, trained, 1, width=16)
    tokens = torch.randint(5, 101, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as forward:
        model(input_ids=tokens)
    assert planned(plan, 0).forward == pytest.approx(forward.get_total_flops(), rel=0.03)


def test_by_hand() -> None:
    model = tiny_model("bert", blocks=1)
    parts = partition(model, family_of(model))
    inside = 4 * 16 * 16 + 2 * 16 * 32
    work = work_of(parts, frozenset(), lowest=1, head_by_row=True)
    head = 16 * 16 + 2 * 16
    assert work.flops(8, 16) == Flops(2 * 8 * inside + 2 * head + 4 * 64 * 16, 2 * head, 0)
    everything = work_of(parts, frozenset(parts.parameters), lowest=0, head_by_row=True)
    assert everything.flops(8, 16).weight_gradient == 2 * 8 * inside + 2 * head
    assert everything.flops(8, 16).activation_gradient == 2 * 8 * inside + 2 * head + 8 * 64 * 16
