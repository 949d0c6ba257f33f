"""bf16 in its two regimes (autocast over fp32 weights; bf16 weights with fp32 masters) and fp16: the contracts hold in all."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.harness.cases import Outcome, loss_scales, overflow_at_the_lowest_scale, run
from tests.harness.moves import Regime, regime
from tests.harness.worker import TwoRanks

DEEPSPEED = ["zero1", "zero2", "zero3"]
FP16 = ["plain", "ddp", *DEEPSPEED, "zero2-offload", "zero3-offload"]
CASES = [(engine, "fp16") for engine in FP16]
CASES += [(engine, "bf16") for engine in ("plain", "ddp", *DEEPSPEED)] + [(engine, "bf16_params") for engine in DEEPSPEED]
CASES += [(f"{engine}+fp32_gradients", "bf16_params") for engine in ("zero2", "zero3")]
RUN = {"schedule": "progtuning", "embeddings": "first_stage", "stages": 3, "steps": 6, "blocks": 4}


@cache
def in_fp32() -> Outcome:
    return run(engine="plain", **RUN)  # type: ignore[arg-type]


@pytest.mark.parametrize(("engine", "precision"), CASES)
def test_contracts_in_16_bits(two_ranks: TwoRanks, engine: str, precision: str) -> None:
    case = {"engine": engine, "precision": precision, **RUN}
    outcome: Outcome = run(**case) if engine == "plain" else two_ranks.run("tests.harness.cases:run", **case)[0]  # type: ignore[arg-type]
    assert outcome.frozen_changed == [[], [], []]
    assert outcome.frozen_with_gradient == [[], [], []]
    assert outcome.live_unmoved == [[], [], []], "judged on the fp32 masters"
    assert outcome.state_names == outcome.live_names
    assert outcome.updated == outcome.planned
    # bf16 keeps 8 bits, fp16 11: near the fp32 run, and not it.
    assert outcome.losses == pytest.approx(in_fp32().losses, abs=2e-2)
    assert outcome.losses != pytest.approx(in_fp32().losses, abs=1e-6)
    halves = {"bf16_params": torch.bfloat16, "fp16": torch.float32 if engine in ("plain", "ddp") else torch.float16}
    assert {value.dtype for value in outcome.parameters.values()} == {halves.get(precision, torch.float32)}


@pytest.mark.parametrize("engine", [*FP16, "zero2-offload+fp32_gradients"])
def test_the_loss_scale_falls_at_an_overflow_and_goes_on_over_a_switch(two_ranks: TwoRanks, engine: str) -> None:
    found = loss_scales(engine) if engine == "plain" else two_ranks.run("tests.harness.cases:loss_scales", engine=engine)[0]
    assert [applied for applied, _ in found] == [True, False, False, True, True]
    # DeepSpeed forgives the first overflow (its hysteresis is 2), torch's scaler none.
    lowered = [2**16, 2**15, 2**14, 2**14, 2**14] if engine in ("plain", "ddp") else [2**16, 2**16, 2**15, 2**15, 2**15]
    assert [scale for _, scale in found] == lowered


@pytest.mark.parametrize("engine", FP16)
def test_an_overflow_at_the_lowest_loss_scale_is_a_fault(two_ranks: TwoRanks, engine: str) -> None:
    if engine == "plain":
        found = overflow_at_the_lowest_scale(engine)
    else:
        found = two_ranks.run("tests.harness.cases:overflow_at_the_lowest_scale", engine=engine)[0]
    assert found == ("gradient", False, True)


def of(two_ranks: TwoRanks, engine: str, precision: str, schedule: str, force: bool = False) -> Regime:
    case = {"engine": engine, "precision": precision, "schedule": schedule, "force": force}
    return regime(**case) if engine == "plain" else two_ranks.run("tests.harness.moves:regime", **case)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", DEEPSPEED)
def test_a_forced_switch_carries_the_masters(two_ranks: TwoRanks, engine: str) -> None:
    """Masters remade from bf16 weights would lose what no bf16 holds."""
    plain = of(two_ranks, engine, "bf16_params", "none")
    forced = of(two_ranks, engine, "bf16_params", "none", force=True)
    assert forced.losses == plain.losses
    assert (plain.carried, forced.carried) == (["none", "none", "none"], ["none", "shards", "shards"])
    for name, value in plain.masters.items():
        assert torch.equal(forced.masters[name], value), name
    for name, value in plain.parameters.items():
        assert torch.equal(forced.parameters[name], value), name
    remade = [name for name, value in plain.masters.items() if torch.equal(value, value.bfloat16().float())]
    assert len(remade) < len(plain.masters) / 10, "the test could not see a difference"


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("plain", "fp32"), ("ddp", "fp32"), *((e, p) for p in ("fp32", "bf16_params") for e in DEEPSPEED)],
)
def test_freezing_frees_optimizer_state(two_ranks: TwoRanks, engine: str, precision: str) -> None:
    found = of(two_ranks, engine, precision, "progtuning")
    assert found.live_elements[0] > found.live_elements[1] > found.live_elements[2]
    for size, elements, tensors in zip(found.state_bytes, found.live_elements, found.live_tensors, strict=True):
        if engine in ("plain", "ddp"):
            assert size == 8 * elements + 4 * tensors, "two moments, and a step for each tensor"
        else:
            # Master and moments of half the elements, padding and the steps apart.
            assert size == pytest.approx(12 * elements / 2, rel=0.05)
