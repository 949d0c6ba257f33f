"""Plans: golden numbers, the counting rule, compute shares and state bytes."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from progscale.blocks import partition
from progscale.cost import state_bytes
from progscale.errors import ModelError, ScheduleError
from progscale.models.family import FAMILIES
from progscale.paper import ROWS
from progscale.plan import compute_share, make_plan, nominal_steps_per_epoch, plan_for, render_plan
from progscale.schedule import build_stages
from tests.tiny import method_for, tiny_model

PARTS = partition(tiny_model("bert"), FAMILIES.get("bert"))
FULL = method_for("bert")


def millions(value: Fraction) -> float:
    return round(float(value) / 1e6, 2)


@pytest.mark.parametrize(
    ("model", "epochs", "baseline", "updated"),
    [("bert-large-uncased", 3, 1005.43, 703.12), ("bert-base-uncased", 3, 328.45, 243.40)],
)
def test_golden_numbers(model: str, epochs: int, baseline: float, updated: float) -> None:
    content = plan_for(model, epochs=epochs).to_json()
    assert round(content["baseline_updated_parameters"] / 1e6, 2) == baseline
    assert round(content["updated_parameters"] / 1e6, 2) == updated
    assert content == json.loads(json.dumps(content))
    assert [stage["stage"] for stage in content["stages"]] == [1, 2, 3]
    assert [stage["first_block"] for stage in content["stages"]] == ([0, 8, 16] if "large" in model else [0, 4, 8])
    assert sum(stage["updated_parameters"] for stage in content["stages"]) == content["updated_parameters"]
    assert isinstance(content["updated_parameters"], int)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.sampled_from(["progtuning", "growing", "none"]))
def test_updated_parameters_are_the_sum_over_steps(stages: int, epochs: int, steps_per_epoch: int, name: str) -> None:
    total = epochs * steps_per_epoch
    if stages > total:
        return
    built = build_stages(name, num_blocks={"blocks": 4}, stages=stages, total_steps=total, embeddings="first_stage")
    plan = make_plan(PARTS, built, FULL, steps_per_epoch)
    elements = 0
    for step in range(total):
        stage = next(stage for stage in built if stage.start_step <= step < stage.end_step)
        elements += PARTS.numel("head") + (PARTS.numel("embeddings") if stage.embeddings else 0)
        elements += sum(PARTS.count(PARTS.block_names("blocks", block)) for block in stage.live_blocks["blocks"])
    assert plan.updated_parameters == Fraction(elements, steps_per_epoch)
    assert plan.baseline_updated_parameters == PARTS.numel() * epochs
    assert plan.epochs == epochs
    if name == "none" and stages == 1:
        assert plan.share == 1


def test_the_baseline_trains_the_embeddings_whatever_the_policy() -> None:
    always, never = (plan_for("distilbert-base-uncased", embeddings=policy) for policy in ("always", "never"))
    assert never.baseline_updated_parameters == always.baseline_updated_parameters
    assert never.updated_parameters == always.updated_parameters - 3 * 23_835_648
    assert not any(stage.embeddings for stage in never.stages)


def test_fractional_epochs_and_stages_within_an_epoch() -> None:
    plan = plan_for("distilbert-base-uncased", epochs=2.5, stages=3)
    assert plan.epochs == Fraction(5, 2)
    assert [stage.epochs for stage in plan.stages] == [Fraction(5, 6)] * 3
    assert len(plan_for("distilbert-base-uncased", epochs=2.5).stages) == 3
    assert len(plan_for("distilbert-base-uncased", epochs=0.5, stages=6).stages) == 6


@given(st.fractions(Fraction(1, 100), 100, max_denominator=100), st.integers(1, 64))
def test_nominal_steps_divide_evenly(epochs: Fraction, stages: int) -> None:
    steps = nominal_steps_per_epoch(epochs, stages)
    assert steps >= 1000
    assert (epochs * steps / stages).denominator == 1


def test_options_count_in_real_steps_when_these_are_known() -> None:
    plan = plan_for(
        "distilbert-base-uncased",
        schedule="custom",
        epochs=1,
        stages=2,
        options={"first_blocks": [0, 6], "starts": [0, 7]},
        steps_per_epoch=10,
    )
    assert [(stage.start_step, stage.end_step) for stage in plan.stages] == [(0, 7), (7, 10)]
    assert plan.to_json()["stages"][1]["live_blocks"] == {"blocks": []}
    assert plan.to_json()["stages"][1]["first_block"] == 6


def test_mistakes_are_named() -> None:
    with pytest.raises(ScheduleError, match=r"train.epochs: 0; more than 0"):
        plan_for("bert-base-uncased", epochs=0)
    with pytest.raises(ScheduleError, match=r"schedule.stages: 0"):
        plan_for("bert-base-uncased", stages=0)
    with pytest.raises(ModelError, match=r"no such folder"):
        plan_for("./no-such-folder")
    with pytest.raises(ScheduleError, match=r"steps_per_epoch: 0"):
        make_plan(PARTS, (), FULL, 0)


@pytest.mark.parametrize("schedule", ["progtuning", "growing", "without_low_blocks"])
def test_one_shared_block_takes_no_stages(schedule: str) -> None:
    with pytest.raises(ScheduleError, match=rf"schedule.name: '{schedule}' with 3 stages; all layers .* share one block.*'none'"):
        plan_for("albert-base-v2", schedule=schedule)
    plain, one = plan_for("albert-base-v2", schedule="none"), plan_for("albert-base-v2", schedule="progtuning", stages=1)
    assert plain.share == one.share == 1
    assert plan_for("albert-base-v2", schedule="none", embeddings="first_stage").share < 1


def test_groups_of_layers_that_share_a_block_take_stages() -> None:
    plan = plan_for("albert-base-v2", overrides={"num_hidden_groups": 3})
    assert [stage.first_block for stage in plan.stages] == [{"blocks": 0}, {"blocks": 1}, {"blocks": 2}]


@pytest.mark.parametrize(
    ("epochs", "stages", "always", "first_stage", "cached"),
    [
        (3, 3, 0.889, 0.778, 0.741),
        (6, 3, 0.889, 0.778, 0.704),
        (3, 12, 0.847, 0.694, 0.630),
        (10, 10, 0.861, 0.722, 0.611),
        (12, 12, 0.847, 0.694, 0.567),
    ],
)
def test_ideal_compute_of_full_fine_tuning(epochs: int, stages: int, always: float, first_stage: float, cached: float) -> None:
    plan = plan_for("bert-base-uncased", epochs=epochs, stages=stages)
    assert compute_share(plan) == pytest.approx(always, abs=5e-4)
    assert compute_share(plan, cache=True) == pytest.approx(always, abs=5e-4)
    plan = plan_for("bert-base-uncased", epochs=epochs, stages=stages, embeddings="first_stage")
    assert compute_share(plan) == pytest.approx(first_stage, abs=5e-4)
    assert compute_share(plan, cache=True) == pytest.approx(cached, abs=5e-4)


@pytest.mark.parametrize(("task_epochs", "plain", "cached"), [(8, 0.79, 0.635), (10, 0.79, 0.625), (30, 0.775, 0.565)])
def test_ideal_compute_of_peft(task_epochs: int, plain: float, cached: float) -> None:
    row = next(row for row in ROWS if row.epochs == task_epochs and row.method in ("bitfit", "lora"))
    assert compute_share(row.plan()) == pytest.approx(plain, abs=5e-3)
    assert compute_share(row.plan(), cache=True) == pytest.approx(cached, abs=5e-3)


def test_a_growing_prefix_is_never_cached() -> None:
    plan = plan_for("bert-base-uncased", schedule="growing", embeddings="never")
    assert compute_share(plan, cache=True) == compute_share(plan)


@pytest.mark.parametrize(
    ("schedule", "options", "stage"),
    [("without_low_blocks", {}, 3), ("custom", {"first_blocks": [0, 12, 6]}, 2)],
)
def test_a_stage_in_which_the_method_trains_nothing(schedule: str, options: dict[str, Any], stage: int) -> None:
    """The head of a language model is part of what was pretrained: with LoRA it is frozen."""
    says = rf"stage {stage} of '{schedule}' has nothing to train: method 'lora' .* \(0 blocks.*keep a block"
    with pytest.raises(ScheduleError, match=says):
        plan_for("gpt2", schedule=schedule, options=options, stages=3, head="causal_lm", method="lora", embeddings="never")
    plan_for("gpt2", schedule=schedule, options=options, stages=3, head="causal_lm", embeddings="never")


def test_the_table_shows_stages_blocks_and_saving() -> None:
    plan = plan_for("bert-large-uncased", epochs=3)
    console = Console(width=130, record=True, file=io.StringIO())
    state = [state_bytes(plan.total_parameters, stage.trainable_parameters) for stage in plan.stages]
    console.print(render_plan(plan, state))
    text = console.export_text()
    assert "········████████████████" in text
    assert "703.12 M updated; without stages 1005.43 M (30.1 % less)" in text
    assert "4.99" in text


def test_two_stacks() -> None:
    """Both stacks shrink; the norm that closes the encoder keeps the gradient running through all of the decoder."""
    plan = plan_for("t5-small", head="seq2seq_lm", embeddings="first_stage")
    assert plan.num_blocks == {"encoder": 6, "decoder": 6}
    assert plan.to_json()["stages"][1]["first_block"] == {"encoder": 2, "decoder": 2}
    assert [stage.lowest_trained for stage in plan.stages] == [0, 2, 4]
    encoder, decoder = (plan.block_parameters[stack] for stack in ("encoder", "decoder"))
    assert (encoder, decoder) == (3_146_752, 4_195_840)
    # A third of the steps each: 6 + 6 blocks live, then 4 + 4, then 2 + 2; the gradient runs down to the lowest of the encoder.
    weights = Fraction(6 + 4 + 2, 3) * (encoder + decoder)
    gradients = Fraction(6 + 4 + 2, 3) * encoder + 6 * decoder
    whole = 6 * (encoder + decoder)
    assert compute_share(plan) == pytest.approx(float((whole + gradients + weights) / (3 * whole)))


def test_a_frozen_encoder_below_a_live_decoder() -> None:
    firsts = {"encoder": [0, 6], "decoder": [6, 0]}
    plan = plan_for(
        "t5-small", head="seq2seq_lm", schedule="custom", stages=2, embeddings="never", options={"first_blocks": firsts}
    )
    # With no block of the encoder left, its last norm is what the gradient still has to reach.
    assert [stage.lowest_trained for stage in plan.stages] == [0, 6]


@pytest.mark.parametrize(("model", "head"), [("gpt2", "causal_lm"), ("Qwen2.5-0.5B", "causal_lm"), ("t5-small", "seq2seq_lm")])
def test_tied_outputs_go_with_the_embeddings(model: str, head: Any) -> None:
    always, never = (plan_for(model, head=head, embeddings=policy) for policy in ("always", "never"))
    assert never.stages[0].lowest_trained == 0
    assert always.stages[0].trainable_parameters == always.total_parameters
    vocabulary = {"gpt2": 50257 * 768, "Qwen2.5-0.5B": 151936 * 896, "t5-small": 32128 * 512}[model]
    assert always.total_parameters - never.stages[0].trainable_parameters >= vocabulary
