"""What a step computes, as torch counts it, beside the formula."""

from __future__ import annotations

import pytest
import torch

from progscale.cost.work import work_of
from progscale.engine.counting import StepCounter
from progscale.meters import StageOperations
from tests.harness.cases import builds_of, make_engine, row_loss, share
from tests.tiny import tiny_model

WIDTH, ROWS = 32, 6


def test_a_product_and_its_gradients() -> None:
    left, right = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    with StepCounter() as counter:
        (left @ right).sum().backward()
    assert counter.operations == 3 * 2 * 5 * 7 * 3


@pytest.mark.parametrize("attention", ["sdpa", "by hand"])
def test_attention_counts_alike_however_it_is_computed(attention: str) -> None:
    rows, heads, length, size = 2, 3, 8, 4
    query, key, value = (torch.randn(rows, heads, length, size, requires_grad=True) for _ in range(3))
    with StepCounter() as counter:
        if attention == "sdpa":
            result = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            result = torch.softmax(query @ key.transpose(-1, -2) / 2, -1) @ value
        forward = counter.operations
        result.sum().backward()
    assert forward == 4 * rows * heads * length * length * size
    # The fused kernel computes the scores once more on its way back.
    assert counter.operations - forward == (2.5 if attention == "sdpa" else 2) * forward


@pytest.mark.parametrize("schedule", ["none", "progtuning"])
@pytest.mark.parametrize("embeddings", ["always", "first_stage"])
def test_a_step_is_what_the_formula_says(schedule: str, embeddings: str) -> None:
    """Within the one twentieth that the fused attention of a tiny model makes, in both stages."""
    module = tiny_model("bert", blocks=4).train()
    engine = make_engine(module, "plain", counts=True)
    parts, builds = builds_of(module, schedule, embeddings, 2, 6, {})
    for build in builds:
        engine.begin_stage(build)
        for step in range(3):
            assert engine.operations is None
            batches = share(step, ROWS, 101, 0, 1, 3)
            engine.train_step(batches, ROWS, row_loss, 1e-3)
        assert engine.operations is not None
        lowest = 0 if build.stage.embeddings else build.stage.live_blocks["blocks"][0]
        work = work_of(parts, frozenset(build.live), lowest, head_by_row=True)
        formula = StageOperations(work, work, module.config.hidden_size, 0, 0)
        shapes = [tuple(batch.inputs["input_ids"].shape) for batch in batches]
        assert engine.operations / formula.of(shapes) == pytest.approx(1, abs=0.05)
        assert formula.of(shapes) == formula.of_baseline(shapes)


def test_what_a_cache_spares() -> None:
    from progscale.cost import Work

    work = Work(forward=100, activation=50, weight=50, forward_row=0, activation_row=0, weight_row=0, blocks=4, blocks_back=2)
    stage = StageOperations(work, work, width=8, block=25, planned=0)
    whole, a_block = stage.of([(3, 10)]), 2 * 10 * 25 + 4 * 10 * 10 * 8
    # Three rows that begin at block 2.
    assert stage.of([(3, 10)], [(10, 6)]) == whole - 6 * a_block
