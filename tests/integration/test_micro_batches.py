"""Micro-batches that grow with the memory which frozen blocks free: the same run in fewer pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.programs import Answer, in_process, records, settings, summary_of
from tests.integration.test_resume import Told, told

__all__ = ["told"]
# Without dropout, whose masks hang on how a batch is cut.
PLAIN = {
    "model__overrides": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "schedule__embeddings": "first_stage",
}


def train(folder: Path, *more: str, **changes: Any) -> Answer:
    return in_process("train", *settings(run__output_dir=str(folder), train__evaluate="end", **{**PLAIN, **changes}), *more)


def rows_of(run: Path) -> list[int]:
    return [stage["micro_batch_size"] for stage in summary_of(run)["stages"]]


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Gigabytes that hold half of the first stage's batch."""
    folder = tmp_path_factory.mktemp("whole")
    answer = train(folder, train__micro_batch_size="auto")
    assert answer.code == 0, answer.err
    assert rows_of(folder / "a") == [32, 32, 32], "on any machine there is room for the demo"
    assert "stage 1: micro-batches of 32 rows, 1 a step: " in answer.out
    return float(records(folder / "a", "micro_batch")[0]["predicted_bytes"]) * 0.6 / 1e9


def test_they_grow(tmp_path: Path, budget: float) -> None:
    answer = train(tmp_path, train__micro_batch_size="auto", train__memory_gigabytes=budget)
    assert answer.code == 0, answer.err
    found = rows_of(tmp_path / "a")
    assert found == sorted(found)
    assert found[0] < found[-1]
    fixed = tmp_path / "fixed"
    assert train(fixed, train__micro_batch_size=32).code == 0
    losses = [[line["loss"] for line in records(run, "step")] for run in (tmp_path / "a", fixed / "a")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6), "the sum of the gradients is the same"


@pytest.mark.usefixtures("told")
def test_a_stage_that_goes_on_keeps_them(tmp_path: Path, budget: float) -> None:
    """Whatever memory there is by then: a batch cut in another way would be another sum to the last bit."""
    Told.stop_at = 1
    assert train(tmp_path, train__micro_batch_size="auto", train__memory_gigabytes=budget).code == 75
    state = json.loads(next((tmp_path / "a" / "checkpoints").glob("step-*/state.json")).read_text())
    Told.stop_at = None
    answer = train(tmp_path, "--resume", "must", train__micro_batch_size="auto")
    assert answer.code == 0, answer.err
    found = rows_of(tmp_path / "a")
    assert found[0] == state["micro_batch_size"] < 32
    assert found[1:] == [32, 32]
    assert "stage 1: micro-batches" not in answer.out
