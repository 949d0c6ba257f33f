"""NaN and infinity on one rank stop all ranks within the step: no weight has moved, and no checkpoint ever holds one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.evidence import all_finite, checkpoints, step_of
from tests.harness.forks import Ended
from tests.harness.interrupted import STEPS, Runs, twelve
from tests.harness.launches import Launch
from tests.harness.programs import records, summary_of

# In the third stage of four, in the second epoch: there are checkpoints, and an exported model.
STEP = 8
KINDS = {"loss": "nan", "gradient": "inf", "weight": "nan", "input": "inf"}
ENGINES = ("ddp", "zero2", "zero3")


@dataclass(frozen=True)
class Case:
    """What becomes not finite, and where; `last` is the last step in which it does."""

    kind: str
    value: str
    engine: str
    precision: str = "fp32"
    rank: int = 0
    last: int = STEP

    def __str__(self) -> str:
        return f"{self.kind}-{self.value}-{self.engine}-{self.precision}-rank_{self.rank}"

    def run(self, runs: Runs, folder: Path, policy: str = "stop") -> list[Ended]:
        """Trains, poisoned, and saves after every step."""
        (folder / "seen").mkdir()
        poison = f"{self.kind}:{self.value}@{STEP}-{self.last},rank={self.rank}"
        return runs.train(
            folder,
            self.engine,
            plugins=["tests.harness.poison"],
            environment={"PROGSCALE_POISON": poison, "PROGSCALE_POISON_OUT": str(folder / "seen")},
            train__nonfinite=policy,
            **self.settings,
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {"train__precision": self.precision, "checkpoint__every_steps": 1}

    @property
    def fault(self) -> str:
        """What the product calls it: whatever it comes from, it is first seen in the loss, or else in the gradient."""
        return "gradient" if self.kind == "gradient" else "loss"


def seen(folder: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """What each rank saw of the poisoned steps."""
    return [[json.loads(line) for line in (folder / "seen" / str(rank)).read_text().splitlines()] for rank in range(ranks)]


def everything_is_finite(folder: Path) -> None:
    """Whatever lies in the run folder."""
    for checkpoint in checkpoints(folder):
        assert all_finite(checkpoint), checkpoint
    if (folder / "model").exists():
        assert all_finite(folder / "model")


def stops(runs: Runs, folder: Path, case: Case) -> None:
    ended = case.run(runs, folder)
    assert [rank.code for rank in ended] == [3, 3], ended[0].err
    assert f"step {STEP}: the {case.fault} is not finite on rank" in ended[0].err
    for answers in seen(folder, 2):
        (answer,) = answers
        assert (answer["step"], answer["fault"], answer["changed"]) == (STEP, case.fault, False)
        assert case.rank in answer["ranks"] or case.kind == "gradient", "an engine sees it where the sum of the gradients lies"
    (record,) = records(folder / "a", "nonfinite")
    assert (record["step"], record["fault"], len(record["rows"])) == (STEP, case.fault, 32)
    # Steps are counted from 0, and records say how many are done.
    assert records(folder / "a", "step")[-1]["step"] == STEP
    assert step_of(checkpoints(folder / "a")[-1]) == STEP
    assert not (folder / "a" / "summary.json").exists()
    everything_is_finite(folder / "a")


@pytest.mark.parametrize(
    "case",
    [
        Case("gradient", "inf", "ddp", rank=1),
        pytest.param(Case("weight", "nan", "zero2", rank=1), marks=pytest.mark.slow),
        pytest.param(Case("input", "inf", "zero3", "bf16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_ranks_stop_within_the_step(runs: Runs, tmp_path: Path, case: Case) -> None:
    """And what is saved is good to go on from, once the cause is gone."""
    stops(runs, tmp_path, case)
    runs.finish(tmp_path, case.engine, **case.settings)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_anything_not_finite_stops_all_ranks(runs: Runs, tmp_path: Path, kind: str, precision: str, rank: int) -> None:
    """Four cases of a kind: NaN and infinity, and over all kinds every engine in every precision."""
    number = 4 * list(KINDS).index(kind) + 2 * (precision == "bf16") + rank
    value = ("nan", "inf")[(rank + (precision == "bf16") + list(KINDS).index(kind)) % 2]
    stops(runs, tmp_path, Case(kind, value, ENGINES[number % 3], precision, rank))


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))])
def test_steps_that_are_skipped(runs: Runs, tmp_path: Path, engine: str) -> None:
    """Two in a row are allowed; the run goes on from the weights before, and counts them."""
    case = Case("gradient", "nan", engine, rank=1, last=STEP + 1)
    ended = case.run(runs, tmp_path, policy="skip:2")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    for answers in seen(tmp_path, 2):
        assert [(answer["step"], answer["changed"]) for answer in answers] == [(STEP, False), (STEP + 1, False)]
    summary = summary_of(tmp_path / "a")
    # The ninth step ends the third stage, the tenth begins the fourth.
    assert [stage["skipped_steps"] for stage in summary["stages"]] == [0, 0, 1, 1]
    assert summary["steps"] == STEPS
    assert [record["step"] for record in records(tmp_path / "a", "nonfinite")] == [STEP, STEP + 1]
    everything_is_finite(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_more_steps_than_may_be_skipped(runs: Runs, tmp_path: Path, engine: str) -> None:
    case = Case("loss", "inf", engine, last=STEP + 2)
    ended = case.run(runs, tmp_path, policy="skip:2")
    assert [rank.code for rank in ended] == [3, 3], ended[0].err
    assert f"step {STEP + 2}: the loss is not finite on rank 0 (3 steps in a row)" in ended[0].err
    assert not any(answer["changed"] for answers in seen(tmp_path, 2) for answer in answers)
    everything_is_finite(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_weight_that_stays_bad_is_not_skipped_for_ever(runs: Runs, tmp_path: Path, engine: str) -> None:
    """Nor is it skipped once, and saved in between."""
    case = Case("weight", "nan", engine, last=STEP + 2)
    ended = case.run(runs, tmp_path, policy="skip:2")
    assert [rank.code for rank in ended] == [3, 3], ended[0].err
    assert f"step {STEP}: the loss is not finite on rank" in ended[0].err
    assert "and neither are weights or the optimizer's state" in ended[0].err
    everything_is_finite(tmp_path / "a")


@pytest.mark.slow
def test_a_launch_that_stops(runs: Runs, tmp_path: Path, cache: Path) -> None:
    """Both workers leave with 3."""
    arguments = twelve(tmp_path, "zero2", checkpoint__every_steps=1)
    with Launch(tmp_path, arguments, ranks=2, cache=cache, fault=f"nan@step={STEP},rank=1") as launch:
        finished = launch.finish()
    assert finished.left == ()
    assert finished.exits == {0: 3, 1: 3}, finished.err
    assert f"step {STEP}: the loss is not finite on rank 1" in finished.err
    assert step_of(checkpoints(tmp_path / "a")[-1]) == STEP
    everything_is_finite(tmp_path / "a")
    runs.finish(tmp_path, "zero2", checkpoint__every_steps=1)
