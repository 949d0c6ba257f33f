"""A suite's file → runs: axes, layers, names; and that every mistake is named before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from progscale.config import load_config
from progscale.errors import ConfigError
from progscale.suite import State, Suite, read_suite, state_of
from tests.harness.reports import write_run

REPOSITORY = Path(__file__).parents[3]


def suite_of(folder: Path, **content: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return path


def read(folder: Path, *sets: str, **content: Any) -> Suite:
    return read_suite(suite_of(folder, **content), list(sets), folder / "out")


def test_every_combination_seeds_outermost(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        schedules={"none": {"schedule": {"name": "none"}}, "prog": {}},
        methods={"full": {}, "bitfit": {"method": {"name": "bitfit"}}},
        seeds=[1, 2],
    )
    assert [cell.name for cell in suite.cells] == [
        *("full-none-s1", "full-prog-s1", "bitfit-none-s1", "bitfit-prog-s1"),
        *("full-none-s2", "full-prog-s2", "bitfit-none-s2", "bitfit-prog-s2"),
    ]
    last = suite.cells[-1]
    assert last.point == {"methods": "bitfit", "schedules": "prog", "seed": "2"}
    assert (last.config.method.name, last.config.schedule.name, last.config.run.seed) == ("bitfit", "progtuning", 2)
    assert last.folder == tmp_path / "out" / "runs" / "bitfit-prog-s2"


def test_layers_win_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"optimizer": {"lr": 1e-5, "weight_decay": 0.5}, "train": {"epochs": 9}}')
    (tmp_path / "task.json").write_text('{"train": {"epochs": 2}}')
    suite = read(
        tmp_path,
        "optimizer.eps=1e-3",
        include=["base.json"],
        tasks={"a": {"include": ["task.json"], "optimizer": {"lr": 3e-5}}, "b": "task.json"},
        schedules={"x": {"optimizer": {"lr": 4e-5}}},
        set={"train.global_batch_size": 64, "optimizer.eps": 1e-2},
    )
    a, b = (cell.config for cell in suite.cells)
    assert (a.optimizer.lr, b.optimizer.lr, a.optimizer.weight_decay, a.train.epochs) == (4e-5, 4e-5, 0.5, 2)
    assert (a.train.global_batch_size, a.optimizer.eps) == (64, 1e-3)


def test_a_run_can_be_run_alone(tmp_path: Path) -> None:
    suite = read(tmp_path, schedules={"none": {"schedule": {"name": "none"}}}, seeds=[3])
    suite.write_configs()
    (cell,) = suite.cells
    assert load_config([cell.file]) == cell.config


def test_files_and_what_is_left_out(tmp_path: Path) -> None:
    suite = read_suite(REPOSITORY / "configs" / "suites" / "paper-table2.json")
    assert len(suite.cells) == 20
    assert suite.cells[0].name == "squad-v1-fine-tuning-s1"
    out = read(
        tmp_path,
        tasks={"a": {}, "b": {}},
        schedules={"none": {}, "prog": {}},
        leave_out=[{"tasks": "a", "schedules": "prog"}, {"tasks": "b", "schedules": "none"}],
    )
    assert [cell.name for cell in out.cells] == ["a-none-s42", "b-prog-s42"]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "suites").glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_suites_can_be_read(path: Path) -> None:
    runs = {"small": 36, "paper-table1": 240, "paper-table2": 20, "paper-table4": 240, "paper-table5": 80, "learning-rate": 180}
    suite = read_suite(path)
    assert len(suite.cells) == (runs | {"embeddings": 80})[path.stem]
    assert len({cell.name for cell in suite.cells}) == len(suite.cells)
    assert suite.description


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"shedules": {}}, r"shedules: unknown key; allowed: description, .*did you mean 'schedules'"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"seeds": ["1"]}, "seeds.0"),
        ({"files": ["x/*.json"], "tasks": {"a": {}}}, "files: given beside tasks"),
        ({"files": ["x/*.json"]}, r"files: 'x/\*.json' fits no file below"),
        ({"leave_out": [{"task": "a"}], "tasks": {"a": {}}}, "'task' is none of tasks; did you mean 'tasks'"),
        ({"leave_out": [{"tasks": "aa"}], "tasks": {"a": {}, "ab": {}}}, "'aa' is none of tasks: a, ab"),
        ({"leave_out": [{"tasks": "a"}], "tasks": {"a": {}}}, "nothing is left to run"),
        ({"seeds": list(range(10_001))}, "10001 runs; at most 10000"),
        ({"compare": {"score": "first"}}, "compare.score"),
        ({"compare": {"scores": "best"}}, "compare.scores: unknown key; allowed: reference, score, metric"),
        (
            {"schedules": {"a": {"schedule": {"nam": "none"}}}},
            r"schedule.nam: unknown key \(from .*mine.json\); did you mean 'name'",
        ),
        (
            {"schedules": {"a": {"schedule": {"name": "progtunning"}}, "b": {}}, "seeds": [1, 2]},
            r"did you mean 'progtuning'.*\(in a-s1, a-s2\)",
        ),
        ({"include": ["nowhere.json"]}, "nowhere.json"),
        ({"files": ["/x/*.json"]}, "is no pattern of files relative to"),
        ({"files": [""]}, "is no pattern of files"),
        ({"set": {"run.seed": 3}}, "run.seed: a suite gives it to its runs itself: by seeds"),
        ({"tasks": {"a/b": {}, "a b": {}}}, "2 runs would be called 'a-b-s42'"),
    ],
)
def test_mistakes(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, **content)


@pytest.mark.parametrize(("text", "says"), [("{", "is no JSON"), ("[]", "holds no JSON object"), (None, "cannot be read")])
def test_no_suite(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_suite(path)


@pytest.mark.parametrize(
    ("is_own", "finished", "state"),
    [(True, True, "finished"), (True, False, "begun"), (False, True, "other"), (None, True, "missing")],
)
def test_how_far_a_run_is(tmp_path: Path, is_own: bool | None, finished: bool, state: State) -> None:
    from progscale.config import config_hash

    (cell,) = read(tmp_path).cells
    if is_own is not None:
        write_run(cell.folder, finished=finished)
        content = json.loads((cell.folder / "config.json").read_text())
        content["hash"] = config_hash(cell.config) if is_own else "another"
        (cell.folder / "config.json").write_text(json.dumps(content))
    assert state_of(cell) == state


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_folder_is_no_run_of_ours(tmp_path: Path, content: str) -> None:
    (cell,) = read(tmp_path).cells
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json").write_text(content)
    assert state_of(cell) == "other"


def test_a_file_that_two_patterns_fit_is_one_run(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert [cell.name for cell in read(tmp_path, files=["x.json", "?.json"]).cells] == ["x-s42"]


@pytest.mark.parametrize("text", ["run.name=x", "run.output_dir=x", "run.seed=4"])
def test_what_a_suite_gives_its_runs_itself(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="a suite gives it to its runs itself"):
        read(tmp_path, text)
