"""Runs side by side: what may be compared, and that the statistics are the textbook's."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from progscale.cli import main
from progscale.errors import ReportError
from progscale.report import compare, find_runs, read_run, render_comparison
from progscale.report.comparison import Comparison
from progscale.report.significance import holm, paired_test
from progscale.report.tables import FORMATS, as_json
from tests.harness.reports import DATA, write_run
from tests.unit.report.test_run_page import figures_in

SCORES = {"none": [0.80, 0.82, 0.78], "progtuning": [0.83, 0.84, 0.83]}


def runs_in(folder: Path, scores: dict[str, list[float]] | None = None, **options: Any) -> list[Path]:
    return [
        write_run(folder / f"{schedule}-{seed}", schedule=schedule, seed=seed, score=score, **options)
        for schedule, values in (scores or SCORES).items()
        for seed, score in enumerate(values, start=1)
    ]


def compared(paths: list[Path], **options: Any) -> Comparison:
    return compare([read_run(path) for path in paths], **options)


def test_means_and_the_paired_test(tmp_path: Path) -> None:
    (group,) = compared(runs_in(tmp_path)).groups
    assert (group.model, group.task, group.metric) == ("bert-tiny", "mrpc", "accuracy")
    plain, staged = group.arms
    assert (plain.name, staged.name) == ("full, none", "full, progtuning")
    assert (plain.mean, plain.deviation) == (pytest.approx(0.8), pytest.approx(statistics.stdev(SCORES["none"])))
    assert plain.against is None
    against = staged.against
    assert against is not None
    differences = [a - b for a, b in zip(SCORES["progtuning"], SCORES["none"], strict=True)]
    assert (against.reference, against.seeds, against.mean) == ("full, none", (1, 2, 3), pytest.approx(sum(differences) / 3))
    assert against.p == pytest.approx(stats.ttest_rel(SCORES["progtuning"], SCORES["none"]).pvalue)
    interval = stats.ttest_rel(SCORES["progtuning"], SCORES["none"]).confidence_interval(0.95)
    assert (against.low, against.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert against.p_holm == against.p


def test_equal_differences_need_no_test() -> None:
    assert paired_test([0.0, 0.0]) == (0.0, 0.0, 1.0)
    # Two seeds that gain one row of a hundred each: no spread, so nothing by which chance could be judged.
    assert paired_test([0.81 - 0.80, 0.82 - 0.81])[2] is None
    assert paired_test([0.5, 0.5]) == (0.5, 0.5, None)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == {0.01: pytest.approx(0.03), 0.03: pytest.approx(0.06), 0.04: pytest.approx(0.06)}
    assert holm([0.5, 0.9]) == {0.5: 1.0, 0.9: 1.0}
    assert holm([0.02, 0.02]) == {0.02: 0.04}


def test_time_is_paired_by_seed(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"n{seed}", schedule="none", seed=seed, seconds=seconds) for seed, seconds in ((1, 2.0), (2, 8.0))
    ]
    paths += [write_run(tmp_path / f"p{seed}", seed=seed, seconds=seconds) for seed, seconds in ((1, 1.0), (2, 8.0))]
    staged = compared(paths).groups[0].arms[1]
    assert staged.against is not None
    assert staged.against.time_ratio == pytest.approx(math.sqrt(0.5))
    assert staged.cost("train_seconds") == pytest.approx(13.5)
    assert staged.cost("updated_parameters") == 2400


def test_other_machines_have_other_seconds(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "n", schedule="none"), write_run(tmp_path / "p", about={"device": "a GPU"})]
    group = compared(paths).groups[0]
    assert group.arms[1].against is not None
    assert group.arms[1].against.time_ratio is None
    assert any("seconds and memory are not set beside" in note and "a GPU" in note for note in group.notes)
    cost = figures_in(render_comparison(compared(paths)))["cost-0"]
    assert cost["groups"] == ["operations", "updated"]


def test_arms_are_named_by_what_differs(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", sets=["optimizer.lr=1e-4"]),
        write_run(tmp_path / "b", sets=["optimizer.lr=2e-4"]),
        write_run(tmp_path / "c", schedule="none", sets=["optimizer.lr=1e-4"]),
        write_run(tmp_path / "d", schedule="none", sets=["optimizer.lr=1e-4"], about={"engine": "zero2", "world_size": 2}),
    ]
    names = [arm.name for arm in compared(paths).groups[0].arms]
    assert names == [
        "full, progtuning, lr=0.0001",
        "full, progtuning, lr=0.0002",
        "full, none, engine=plain, world_size=1",
        "full, none, engine=zero2, world_size=2",
    ]


def test_what_differs_besides_the_names_is_said(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a", sets=["optimizer.lr=1e-4"]), write_run(tmp_path / "b", schedule="none")]
    (note,) = compared(paths).groups[0].notes
    assert "optimizer.lr: 0.0001 (full, progtuning), " in note


def test_names_of_runs_and_folders_differ_nothing(tmp_path: Path) -> None:
    paths = runs_in(tmp_path, sets=["run.output_dir=elsewhere"]) + [
        write_run(tmp_path / "more", seed=4, sets=["trackers.names=[]", "checkpoint.keep=5"])
    ]
    assert [len(arm.scores) for arm in compared(paths).groups[0].arms] == [3, 4]


def test_seeds_that_one_arm_lacks(tmp_path: Path) -> None:
    group = compared(runs_in(tmp_path, {"none": [0.8, 0.8, 0.8], "progtuning": [0.8, 0.9]})).groups[0]
    assert group.arms[1].against is not None
    assert group.arms[1].against.seeds == (1, 2)
    assert group.notes == ("full, progtuning and full, none have 2 seeds in common; the difference is over those alone.",)


def test_one_seed_has_no_test(tmp_path: Path) -> None:
    comparison = compared(runs_in(tmp_path, {"none": [0.8], "progtuning": [0.9]}))
    against = comparison.groups[0].arms[1].against
    assert against is not None
    assert (against.p, against.low, against.mean) == (None, None, pytest.approx(0.1))
    assert "may be chance" in comparison.notes[0]


def test_groups_by_task_and_model(tmp_path: Path) -> None:
    paths = (
        runs_in(tmp_path / "a") + runs_in(tmp_path / "b", about={"task": "rte"}) + runs_in(tmp_path / "c", about={"model": "x"})
    )
    groups = compared(paths).groups
    assert [(group.model, group.task) for group in groups] == [("bert-tiny", "mrpc"), ("bert-tiny", "rte"), ("x", "mrpc")]
    p = [arm.against.p for group in groups for arm in group.arms if arm.against]
    adjusted = [arm.against.p_holm for group in groups for arm in group.arms if arm.against]
    assert adjusted == pytest.approx([3 * value for value in p])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"finished": False}, r"it has not ended \(30 of 30 steps\); go on with --resume auto"),
        ({"stage": {"frozen_changed": 1}}, "3 frozen tensors changed"),
        ({"score": None}, "its accuracy is not a finite number"),
        (
            {"about": {"data": {**DATA, "validation": {"rows": 5, "content": "x"}}}},
            "evaluated on different data .validation: 20 and 5",
        ),
        ({"about": {"data": {**DATA, "validation": {"rows": 20, "content": "x"}}}}, "20 and 20 rows of other content or tokens"),
        ({"about": {"data": {**DATA, "train": {"rows": 9, "content": "x"}}}}, "trained on different data"),
        ({"about": {"data": {"train": DATA["train"]}}}, "has the splits train, validation, .* has train"),
        ({"about": {"primary_metric": "f1"}}, "judged by accuracy, .* by f1: choose one with --metric"),
        ({"about": {"primary_metric": "f1", "seed": 2}, "seed": 2}, "judged by accuracy"),
        ({"schedule": "none"}, "are the same run"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    first = write_run(tmp_path / "a", schedule="none")
    second = write_run(tmp_path / "b", **options)
    with pytest.raises(ReportError, match=says):
        compared([first, second])


def test_a_split_that_the_seed_draws_may_differ_by_seed(tmp_path: Path) -> None:
    drawn = {**DATA, "validation": {"rows": 20, "content": "other"}}
    paths = [write_run(tmp_path / f"{name}-1", schedule=name) for name in ("none", "progtuning")]
    paths += [write_run(tmp_path / f"{name}-2", schedule=name, seed=2, about={"data": drawn}) for name in ("none", "progtuning")]
    assert [len(arm.scores) for arm in compared(paths).groups[0].arms] == [2, 2]
    short = {**DATA, "validation": {"rows": 7, "content": "other"}}
    paths.append(write_run(tmp_path / "none-3", schedule="none", seed=3, about={"data": short}))
    with pytest.raises(ReportError, match="have 20 and 7 rows of the split validation"):
        compared(paths)


def test_runs_of_an_earlier_version(tmp_path: Path) -> None:
    paths = runs_in(tmp_path)
    summary = json.loads((paths[0] / "summary.json").read_text())
    del summary["data"], summary["primary_metric"]
    (paths[0] / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ReportError, match="does not say primary_metric, data; it is of an earlier version"):
        compared(paths)


def test_all_faults_at_once(tmp_path: Path) -> None:
    paths = runs_in(tmp_path, finished=False)
    with pytest.raises(ReportError) as caught:
        compared(paths)
    assert str(caught.value).count("has not ended") == 6


def test_another_metric_and_reference(tmp_path: Path) -> None:
    paths = runs_in(tmp_path)
    group = compared(paths, metric="loss").groups[0]
    assert (group.metric, group.higher_is_better) == ("loss", False)
    turned = compared(paths, reference="full, progtuning").groups[0]
    assert turned.arms[0].against is not None
    assert turned.arms[0].against.reference == "full, progtuning"
    assert turned.arms[1].against is None
    assert compared(paths, which="best").groups[0].arms[0].mean == pytest.approx(0.9)
    with pytest.raises(ReportError, match="has no 'acuracy', only accuracy, f1, loss; did you mean 'accuracy'"):
        compared(paths, metric="acuracy")
    with pytest.raises(ReportError, match="--reference 'lora': no arm's name begins so; full, none; full, progtuning"):
        compared(paths, reference="lora")
    with pytest.raises(ReportError, match="at least two are needed"):
        compared(paths[:1])


def test_a_reference_has_the_same_options(tmp_path: Path) -> None:
    """Of several arms without stages each other arm takes the one that differs from it in the schedule alone."""
    curves = ("linear", "cosine")
    paths = [
        write_run(tmp_path / f"{name}-{curve}", schedule=name, sets=[f"optimizer.lr_schedule={curve}"])
        for name in ("none", "progtuning")
        for curve in curves
    ]
    arms = {arm.name: arm for arm in compared(paths).groups[0].arms}
    for curve in curves:
        against = arms[f"full, progtuning, lr_schedule={curve}"].against
        assert against is not None
        assert against.reference == f"full, none, lr_schedule={curve}"
        assert arms[f"full, none, lr_schedule={curve}"].against is None
    paths.append(write_run(tmp_path / "odd", sets=["optimizer.lr_schedule=constant"]))
    group = compared(paths).groups[0]
    assert group.arms[-1].against is None
    assert any("several arms without stages could be its reference" in note for note in group.notes)
    with pytest.raises(
        ReportError, match="--reference 'full, none' fits several arms of mrpc: full, none, lr_schedule=linear; full"
    ):
        compared(paths, reference="full, none")


@pytest.mark.parametrize(("metric", "is_higher"), [("mse", False), ("mae", False), ("loss_mismatched", False), ("f1", True)])
def test_which_way_is_up(tmp_path: Path, metric: str, is_higher: bool) -> None:
    paths = runs_in(tmp_path)
    for number, path in enumerate(paths):
        summary = json.loads((path / "summary.json").read_text())
        summary["metrics"][metric] = number / 10
        (path / "summary.json").write_text(json.dumps(summary))
    assert compared(paths, metric=metric).groups[0].higher_is_better is is_higher


def test_a_suite_leaves_out_what_cannot_be_compared(tmp_path: Path) -> None:
    paths = [*runs_in(tmp_path / "a"), write_run(tmp_path / "nan", seed=9, score=None)]
    paths += runs_in(tmp_path / "b", about={"data": {**DATA, "train": {"rows": 7, "content": "z"}}})
    labels = {path: ("", "first" if "/a/" in str(path) else "second") for path in paths}
    found = compared(paths, labels=labels, strict=False)
    assert [group.task for group in found.groups] == ["first", "second"]
    assert "Left out: " in found.notes[0]
    assert "its accuracy is not a finite number" in found.notes[0]


def test_a_best_score_that_is_none(tmp_path: Path) -> None:
    paths = runs_in(tmp_path)
    summary = json.loads((paths[0] / "summary.json").read_text())
    summary["best_metrics"]["f1"] = None
    (paths[0] / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ReportError, match="its f1 is not a finite number"):
        compared(paths, which="best", metric="f1")


def test_folders_of_models_with_one_name(tmp_path: Path) -> None:
    paths = runs_in(tmp_path / "a", about={"model": "/m/x/checkpoint-500"})
    paths += runs_in(tmp_path / "b", about={"model": "/m/y/checkpoint-500"})
    assert [group.model for group in compared(paths).groups] == ["x/checkpoint-500", "y/checkpoint-500"]


def test_folders_of_runs(tmp_path: Path) -> None:
    paths = runs_in(tmp_path / "deep" / "er")
    (tmp_path / "deep" / "er" / "none-1" / "model").mkdir()
    (tmp_path / "deep" / "er" / "none-1" / "model" / "config.json").write_text("{}")
    write_run(tmp_path / "deep" / "cut", finished=False)
    assert find_runs([tmp_path, paths[0]]) == (sorted(paths), [tmp_path / "deep" / "cut"])
    # An earlier run that was moved aside for one of the same name; only where that one lies there.
    for name in (f"{paths[0].name}.1", "other.1"):
        shutil.copytree(paths[0], paths[0].parent / name)
    assert find_runs([tmp_path])[0] == sorted([*paths, paths[0].parent / "other.1"])
    assert find_runs([paths[0].parent / f"{paths[0].name}.1"])[0] == [paths[0].parent / f"{paths[0].name}.1"]
    assert find_runs([tmp_path / "deep" / "cut"]) == ([tmp_path / "deep" / "cut"], [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="holds no run folder"):
        find_runs([tmp_path / "empty"])


def test_tables(tmp_path: Path) -> None:
    comparison = compared(runs_in(tmp_path))
    markdown = FORMATS["markdown"](comparison).splitlines()
    assert markdown[0].startswith("| model | task | arm | seeds | score | difference | p |")
    assert all(line.count("|") == markdown[0].count("|") for line in markdown[:4])
    assert "full, progtuning" in markdown[3]
    assert "+0.033 ± 0.038" in markdown[3]
    csv = FORMATS["csv"](comparison).splitlines()
    assert csv[0].startswith("model,task,metric,arm,seed,score,train_seconds")
    assert len(csv) == 7
    assert csv[1].startswith('bert-tiny,mrpc,accuracy,"full, none",1,0.8,3.0,4.0,3000.0,3000.0,3000000000000.0')
    latex = FORMATS["latex"](comparison)
    assert r"\begin{tabular}{lll" in latex
    assert r"0.8000 $\pm$ 0.020" in latex
    assert json.loads(FORMATS["json"](comparison)) == json.loads(json.dumps(as_json(comparison)))


def test_latex_takes_names_as_text(tmp_path: Path) -> None:
    text = FORMATS["latex"](compared(runs_in(tmp_path, about={"task": "a_b & 50%"})))
    assert r"a\_b \& 50\%" in text


def test_the_page(tmp_path: Path) -> None:
    page = render_comparison(compared(runs_in(tmp_path)))
    found = figures_in(page)
    assert set(found) == {"score-0", "difference-0", "cost-0", "curve-0"}
    assert found["score-0"]["rows"][0]["points"] == SCORES["none"]
    assert found["difference-0"]["rows"][0]["points"] == pytest.approx([0.03, 0.02, 0.05])
    assert (found["cost-0"]["groups"][:3], found["cost-0"]["series"][0]["values"][2]) == (
        ["training time", "operations", "updated"],
        pytest.approx(0.8),
    )
    assert "With 3 seeds only large differences" in page
    assert len(page) < 1_000_000


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex", "json", "html"])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    runs_in(tmp_path / "runs")
    target = tmp_path / "out"
    assert main(["compare", str(tmp_path / "runs"), "--format", form, "--output", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    written = target.read_text()
    if form != "html":
        assert main(["compare", str(tmp_path / "runs"), "--format", form]) == 0
        shown = capsys.readouterr().out
        assert "progtuning" in shown
        if form != "text":
            assert shown.strip() == written.strip()
    assert main(["compare", str(tmp_path / "runs"), "--output", str(tmp_path / "no" / "x")]) == 2
    assert main(["compare", str(tmp_path / "none")]) == 2
