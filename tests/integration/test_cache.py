"""The cache by the command line: the same run in less time, what is said of it, stopped and resumed, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.programs import TWO, Answer, in_process, launched, records, settings, summary_of
from tests.integration.test_resume import Told, told

__all__ = ["told"]
# Two epochs of six steps in each of two stages; the embeddings are frozen in the second.
CACHED = {"train__epochs": 4, "schedule__stages": 2, "schedule__embeddings": "first_stage", "schedule__frozen_mode": "eval"}


def train(folder: Path, storage: str, *more: str, **changes: Any) -> Answer:
    changes = {**CACHED, "cache__storage": storage, "run__output_dir": str(folder), **changes}
    return in_process("train", *settings(**changes), *more)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that computes its frozen blocks each time."""
    folder = tmp_path_factory.mktemp("plain")
    answer = train(folder, "off")
    assert answer.code == 0, answer.err
    return folder / "a"


def same_losses(run: Path, other: Path) -> None:
    for kind, key in (("step", "loss"), ("evaluation", "loss")):
        found, wanted = ([line[key] for line in records(folder, kind)] for folder in (run, other))
        assert found == pytest.approx(wanted, rel=0, abs=1e-6)
        assert len(found) > 3


@pytest.mark.parametrize("storage", ["ram", "disk", "auto"])
def test_the_same_run(tmp_path: Path, plain: Path, storage: str) -> None:
    answer = train(tmp_path, storage)
    assert answer.code == 0, answer.err
    said = " ".join(answer.out.split())
    assert "progtuning (frozen blocks in eval mode)" in said
    assert "stage 2: cache of blocks 0 to 2: on, a micro-batch takes" in said
    same_losses(tmp_path / "a", plain)
    summary, without = summary_of(tmp_path / "a"), summary_of(plain)
    assert summary["frozen_mode"] == without["frozen_mode"] == "eval"
    assert [stage["frozen_prefix"] for stage in summary["stages"]] == [0, 3]
    assert all("cache" not in stage for stage in without["stages"])
    first, second = (stage["cache"] for stage in summary["stages"])
    assert (first["read"], first["bytes"]) == (0, 0)
    assert second["read"] + second["computed"] == 2 * 192
    assert second["read"] > 100
    assert second["bytes"] > 0
    assert not (tmp_path / "a" / "cache").exists()


@pytest.mark.usefixtures("told")
def test_stopped_it_keeps_its_rows(tmp_path: Path, plain: Path) -> None:
    Told.stop_at = 21  # in the fourth epoch, where rows are read
    assert train(tmp_path, "disk").code == 75
    assert list((tmp_path / "a" / "cache").rglob("train.rows"))
    Told.stop_at = None
    answer = train(tmp_path, "disk", "--resume", "must")
    assert answer.code == 0, answer.err
    same_losses(tmp_path / "a", plain)
    counts = summary_of(tmp_path / "a")["stages"][1]["cache"]
    assert counts["read"] + counts["computed"] == 2 * 192
    # Of the second pass in this stage no row is computed but those that were not kept, and those that are measured.
    assert counts["computed"] <= 192 + 32 + 2 * 32
    assert not (tmp_path / "a" / "cache").exists()


@pytest.mark.usefixtures("told")
def test_it_may_come_and_go_with_a_resume(tmp_path: Path, plain: Path) -> None:
    """What is computed does not hang on it; the eval mode does."""
    Told.stop_at = 15
    assert train(tmp_path, "ram").code == 75
    Told.stop_at = None
    answer = train(tmp_path, "off", "--resume", "must", schedule__frozen_mode=...)
    assert answer.code == 2
    assert 'schedule.frozen_mode: the checkpoint has "eval", this run "train"' in answer.err
    assert train(tmp_path, "off", "--resume", "must").code == 0
    same_losses(tmp_path / "a", plain)


def test_blocks_that_are_trained_again_are_refused(tmp_path: Path) -> None:
    answer = train(tmp_path, "ram", schedule__name="custom", schedule__first_blocks=[3, 0], schedule__embeddings="never")
    assert answer.code == 2
    assert "cache.storage: 'ram', while stage 2 of 'custom' trains blocks that were frozen in stage 1" in answer.err
    assert not (tmp_path / "a").exists()


def test_two_ranks_by_the_launcher(tmp_path: Path, plain: Path) -> None:
    changes = {**CACHED, "cache__storage": "auto", "run__output_dir": str(tmp_path), "run__threads": 1}
    config = str(Path(__file__).parents[2] / "configs" / "zero3.json")
    answer = launched(tmp_path, ["--config", config, *settings(**changes)], launcher=TWO)
    assert answer.code == 0, answer.err
    assert summary_of(tmp_path / "a")["stages"][1]["cache"]["read"] > 50
    found, wanted = ([line["loss"] for line in records(run, "step")][:6] for run in (tmp_path / "a", plain))
    assert found == pytest.approx(wanted, abs=0.05), "its dropout is that of two ranks"
