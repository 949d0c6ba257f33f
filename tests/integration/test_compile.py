"""Compiled blocks by the command line: trained, evaluated, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.programs import in_process, records, settings, summary_of
from tests.integration.test_resume import Told, told

__all__ = ["told"]


# Tracing takes a minute.
@pytest.mark.product
@pytest.mark.usefixtures("told")
def test_the_same_run(tmp_path: Path) -> None:
    """aot_eager draws the dropout of a run that is not compiled."""
    changes = {"train__epochs": 2, "schedule__stages": 2}
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    assert in_process("train", *settings(**changes, run__output_dir=str(plain))).code == 0
    words = settings(**changes, run__output_dir=str(compiled), train__compile="aot_eager")
    Told.stop_at = 8
    assert in_process("train", *words).code == 75
    Told.stop_at = None
    answer = in_process("train", *words, "--resume", "must")
    assert answer.code == 0, answer.err
    for kind in ("step", "evaluation"):
        found, wanted = ([line["loss"] for line in records(folder / "a", kind)] for folder in (compiled, plain))
        assert found == pytest.approx(wanted, abs=1e-5)
        assert len(found) > 1
    assert summary_of(compiled / "a")["metrics"] == pytest.approx(summary_of(plain / "a")["metrics"], abs=1e-5)
