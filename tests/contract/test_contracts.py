"""The contracts over every schedule × family × method × engine: every pair in the ordinary run, the product on demand."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from progscale.methods import METHODS
from progscale.schedule import SCHEDULES
from tests.harness.cases import ENGINES, VARIANTS, Outcome, global_batch, run
from tests.harness.pairs import all_pairs, full_product, part_of
from tests.harness.refused import is_allowed
from tests.harness.worker import TwoRanks
from tests.tiny import FAMILY_NAMES, tiny_model

STAGES, STEPS, BLOCKS = 3, 6, 4
OPTIONS = {"custom": {"first_blocks": [2, 0, 4]}, "weighted": {"block_weights": [1.0, 5.0, 1.0, 1.0]}, "only": {"blocks": [1]}}
FACTORS = {
    "engine": list(ENGINES),
    "family": FAMILY_NAMES,
    "schedule": SCHEDULES.names(),
    "embeddings": ["always", "first_stage", "never"],
    "method": METHODS.names(),
}
PAIRS = all_pairs(FACTORS, is_allowed)
# Hours of them: PROGSCALE_PART=3/12 is the third of twelve parts, each with the engines of what it has.
PRODUCT = part_of(full_product(FACTORS, is_allowed), os.environ.get("PROGSCALE_PART") or "1/1", together="engine")
# Tensors whose sizes are no multiples of what DeepSpeed aligns to.
ODD = {"family": "bert", "schedule": "progtuning", "embeddings": "first_stage", "method": "full", "width": 18, "micro": 2}
# In the last block of a Longformer only the first token is read, whose attention is the global one: these get zero gradients,
# and without weight decay they stay where they are.
ZERO_GRADIENTS = {"longformer": r"layer\.3\.attention\.self\.(query|key|value)\.(bias|lora_B)"}
# Adam divides by the root of a tiny second moment, so a last-bit difference in a gradient near zero grows to some 1e-5
# of a step of 1e-3; a wrong or lost state shows as 1e-3 and more.
PARAMETER_TOLERANCE = 5e-5
LOSS_TOLERANCE = 2e-6


def identify(case: Mapping[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


@cache
def reference(**case: Any) -> Outcome:
    """The same run in one process with plain torch."""
    return train(None, engine="plain", **case)


def train(two_ranks: TwoRanks | None, engine: str, **case: Any) -> Outcome:
    # A rank has one micro-batch in a step, one process has two; several on a rank are those of ODD and of odd numbers of rows.
    case = {"stages": STAGES, "steps": STEPS, "blocks": BLOCKS, "micro": 4, "options": OPTIONS.get(case["schedule"], {})} | case
    if engine == "plain" or two_ranks is None:
        return run(engine=engine, **case)
    outcomes = two_ranks.run("tests.harness.cases:run", engine=engine, **case)
    assert outcomes[0].losses == outcomes[1].losses, "the ranks disagree about the loss"
    assert outcomes[0].stage_of_step == outcomes[1].stage_of_step
    return outcomes[0]


@pytest.mark.parametrize("engine", list(VARIANTS))
def test_options_of_deepspeed(two_ranks: TwoRanks, engine: str) -> None:
    check(two_ranks, {"engine": engine, **ODD})


def test_aligned_parameters(two_ranks: TwoRanks) -> None:
    """What DeepSpeed pads between parameters belongs to none of them."""
    aligned, dense = (train(two_ranks, engine, **ODD) for engine in ("zero1+aligned", "zero1"))
    assert aligned.padding > dense.padding
    assert aligned.updated == dense.updated


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "plain"])
def test_batches_that_do_not_divide(two_ranks: TwoRanks, engine: str, rows: int) -> None:
    """A rank with fewer rows than the other, or with none, takes part with fillers of weight 0."""
    case = {"family": "bert", "schedule": "progtuning", "embeddings": "always", "method": "full", "rows": rows, "micro": 2}
    one_and_two_processes_agree(train(two_ranks, engine, **case), train(None, "plain", **case))


@pytest.mark.parametrize("case", PAIRS, ids=identify)
def test_contracts(two_ranks: TwoRanks, case: dict[str, Any]) -> None:
    check(two_ranks, case)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_sparse_attention(two_ranks: TwoRanks, engine: str) -> None:
    """Batches of 12 tokens, of which each of the middle ones sees seven: the random blocks are the same on every rank."""
    sparse = {"attention_type": "block_sparse", "block_size": 1, "num_random_blocks": 1}
    case = {"family": "big_bird", "schedule": "progtuning", "embeddings": "first_stage", "method": "full"}
    outcome, expected = train(two_ranks, engine, **case, config=sparse), train(None, "plain", **case, config=sparse)
    one_and_two_processes_agree(outcome, expected)
    frozen_means_frozen(outcome)
    assert expected.losses != reference(**case).losses, "attention was full"


@pytest.mark.product
@pytest.mark.parametrize("case", PRODUCT, ids=identify)
def test_contracts_product(two_ranks: TwoRanks, case: dict[str, Any]) -> None:
    check(two_ranks, case)


def test_parts_make_up_the_product() -> None:
    cases = full_product(FACTORS, is_allowed)
    parts = [part_of(cases, f"{number}/5", together="engine") for number in range(1, 6)]
    assert sorted(identify(case) for part in parts for case in part) == sorted(map(identify, cases))
    assert all({case["engine"] for case in part} == set(ENGINES) for part in parts)


def check(two_ranks: TwoRanks, case: dict[str, Any]) -> None:
    expected = reference(**{key: value for key, value in case.items() if key != "engine"})
    outcome = expected if case["engine"] == "plain" else train(two_ranks, **case)
    frozen_means_frozen(outcome, ZERO_GRADIENTS.get(case["family"]))
    one_and_two_processes_agree(outcome, expected)
    assert outcome.updated == outcome.planned, "measured updated parameters are not the planned ones"
    learning_rate_is_its_closed_form(outcome)


def frozen_means_frozen(outcome: Outcome, zero_gradients: str | None = None, stages: int = STAGES) -> None:
    for stage in range(stages):
        assert outcome.frozen_changed[stage] == [], f"stage {stage + 1}: frozen tensors changed"
        assert outcome.frozen_with_gradient[stage] == [], f"stage {stage + 1}: frozen tensors have a gradient"
        assert outcome.state_names[stage] == outcome.live_names[stage], f"stage {stage + 1}: optimizer state of other tensors"
        unmoved = [name for name in outcome.live_unmoved[stage] if not (zero_gradients and re.search(zero_gradients, name))]
        assert unmoved == [], f"stage {stage + 1}: live tensors did not move"


def one_and_two_processes_agree(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.stage_of_step == expected.stage_of_step
    assert outcome.losses == pytest.approx(expected.losses, abs=LOSS_TOLERANCE)
    assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    for name, value in expected.parameters.items():
        gap = (outcome.parameters[name] - value).abs().max().item()
        assert gap < PARAMETER_TOLERANCE, f"{name} is off by {gap:.1e}"


def learning_rate_is_its_closed_form(outcome: Outcome) -> None:
    """Warm-up over one step, then linear to a tenth; written down once more, independently."""
    for step, rate in enumerate(outcome.learning_rates):
        after = (step - 1) / (STEPS - 1)
        wanted = 0.0 if step == 0 else 1e-3 * (0.1 + 0.9 * (1 - after))
        assert math.isclose(rate, wanted, rel_tol=1e-9, abs_tol=1e-15), f"step {step}"


def by_hand(first_blocks: list[int], skipped_step: int | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the run as one writes it without progscale: one torch AdamW, frozen tensors left without gradient."""
    module = tiny_model("bert", blocks=BLOCKS)
    config: PreTrainedConfig = module.config
    module.train()
    named = dict(module.named_parameters())
    plain = [value for name, value in named.items() if name.endswith("bias") or "LayerNorm" in name]
    decayed = [value for value in named.values() if not any(value is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, foreach=False, fused=False)
    losses = []
    for step in range(STEPS):
        first = first_blocks[step * len(first_blocks) // STEPS]
        tokens, labels = global_batch(step, 8, config.vocab_size)
        logits = module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        for name, value in named.items():
            block = re.search(r"encoder\.layer\.(\d+)\.", name)
            if block and int(block[1]) < first:
                value.grad = None
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step == 0 else 1e-3 * (0.1 + 0.9 * (1 - (step - 1) / (STEPS - 1)))
        if step != skipped_step:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize(("schedule", "first_blocks"), [("none", [0]), ("progtuning", [0, 1, 2])])
def test_the_reference_is_what_one_writes_by_hand(schedule: str, first_blocks: list[int]) -> None:
    outcome = reference(family="bert", schedule=schedule, embeddings="always", method="full")
    losses, parameters = by_hand(first_blocks)
    assert outcome.losses == pytest.approx(losses, abs=LOSS_TOLERANCE)
    for name, value in parameters.items():
        assert (outcome.parameters[name] - value).abs().max().item() < PARAMETER_TOLERANCE, name


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_forced_switch_changes_nothing(two_ranks: TwoRanks, engine: str) -> None:
    """All blocks in every stage: with the engine rebuilt at each boundary the run is bit for bit the one without."""
    case = {"family": "bert", "schedule": "none", "embeddings": "always", "method": "full"}
    plain = train(two_ranks, engine, **case)
    forced = train(two_ranks, engine, force=True, **case)
    assert plain.carried == ["none", "none", "none"]
    assert forced.carried == ["none", "shards", "shards"]
    assert forced.losses == plain.losses
    for name, value in plain.parameters.items():
        assert torch.equal(forced.parameters[name], value), name


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_requires_grad_alone_freezes_nothing(two_ranks: TwoRanks, engine: str) -> None:
    """The audit catches a switch that only sets requires_grad, which is what ZeRO makes of it everywhere else."""
    outcome = two_ranks.run("tests.harness.cases:run", engine=engine, stages=STAGES, steps=STEPS, blocks=BLOCKS, toggle=True)[0]
    assert outcome.frozen_changed[0] == []
    assert outcome.frozen_changed[1], "frozen tensors moved unseen"


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["poison", "poison_gradient"])
def test_a_step_that_is_not_finite_never_was(two_ranks: TwoRanks, engine: str, rank: int, what: str) -> None:
    """An infinite loss or gradient on one rank leaves no trace: the run ends as if the step's update had been left out."""
    if engine == "plain" and rank == 1:
        pytest.skip("one process has no rank 1")
    case = {"family": "bert", "schedule": "progtuning", "embeddings": "always", "method": "full"}
    poisoned = train(two_ranks, engine, **{what: [(3, rank)]}, **case)
    losses, parameters = by_hand([0, 1, 2], skipped_step=3)
    fault = "loss" if what == "poison" else "gradient"
    assert [found for found, _ in poisoned.faults] == [None, None, None, fault, None, None]
    # A gradient has been summed over the ranks before anybody can look at it.
    assert poisoned.faults[3][1] == ((rank,) if fault == "loss" or engine == "plain" else (0, 1))
    assert math.isfinite(poisoned.losses[3]) == (fault == "gradient")
    assert poisoned.losses[4:] == pytest.approx(losses[4:], abs=LOSS_TOLERANCE)
    for name, value in parameters.items():
        assert (poisoned.parameters[name] - value).abs().max().item() < PARAMETER_TOLERANCE, name


@pytest.mark.parametrize(
    ("engine", "family"),
    [*((name, "bert") for name in ENGINES if name != "plain"), ("ddp", "llama"), ("zero2", "gpt2"), ("zero3", "t5")],
)
def test_gradient_checkpointing_with_frozen_blocks(two_ranks: TwoRanks, engine: str, family: str) -> None:
    case = {"family": family, "schedule": "progtuning", "embeddings": "first_stage", "method": "full"}
    one_and_two_processes_agree(train(two_ranks, engine, checkpointing=True, **case), reference(**case))
