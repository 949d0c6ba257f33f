"""Run folders read back, whole, unfinished and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from progscale.errors import ReportError
from progscale.report import read_run
from tests.harness.reports import STEPS, write_run


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert (run.finished, run.name, run.step, run.primary_metric) == (True, "a", STEPS, "accuracy")
    assert (run.metrics()["accuracy"], run.metrics("best")["accuracy"]) == (0.8, 0.9)
    assert [record["step"] for record in run.evaluations] == [10, 20, 30]
    assert len(run.stages) == 3


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl"])
def test_a_file_of_the_run_will_do(tmp_path: Path, name: str) -> None:
    assert read_run(write_run(tmp_path / "a") / name).name == "a"


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:9]) + text[9][:20])
    run = read_run(folder)
    assert (run.finished, run.step, run.about["task"], run.metrics(), run.stages) == (False, 8, "mrpc", {}, [])


def test_a_run_that_has_written_nothing_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert (run.step, run.about, run.primary_metric) == (0, {}, None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", None, "is no run folder: it has no config.json; give a folder that progscale train wrote"),
        ("plan.json", None, "is no run folder: it has no plan.json"),
        ("plan.json", "{}", "has no 'stages': it was not written by progscale train"),
        ("summary.json", "{", "summary.json' cannot be read"),
        ("summary.json", "[]", "holds no JSON object"),
        ("metrics.jsonl", '{"kind": "step"}\nbroken\n', "line 2: no JSON"),
        ("metrics.jsonl", "[]\n", "line 1: no JSON object"),
        ("metrics.jsonl", b"\xff\n", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: str | bytes | None, says: str) -> None:
    folder = write_run(tmp_path / "a")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReportError, match=says):
        read_run(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is no folder; give that of a run"):
        read_run(tmp_path / "none")
