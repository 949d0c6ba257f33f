"""Stopped anywhere, a run goes on as if nothing had happened: same engine bit for bit, any other engine and world size too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.schedule import SCHEDULES
from tests.contract.test_contracts import OPTIONS
from tests.harness import checkpoints
from tests.harness.cases import ENGINES
from tests.harness.checkpoints import STEPS, Trained
from tests.harness.worker import TwoRanks

# Stages begin at 0, 2 and 4: in the middle of each, exactly on each boundary, and at the very end.
STOPS = [1, 2, 3, 4, 5, 6]
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 2e-6, 5e-5


class Runs:
    """Uninterrupted runs with their checkpoints, each made once."""

    def __init__(self, ranks: TwoRanks, root: Path) -> None:
        self.ranks = ranks
        self.root = root
        self._made: dict[str, Trained] = {}

    def folder(self, engine: str, schedule: str, **settings: Any) -> Path:
        return self.root / "-".join([engine, schedule, *map(str, settings.values())])

    def whole(self, engine: str, schedule: str, **settings: Any) -> Trained:
        folder = self.folder(engine, schedule, **settings)
        if folder.name not in self._made:
            case = {"folder": str(folder), "schedule": schedule, "steps": STOPS, "options": OPTIONS.get(schedule, {})}
            self._made[folder.name] = self.call("run_and_save", engine, **case, **settings)
        return self._made[folder.name]

    def rest(self, engine: str, schedule: str, step: int, saved_by: str | None = None, **settings: Any) -> Trained:
        folder = self.folder(saved_by or engine, schedule, **settings)
        settings.pop("background", None)
        case = {"folder": str(folder), "schedule": schedule, "step": step, "options": OPTIONS.get(schedule, {})}
        return self.call("go_on", engine, **case, **settings)

    def call(self, function: str, engine: str, **case: Any) -> Trained:
        if engine == "plain":
            return getattr(checkpoints, function)(engine=engine, **case)  # type: ignore[no-any-return]
        found: list[Trained] = self.ranks.run(f"tests.harness.checkpoints:{function}", engine=engine, **case)
        assert found[0].losses == found[1].losses
        return found[0]


@pytest.fixture(scope="module")
def runs(two_ranks: TwoRanks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(two_ranks, tmp_path_factory.mktemp("checkpoints"))


def same_bits(rest: Trained, whole: Trained, step: int) -> None:
    assert rest.losses == {at: loss for at, loss in whole.losses.items() if at >= step}
    assert rest.optimizer_steps == whole.optimizer_steps
    for name, value in whole.parameters.items():
        assert torch.equal(rest.parameters[name], value), name
    assert whole.moved == rest.moved == []


def near(rest: Trained, whole: Trained, step: int) -> None:
    assert rest.losses == pytest.approx({at: loss for at, loss in whole.losses.items() if at >= step}, abs=LOSS_TOLERANCE)
    assert rest.optimizer_steps == whole.optimizer_steps
    for name, value in whole.parameters.items():
        assert (rest.parameters[name] - value).abs().max().item() < PARAMETER_TOLERANCE, name
    assert rest.moved == []


@pytest.mark.parametrize("schedule", SCHEDULES.names())
@pytest.mark.parametrize("engine", list(ENGINES))
def test_stopped_anywhere(runs: Runs, engine: str, schedule: str) -> None:
    """Dropout is on: its masks too are those of the run that was never stopped."""
    # Half of the cases write in the background.
    settings = {"background": (list(ENGINES).index(engine) + SCHEDULES.names().index(schedule)) % 2 == 0}
    whole = runs.whole(engine, schedule, **settings)
    assert len(whole.losses) == STEPS
    for step in STOPS:
        same_bits(runs.rest(engine, schedule, step, **settings), whole, step)


@pytest.mark.parametrize("saved_by", list(ENGINES))
@pytest.mark.parametrize("engine", list(ENGINES))
def test_another_engine_goes_on(runs: Runs, saved_by: str, engine: str) -> None:
    """Any engine reads what any other wrote, in every stage and on every boundary; "plain" is one process, the others two."""
    if engine == saved_by:
        pytest.skip("the same engine is tested above, to the bit")
    whole = runs.whole(saved_by, "progtuning", dropout=0.0)
    for step in (1, 2, 3, 5):
        rest = runs.rest(engine, "progtuning", step, saved_by=saved_by, dropout=0.0)
        near(rest, whole, step)
