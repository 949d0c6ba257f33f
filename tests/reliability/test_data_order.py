"""A resumed run reads on where it stopped: every step gets the rows it would have got, none is lost and none comes twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.harness.interrupted import Runs, goes_on, ranks_of
from tests.harness.programs import records

ROWS, EPOCHS, STEPS_PER_EPOCH = 190, 3, 6
STEPS = EPOCHS * STEPS_PER_EPOCH
Line = dict[str, Any]


class Rows:
    """Runs that write down their rows; those that nobody interrupts are made once."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._whole: dict[tuple[str, int], list[list[Line]]] = {}

    def whole(self, folder: Path, engine: str, workers: int) -> list[list[Line]]:
        """Lines of each rank of an uninterrupted run."""
        if (engine, workers) not in self._whole:
            self._whole[engine, workers] = self.train(folder, engine, workers, code=0)
        return self._whole[engine, workers]

    def train(self, folder: Path, engine: str, workers: int, code: int, **options: Any) -> list[list[Line]]:
        """Lines of each rank of one process of a run."""
        ranks = ranks_of(engine)
        number = len(list(folder.glob("rows*")))
        into = folder / f"rows{number}"
        into.mkdir(parents=True)
        ended = self.runs.train(
            folder,
            engine,
            plugins=["tests.harness.rows"],
            environment={"PROGSCALE_ROWS": str(into)},
            train__epochs=EPOCHS,
            train__num_workers=workers,
            train__evaluate="end",
            **options,
        )
        assert [rank.code for rank in ended] == [code] * ranks, ended[0].err
        return [[json.loads(line) for line in (into / str(rank)).read_text().splitlines()] for rank in range(ranks)]


@pytest.fixture(scope="module")
def rows(runs: Runs) -> Rows:
    return Rows(runs)


def complete(lines: list[list[Line]]) -> None:
    """Every epoch has every row once, each on one rank."""
    for rank in lines:
        assert [line["step"] for line in rank] == list(range(STEPS))
    for epoch in range(EPOCHS):
        steps = slice(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        assert Counter(row for line in lines[0][steps] for row in line["rows"]) == Counter(range(ROWS))
        assert Counter(row for rank in lines for line in rank[steps] for row in line["own"]) == Counter(range(ROWS))


def same_rows(rows: Rows, folder: Path, engine: str, workers: int, step: int, **saving: Any) -> None:
    """Killed just before `step` is computed, and resumed."""
    whole = rows.whole(folder / "whole", engine, workers)
    complete(whole)
    fault = f"kill@step={step}"
    first = rows.train(folder, engine, workers, code=-9, fault=fault, **saving)
    with goes_on(folder):
        second = rows.train(folder, engine, workers, code=0, **saving)
    resumed = records(folder / "a", "resume")
    begin = resumed[0]["step"] if resumed else 0
    assert begin <= step
    for rank, (before, after) in enumerate(zip(first, second, strict=True)):
        # The batch of the step it was killed in had been read, and the one after it; what counts is what was saved.
        assert before == whole[rank][: len(before)]
        assert step <= len(before) <= step + 2
        assert after == whole[rank][begin:]
    complete([before[:begin] + after for before, after in zip(first, second, strict=True)])


@pytest.mark.parametrize(
    ("workers", "step"), [(2, 7), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 6), (2, 5), (0, 9)])]
)
def test_the_rows_of_a_resumed_run(rows: Rows, tmp_path: Path, workers: int, step: int) -> None:
    same_rows(rows, tmp_path, "plain", workers, step, checkpoint__every_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["in_place", "background"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [3, 11, 12, 13, 15])
def test_the_rows_of_a_run_resumed_around_an_epoch(rows: Rows, tmp_path: Path, workers: int, step: int, background: bool) -> None:
    """On the boundary of an epoch, a step before and after it, and in the middle."""
    same_rows(rows, tmp_path, "plain", workers, step, checkpoint__every_steps=1, checkpoint__background=background)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [5, 6, 7, 9])
def test_the_rows_of_two_ranks(rows: Rows, tmp_path: Path, workers: int, step: int) -> None:
    same_rows(rows, tmp_path, "ddp", workers, step, checkpoint__every_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rows_when_the_number_of_ranks_changes(rows: Rows, tmp_path: Path, ranks: int) -> None:
    """Global batches are those of any other world size."""
    before, after = ("ddp", "plain") if ranks == 1 else ("plain", "ddp")
    whole = rows.whole(tmp_path / "whole", "plain", 0)
    rows.train(tmp_path, before, 0, code=-9, fault="kill@step=8", checkpoint__every_steps=2)
    lines = rows.train(tmp_path, after, 0, code=0, checkpoint__every_steps=2)
    begin = records(tmp_path / "a", "resume")[0]["step"]
    for rank in lines:
        assert [line["rows"] for line in rank] == [line["rows"] for line in whole[0][begin:]]
    for step, line in enumerate(whole[0][begin:]):
        assert sorted(row for rank in lines for row in rank[step]["own"]) == sorted(line["rows"])
