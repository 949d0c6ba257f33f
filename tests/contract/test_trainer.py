"""transformers' Trainer made progressive: the same losses, norms and weights as progscale's own loop, on the same data order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.harness.cases import run
from tests.harness.trainers import Shown, run_trainer
from tests.harness.worker import TwoRanks

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
CASE: dict[str, Any] = {"stages": 3, "steps": 6, "rows": 8, "micro": 2, "blocks": 6}
# Of a progressive run: schedule, embeddings and method differ by engine, so that each comes.
SCHEDULES = {
    "plain": ("progtuning", "always"),
    "ddp": ("progtuning", "first_stage"),
    "zero1": ("progtuning", "never"),
    "zero2": ("progtuning", "always"),
    "zero3": ("progtuning", "first_stage"),
    "zero2-offload": ("growing", "always"),
    "zero3-offload": ("progtuning", "never"),
}


def engines(*ordinary: str, slow: tuple[str, ...]) -> list[Any]:
    """Engines of the ordinary tests, and those that the long list has besides."""
    return [*ordinary, *(pytest.param(engine, marks=pytest.mark.slow) for engine in slow)]


def trained(two_ranks: TwoRanks, engine: str, **options: Any) -> list[Shown]:
    case = {**CASE, **options}
    if engine == "plain":
        return [run_trainer("plain", **case)]
    return two_ranks.run("tests.harness.trainers:run_trainer", engine=engine, **case)


RUNS: dict[str, list[Shown]] = {}


def trained_once(two_ranks: TwoRanks, engine: str, **options: Any) -> list[Shown]:
    """A run that several tests look at."""
    key = f"{engine} {sorted(options.items())}"
    if key not in RUNS:
        RUNS[key] = trained(two_ranks, engine, **options)
    return RUNS[key]


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_progscales_own_loop(two_ranks: TwoRanks, engine: str) -> None:
    schedule, embeddings = SCHEDULES[engine]
    found = trained_once(two_ranks, engine, schedule=schedule, embeddings=embeddings)[0]
    # The Trainer's linear curve goes to 0, ours in the harness to a tenth: the engine is given the Trainer's rates.
    wanted = run("plain", schedule=schedule, embeddings=embeddings, rates=tuple(found.learning_rates), **CASE)
    assert found.losses == pytest.approx(wanted.losses, abs=2e-6)
    assert found.grad_norms == pytest.approx(wanted.grad_norms, abs=2e-5)
    for name, value in wanted.parameters.items():
        torch.testing.assert_close(
            found.parameters[name].view(value.shape), value, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_is_frozen_and_the_ledger_holds(two_ranks: TwoRanks, engine: str) -> None:
    """The audit inside would have raised; what it hashed is what lies there (a negative test is below)."""
    schedule, embeddings = SCHEDULES[engine]
    for shown in trained_once(two_ranks, engine, schedule=schedule, embeddings=embeddings):
        assert [outcome["stage"] for outcome in shown.outcomes] == [1, 2, 3]
        for outcome in shown.outcomes:
            assert outcome["frozen_changed"] == 0
            assert outcome["measured_updates"] == outcome["planned_updates"] > 0
        assert shown.engines == (0 if engine == "plain" else 1), "an old stage's engine is still there"


@pytest.mark.parametrize("engine", engines("plain", "zero3", slow=("ddp", "zero2")))
def test_without_stages_it_is_the_trainer_as_it_was(two_ranks: TwoRanks, engine: str) -> None:
    found = trained(two_ranks, engine, schedule="none", stages=1)[0]
    plain = trained(two_ranks, engine, progressive=False)[0]
    assert found.losses == pytest.approx(plain.losses, abs=1e-6)
    assert found.grad_norms == pytest.approx(plain.grad_norms, abs=1e-5)
    assert found.learning_rates == plain.learning_rates


@pytest.mark.parametrize("engine", engines("plain", "zero2", "zero3", slow=("ddp", "zero1")))
@pytest.mark.parametrize("step", [3, 4])
def test_stopped_and_resumed_it_is_the_run_that_never_stopped(
    two_ranks: TwoRanks, tmp_path: Path, engine: str, step: int
) -> None:
    """In the middle of a stage (3), and exactly on a boundary (4), through the Trainer's own checkpoints."""
    whole = trained_once(two_ranks, engine, schedule="progtuning", embeddings="always")[0]
    trained(two_ranks, engine, save_at=step, folder=str(tmp_path))
    rest = trained(two_ranks, engine, resume=str(tmp_path / f"checkpoint-{step}"), folder=str(tmp_path))[0]
    assert rest.losses == whole.losses[step:]
    assert rest.learning_rates == whole.learning_rates[step:]
    for name, value in whole.parameters.items():
        assert torch.equal(rest.parameters[name], value), name


def test_bf16_parameters_keep_their_masters(two_ranks: TwoRanks) -> None:
    found = trained(two_ranks, "zero2", precision="bf16")[0]
    wanted = trained(two_ranks, "zero3", precision="bf16")[0]
    assert found.losses == pytest.approx(wanted.losses, abs=2e-3)
    for outcome in found.outcomes:
        assert outcome["measured_updates"] == outcome["planned_updates"]


@pytest.mark.parametrize("engine", engines("plain", "zero3", slow=("zero2",)))
def test_an_adapter_is_whole_in_checkpoints_of_late_stages(two_ranks: TwoRanks, tmp_path: Path, engine: str) -> None:
    """transformers leaves what is frozen out of a PEFT model's checkpoint; in the last stage that is most of the adapter."""
    options = {"adapter": True, "gather": True}
    whole = trained(two_ranks, engine, folder=str(tmp_path / "whole"), save_at=6, **options)[0]
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "adapter_model.safetensors")
    assert {int(name.split("layer.")[1].split(".")[0]) for name in saved if "layer." in name} == set(range(6))
    trained(two_ranks, engine, save_at=5, folder=str(tmp_path / "cut"), **options)
    rest = trained(two_ranks, engine, resume=str(tmp_path / "cut" / "checkpoint-5"), folder=str(tmp_path / "cut"), **options)[0]
    assert rest.losses == whole.losses[5:]
    for name, value in whole.parameters.items():
        assert torch.equal(rest.parameters[name], value), name


def test_under_ddp_the_forward_keeps_what_decorates_it(two_ranks: TwoRanks) -> None:
    """Accelerate's way of taking its autocast off a model takes off the model's own decorators too."""
    for shown in two_ranks.run("tests.harness.trainers:tuples_by_stage", engine="ddp"):
        assert shown == [True, True, True]
