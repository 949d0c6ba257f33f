"""ZeRO++'s second copies of the parameters, in a hierarchy: four ranks in groups of two. (VARIANTS have them with two ranks.)"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.test_contracts import frozen_means_frozen, one_and_two_processes_agree
from tests.contract.test_resume import same_bits
from tests.harness.cases import Outcome, run
from tests.harness.second_copies import ENGINE, Copies, Counted
from tests.harness.worker import TwoRanks
from tests.tiny import tiny_model

# A width that no number of ranks divides; two micro-batches of a rank in a step.
CASE: dict[str, Any] = {"stages": 3, "steps": 6, "blocks": 3, "width": 18, "rows": 8, "micro": 1, "embeddings": "first_stage"}


@cache
def reference() -> Outcome:
    return run(engine="plain", **CASE)


@pytest.mark.parametrize("engine", [ENGINE, pytest.param("zero3-offload+second_copies", marks=pytest.mark.product)])
def test_the_same_run(four_ranks: TwoRanks, engine: str) -> None:
    """And after it the same bits under plain ZeRO-3, to which DeepSpeed would give the groups of the run before."""
    counted: Counted = four_ranks.run("tests.harness.second_copies:run", engine=engine, **CASE)[0]
    found = counted.outcome
    one_and_two_processes_agree(found, reference())
    frozen_means_frozen(found)
    assert found.losses == pytest.approx(reference().losses, rel=1e-6)
    assert found.updated == found.planned == reference().planned
    assert found.carried[1:] == ["shards", "shards"]
    assert set(counted.gathered) == {2, 4}
    assert counted.gathered[2] > 3 * counted.gathered[4], "what can be gathered in the group is gathered there"
    if engine == ENGINE:
        bare: Counted = four_ranks.run("tests.harness.second_copies:run", engine="zero3+bare", **CASE)[0]
        assert set(bare.gathered) == {4}
        assert bare.outcome.losses == found.losses
        for name, value in found.parameters.items():
            assert torch.equal(bare.outcome.parameters[name], value), name


@pytest.mark.product
def test_a_forced_switch_changes_nothing(four_ranks: TwoRanks) -> None:
    case = {**CASE, "schedule": "none", "embeddings": "always", "engine": ENGINE}
    plain, forced = (four_ranks.run("tests.harness.second_copies:run", force=force, **case)[0].outcome for force in (False, True))
    assert (plain.carried, forced.carried) == (["none", "none", "none"], ["none", "shards", "shards"])
    assert forced.losses == plain.losses
    for name, value in plain.parameters.items():
        assert torch.equal(forced.parameters[name], value), name


def test_what_is_there_when(four_ranks: TwoRanks) -> None:
    for found in four_ranks.run("tests.harness.second_copies:look"):
        check(found)


def test_what_comes_from_whom_is_planned(four_ranks: TwoRanks) -> None:
    for rank in four_ranks.run("tests.harness.second_copies:counted_and_planned"):
        for counted, planned in rank:
            # What a hundred tensors are padded with, each time they are gathered.
            far, near = (4 * counted[ranks] for ranks in (4, 2))
            assert 0 <= far - planned.all_gather <= 100 * 3 * 4
            assert 0 <= near - planned.gather_in_group <= 4 * 100 * 3 * 4
            assert planned.group == 2
        shares = [planned.all_gather / planned.total for _, planned in rank]
        assert shares == sorted(shares, reverse=True), "the more is frozen the less comes from afar"


def check(found: Copies) -> None:
    held, planned = found.bytes
    # What the partitions of a hundred tensors are padded with.
    assert 0 <= held - planned <= 100 * 2 * 4
    assert len(found.before_step) > 50
    assert found.after_step == set(), "a copy of weights that were stepped"
    assert found.differ == set()
    assert found.frozen and found.frozen_copies == found.frozen
    assert found.digest == (False, True)


def test_given_weights_are_the_ones_computed_with(four_ranks: TwoRanks) -> None:
    for old, given, other in four_ranks.run("tests.harness.second_copies:evaluated_then_loaded"):
        assert old != other
        assert given == other


def test_loaded_in_partitions(four_ranks: TwoRanks, tmp_path: Path) -> None:
    """A second model in the same processes, and one without copies after it."""
    tiny_model("bert", blocks=2).save_pretrained(tmp_path)
    for first, second, bare in four_ranks.run("tests.harness.second_copies:loaded", folder=str(tmp_path)):
        assert first == second
        assert first[0] == bare[0]
        assert (first[1], bare[1]) == ({2, 4}, {4})


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.product)])
def test_stopped(four_ranks: TwoRanks, tmp_path: Path, step: int) -> None:
    """In the first stage, and on its end; by plain ZeRO-3 too."""
    case: dict[str, Any] = {"folder": str(tmp_path), "schedule": "progtuning"}
    whole = four_ranks.run("tests.harness.checkpoints:run_and_save", engine=ENGINE, steps=[step], **case)[0]
    for engine in (ENGINE, "zero3+bare"):
        rest = four_ranks.run("tests.harness.checkpoints:go_on", engine=engine, step=step, **case)[0]
        same_bits(rest, whole, step)
