"""What the page of a run holds, as data; how it looks is seen in tests/browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from progscale.cli import main
from progscale.report import figures, read_run, render_run, write_report
from progscale.report.run_page import all_figures, tiles
from tests.harness.reports import write_run


def figures_in(page: str) -> dict[str, dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figure-data">(.*?)</script>', page, re.S)
    assert found
    return {figure["name"]: figure for figure in json.loads(found[1])}


def test_every_figure_has_labels(tmp_path: Path) -> None:
    found = figures_in(render_run(read_run(write_run(tmp_path / "a"))))
    wanted = {"freeze", "loss", "scores", "learning-rate", "gradient", "volume", "operations", "memory", "throughput", "time"}
    assert set(found) == wanted
    for figure in found.values():
        assert figure["title"]
        assert figure["x"]
        assert figure["y"] or figure["kind"] == "shares"


def test_units_are_named(tmp_path: Path) -> None:
    found = figures_in(render_run(read_run(write_run(tmp_path / "a", stage={"energy_joules": 7200.0}))))
    units = {"memory": "MB", "operations": "TFLOP", "volume": "millions", "throughput": "rows a second", "energy": "Wh"}
    for name, unit in units.items():
        assert unit in found[name]["y"]
    assert (found["time"]["x"], found["freeze"]["x"]) == ("seconds", "optimizer step")


def test_the_timeline_is_the_plan(tmp_path: Path) -> None:
    figure = figures_in(render_run(read_run(write_run(tmp_path / "a"))))["freeze"]
    assert figure["rows"] == ["embeddings", *(f"block {block}" for block in range(6)), "head"]
    frozen = {(cell["row"], cell["stage"]) for cell in figure["cells"] if not cell["trained"]}
    assert frozen == {("block 0", 2), ("block 1", 2), *((f"block {block}", 3) for block in range(4))}
    assert {(cell["stage"], cell["from"], cell["to"]) for cell in figure["cells"]} == {(1, 0, 10), (2, 10, 20), (3, 20, 30)}


def test_curves_and_bars_are_what_was_recorded(tmp_path: Path) -> None:
    found = figures_in(render_run(read_run(write_run(tmp_path / "a"))))
    loss = {series["name"]: series["points"] for series in found["loss"]["series"]}
    assert loss["training"] == [[step, 1 / step] for step in range(1, 31)]
    assert loss["validation"] == [[10, 0.6], [20, 0.6], [30, 0.6]]
    assert found["loss"]["marks"] == [{"x": 0, "text": "stage 1"}, {"x": 10, "text": "stage 2"}, {"x": 20, "text": "stage 3"}]
    scores = {series["name"]: series["points"] for series in found["scores"]["series"]}
    assert list(scores) == ["accuracy", "f1"]
    assert scores["accuracy"] == [[10, 0.6], [20, 0.7], [30, 0.8]]
    volume = {series["name"]: series["values"] for series in found["volume"]["series"]}
    assert volume["planned"] == volume["measured"] == pytest.approx([1e-3, 8e-4, 6e-4])
    assert volume["without stages"] == pytest.approx([1e-3] * 3)
    parts = {part["name"]: part["value"] for part in found["time"]["parts"]}
    assert sum(parts.values()) == pytest.approx(4.0)


def test_scores_of_another_scale_have_axes_of_their_own(tmp_path: Path) -> None:
    records = [{"kind": "evaluation", "step": 30, "accuracy": 0.8, "exact": 71.0, "perplexity": 9.0, "loss": None}]
    found = figures_in(render_run(read_run(write_run(tmp_path / "a", records=records))))
    assert [series["name"] for series in found["scores-large"]["series"]] == ["exact"]


def test_the_first_figures_say_whether_the_ledger_holds(tmp_path: Path) -> None:
    shown = {tile.label: tile for tile in tiles(read_run(write_run(tmp_path / "a", stage={"updated_parameters": 500})))}
    assert shown["updated parameters"].value == "1.500 k"
    assert shown["updated parameters"].note == "50.0 % fewer than without stages, measured"
    assert shown["frozen tensors that changed"].good is True
    bad = {tile.label: tile for tile in tiles(read_run(write_run(tmp_path / "b", stage={"frozen_changed": 1})))}
    assert (bad["frozen tensors that changed"].value, bad["frozen tensors that changed"].good) == ("3", False)


def test_text_of_the_user_is_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", about={"device": "<b>x</b></script><script>alert(1)</script>", "task": "<i>"})
    page = render_run(read_run(folder))
    assert "<script>alert" not in page
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x" in page


def test_a_run_at_its_beginning_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    (folder / "metrics.jsonl").write_text("")
    page = render_run(read_run(folder))
    assert "Not finished: 0 of 30 steps are recorded." in page
    assert {name for name, figure in figures_in(page).items() if figure} == {"freeze", "volume"}


def test_events_are_told(tmp_path: Path) -> None:
    records = [
        {"kind": "resume", "step": 10, "saved_by": {"engine": "zero2", "world_size": 4}},
        {"kind": "nonfinite", "step": 11, "fault": "loss"},
        {"kind": "tracker_failed", "message": "tracker 'mlflow': it failed"},
    ]
    page = render_run(read_run(write_run(tmp_path / "a", records=records)))
    assert "went on from step 10, saved by zero2 on 4" in page
    assert "step 11: the loss was not finite" in page
    assert "tracker &#39;mlflow&#39;: it failed" in page


def test_a_long_run_is_thinned() -> None:
    points = [(step, float(step)) for step in range(1, 100_001)]
    figure = figures.lines("a", "A", x="step", y="loss", series={"training": points})
    kept = figure["series"][0]["points"]
    assert len(kept) <= figures.MOST_POINTS
    assert kept[-1] == [100_000, 100_000.0]
    assert kept[0] == [101, pytest.approx(51.0)]
    assert "mean of up to 101 records" in figure["note"]


def test_the_size_of_a_long_run(tmp_path: Path) -> None:
    records = [{"kind": "step", "step": step, "stage": 3, "loss": 0.123456789 / step} for step in range(31, 60_000)]
    path = write_report(write_run(tmp_path / "a", records=records))
    assert path.stat().st_size < 1_000_000


def test_stacks_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    plan = json.loads((folder / "plan.json").read_text())
    plan["num_blocks"] = {"encoder": 6, "decoder": 2}
    for stage in plan["stages"]:
        stage["live_blocks"] = {"encoder": stage["live_blocks"]["blocks"], "decoder": [1]}
    (folder / "plan.json").write_text(json.dumps(plan))
    freeze = next(figure for figure in all_figures(read_run(folder)) if figure and figure["name"] == "freeze")
    assert freeze["rows"][1:3] == ["encoder 0", "encoder 1"]
    assert freeze["rows"][-2] == "decoder 1"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert main(["report", str(folder), "--output", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").read_text() == (folder / "report.html").read_text()
    assert main(["report", str(folder), "--output", str(tmp_path / "no" / "b.html")]) == 2
    assert "cannot be written (No such file or directory); choose another with --output" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    assert "is a folder; name a file in it with --output" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A path that is not UTF-8 comes as halves of characters, which no file of text can have."""
    path = write_report(write_run(tmp_path / "a", about={"command": "progscale train --config d\udce9.json"}))
    assert "d\\udce9.json" in path.read_text()
    assert list(tmp_path.glob("a/*.partial")) == []


def test_errors_are_not_drawn_as_scores(tmp_path: Path) -> None:
    records = [{"kind": "evaluation", "step": 30, "accuracy": 0.8, "mse": 0.25}]
    found = figures_in(render_run(read_run(write_run(tmp_path / "a", records=records))))
    assert [series["name"] for series in found["scores-large"]["series"]] == ["mse"]
