"""Runs of a suite on this machine: spread, failing, stopped, and taken up again. The runs are small programs, or the demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from progscale.cli import main
from progscale.cli.suites import gpus_of
from progscale.errors import PreemptedError, UserError
from progscale.signals import Signals
from progscale.suite import local, read_suite, run_cells
from progscale.suite.local import command_of, places
from tests.harness.programs import REPOSITORY


def suite_in(folder: Path, runs: int = 3):
    path = folder / "mine.json"
    path.write_text(json.dumps({"seeds": list(range(1, runs + 1))}))
    return read_suite(path, folder=folder / "out")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Each run is a program that notes when it begins and ends, on which GPUs, and what signal it got."""
    program = """
import os, signal, sys, time
name, notes = sys.argv[1:]
def note(*words): open(notes, "a").write(" ".join(map(str, (name, *words))) + "\\n")
def stop(*_): note("stopped"); time.sleep(0.3); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
note("begun", time.monotonic(), os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
print("step 3/9  stage 1", flush=True)
time.sleep(60 if name.endswith("s9") else 0.4)
note("ended", time.monotonic())
sys.exit(3 if name.endswith("s2") else 0)
"""
    notes = tmp_path / "notes"
    monkeypatch.setattr(local, "command_of", lambda cell, *_: [sys.executable, "-c", program, cell.name, str(notes)])
    monkeypatch.setattr(local, "POLL_SECONDS", 0.02)
    return notes


def times(notes: Path) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for line in notes.read_text().splitlines():
        name, what, *rest = line.split()
        found.setdefault(name, {})[what] = rest
    return found


def test_one_after_the_other_and_one_that_fails_stops_none(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = suite_in(tmp_path)
    outcome = run_cells(suite, suite.cells, signals=Signals())
    assert outcome.failed == {"run-s2": 3}
    found = times(programs)
    assert list(found) == ["run-s1", "run-s2", "run-s3"]
    assert float(found["run-s2"]["begun"][0]) > float(found["run-s1"]["ended"][0])
    shown = capsys.readouterr()
    assert "done: run-s1 in" in shown.out
    assert "(1 of 3, about" in shown.out
    assert "failed: run-s2, exit code 3" in shown.err
    assert "step 3/9  stage 1" in shown.err
    assert "step 3/9" in (suite.folder / "logs" / "run-s3.log").read_text()


def test_spread_over_gpus(programs: Path, tmp_path: Path) -> None:
    suite = suite_in(tmp_path, runs=4)
    run_cells(suite, suite.cells, signals=Signals(), gpus=["0", "1", "2", "3"], processes=2)
    found = times(programs)
    assert {entry["begun"][1] for entry in found.values()} == {"0,1", "2,3"}
    begun = sorted(float(entry["begun"][0]) for entry in found.values())
    ended = sorted(float(entry["ended"][0]) for entry in found.values())
    assert begun[1] < ended[0], "two at a time"
    assert begun[2] >= ended[0], "and no more"


def test_told_to_stop_the_runs_are_told_and_waited_for(programs: Path, tmp_path: Path) -> None:
    suite = suite_in(tmp_path, runs=9)
    signals = Signals()
    threading.Timer(0.5, lambda: setattr(signals, "received", "SIGTERM")).start()
    with pytest.raises(PreemptedError, match="told to stop: 0 of 1 runs are done"):
        run_cells(suite, [suite.cells[8]], signals=signals)
    assert "stopped" in times(programs)["run-s9"]


def test_places() -> None:
    assert [worker.gpus for worker in places(3, [], 1)] == [None] * 3
    shares = [worker.cores for worker in places(2, [], 1)]
    if os.cpu_count() and len(os.sched_getaffinity(0)) > 1:
        assert shares[0] and shares[1]
        assert not shares[0] & shares[1]
    assert [worker.cores for worker in places(1, [], 1)] == [None]
    assert [worker.gpus for worker in places(1, ["4", "5", "6"], 2)] == ["4,5"]
    with pytest.raises(UserError, match="--gpus: 1 GPUs for runs of 2 processes"):
        places(1, ["0"], 2)


def test_the_command_is_that_of_a_run_by_hand(tmp_path: Path) -> None:
    (cell,) = suite_in(tmp_path, runs=1).cells
    alone = command_of(cell, 1, ["--allow-pickle"])
    assert alone[1:] == ["-m", "progscale", "train", "--config", str(cell.file), "--resume", "auto", "--allow-pickle"]
    assert command_of(cell, 2, [])[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(("text", "names"), [("0,1", ["0", "1"]), (" 2 , 3 ", ["2", "3"])])
def test_gpus_by_name(text: str, names: list[str]) -> None:
    assert gpus_of(text) == names


@pytest.mark.parametrize("text", ["", "0,,1", "0,0"])
def test_no_list_of_gpus(text: str) -> None:
    with pytest.raises(UserError, match="is no list of GPUs"):
        gpus_of(text)


def test_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus_of(None) == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus_of(None) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setitem(os.environ, "PATH", "/nowhere")
    assert isinstance(gpus_of(None), list)


SMALL = {
    "description": "Three ways of the demo.",
    "set": {
        "task.max_train_examples": 64,
        "task.max_eval_examples": 32,
        "train.epochs": 2,
        "model.overrides": {"num_hidden_layers": 2},
    },
    "schedules": {"none": {"schedule": {"name": "none"}}, "progtuning": {}},
    "seeds": [1, 2],
}


def test_a_suite_from_the_command_to_the_comparison(tmp_path: Path) -> None:
    """Stopped in the middle, taken up again; then nothing is left to run, and the comparison is made anew."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    command = [sys.executable, "-m", "progscale", "suite", "small.json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summaries = tmp_path / "runs" / "suites" / "small" / "runs"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(summaries.glob("*/summary.json")):
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 75, text
    assert "the same command goes on" in text
    ended = {path.parent.name: path.stat().st_mtime_ns for path in summaries.glob("*/summary.json")}
    assert 1 <= len(ended) < 4
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    for name, when in ended.items():
        assert (summaries / name / "summary.json").stat().st_mtime_ns == when, "a finished run was run again"
    assert "demo (accuracy), demo encoder" in second.stdout
    folder = summaries.parent
    assert {path.name for path in folder.iterdir()} >= {"compare.html", "compare.md", "compare.tex", "compare.json", "runs.csv"}
    content = json.loads((folder / "compare.json").read_text())
    assert [sorted(arm["scores"]) for arm in content["groups"][0]["arms"]] == [["1", "2"]] * 2
    third = subprocess.run([*command, "--dry-run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "4 runs in runs/suites/small: 4 finished" in third.stdout


def test_another_config_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    suite = read_suite(path, folder=tmp_path / "out")
    suite.cells[0].folder.mkdir(parents=True)
    (suite.cells[0].folder / "config.json").write_text('{"hash": "another"}')
    assert main(["suite", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "holds a run of another config; move the folder away, or choose another with --output" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "says"), [("--workers", "--workers: 0"), ("--processes", "--processes: 0")])
def test_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, says: str) -> None:
    assert main(["suite", "x.json", option, "0"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--workers", "2"], "--workers: for runs on this machine; with --slurm give --gpus-per-node"),
        (["--gpus", "0"], "--gpus: for runs on this machine"),
        (["--output", "my runs"], "--output: 'my runs' has a space"),
    ],
)
def test_what_is_for_this_machine_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert main(["suite", str(tmp_path / "x.json"), "--slurm", *options]) == 2
    assert says in capsys.readouterr().err
