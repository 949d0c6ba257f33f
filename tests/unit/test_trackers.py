"""The run folder never overwrites anything, and what it writes is whole; the console is quiet on other ranks."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from progscale.data import MicroBatch
from progscale.errors import ConfigError
from progscale.trackers import RunConsole, RunFolder, score_line, stage_table

CONFIG = {"run": {"name": "a"}}


def claim(path: Path, digest: str = "one") -> RunFolder:
    return RunFolder(path, CONFIG, digest)


def refused(path: Path, digest: str = "one") -> str:
    before = sorted((file, file.read_bytes()) for file in path.parent.rglob("*") if file.is_file())
    with pytest.raises(ConfigError) as caught:
        claim(path, digest)
    assert caught.value.exit_code == 2
    assert sorted((file, file.read_bytes()) for file in path.parent.rglob("*") if file.is_file()) == before
    return str(caught.value)


def test_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "ä run"
    folder = claim(path)
    folder.record("step", step=1, loss=0.5)
    folder.record("evaluation", accuracy=1.0)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "evaluation"], "each record is on disk at once"
    assert lines[0]["loss"] == 0.5
    assert lines[0]["time"] <= lines[1]["time"]
    folder.write("summary.json", {"x": [1, 2]})
    folder.close()
    assert json.loads((path / "summary.json").read_text()) == {"x": [1, 2]}
    assert json.loads((path / "config.json").read_text()) == {"hash": "one", **CONFIG}
    assert not list(path.glob("*.partial"))


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    claim(tmp_path / "a").close()
    assert (tmp_path / "a" / "config.json").exists()


def test_the_same_run_again_moves_the_old_one_aside(tmp_path: Path) -> None:
    for index in range(3):
        folder = claim(tmp_path / "a")
        folder.record("step", run=index)
        folder.close()
    runs = {path.name: json.loads((path / "metrics.jsonl").read_text())["run"] for path in tmp_path.iterdir()}
    assert runs == {"a.1": 0, "a.2": 1, "a": 2}


def test_numbers_that_no_json_has(tmp_path: Path) -> None:
    folder = claim(tmp_path / "a")
    folder.record("step", loss=float("nan"), grad_norm=float("inf"), rates=[1.0, float("-inf")])
    folder.write("summary.json", {"metrics": {"pearson": float("nan"), "n": 3}})
    folder.close()
    line = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1]
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["grad_norm"], found["rates"]) == (None, None, [1.0, None])
    summary = json.loads((tmp_path / "a" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == {"metrics": {"pearson": None, "n": 3}}


def test_another_run_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "a").close()
    message = refused(tmp_path / "a", "two")
    assert "run.name: " in message
    assert "holds a run of another config; choose another with --set run.name=…" in message


def test_a_name_that_nobody_chose_makes_room(tmp_path: Path) -> None:
    claim(tmp_path / "a").close()
    folder = RunFolder(tmp_path / "a", CONFIG, "two", named=False)
    folder.close()
    assert folder.moved == tmp_path / "a.1"
    assert json.loads((tmp_path / "a.1" / "config.json").read_text())["hash"] == "one"
    assert json.loads((tmp_path / "a" / "config.json").read_text())["hash"] == "two"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"holds a config\.json that is not a run's"):
        RunFolder(tmp_path / "b", CONFIG, "two", named=False)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    assert "exists and is no run folder; choose another with --set run.name=…" in refused(tmp_path / "a")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\udcff"])
def test_a_damaged_config_in_the_folder_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "choose another with --set run.name=…" in refused(tmp_path / "a")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where a folder is needed; permissions do not stop the user root."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        message = refused(path)
        assert "run.output_dir: " in message
        assert "cannot be written (" in message
        assert "choose another with --set run.output_dir=…" in message


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.discarded.jsonl", "config.json.partial", "summary.json", ".lock"])
def test_links_are_not_written_through(tmp_path: Path, name: str) -> None:
    """Whoever sent the run folder chose where they lead."""
    claim(tmp_path / "a").close()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "a" / name).symlink_to(victim)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}' is a link, and a run would write through it"):
        RunFolder(tmp_path / "a", {"seed": 1}, "one", resume_bytes=0)
    assert victim.read_text() == "precious"


def test_a_disk_that_was_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start needs no tidying up, whether the process could do so itself or was killed."""

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ConfigError, match="cannot be written \\(No space left on device\\)"):
            claim(tmp_path / "a")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == [".lock"]
    for left in ("config.json.partial", ".PREEMPTED.4711", "PREEMPTED"):
        (tmp_path / "a" / left).write_text("{")
    claim(tmp_path / "a").close()


def test_records_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Said once; what could be written of a line is not written again."""
    folder = claim(tmp_path / "a")
    file, room = folder._metrics, [5]

    class Full:
        name = file.name

        def write(self, content: bytes) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = min(room[0], len(content))
            room[0] -= written
            return file.write(content[:written])

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    monkeypatch.setattr(folder, "_metrics", Full())
    with caplog.at_level(logging.WARNING, "progscale"):
        folder.record("step", step=1)
        folder.record("step", step=2)
    assert caplog.text.count("cannot be written (No space left on device): records are kept until it can") == 1
    assert folder.sync() == 5
    room[0] = 10**6
    folder.record("step", step=3)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    room[0] = 0
    folder.record("step", step=4)
    with caplog.at_level(logging.WARNING, "progscale"):
        folder.close()
    assert "bytes of records are lost" in caplog.text


def test_the_console_of_another_rank_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for is_main in (False, True):
        console = RunConsole(is_main)
        console.show("the plan")
        console.begin(3)
        for step in range(3):
            console.step(step, 1, 0.25, 1e-4)
        console.end()
        shown = capsys.readouterr().out
        assert shown == "" if not is_main else "the plan" in shown
    lines = shown.splitlines()
    assert "step 3/3  stage 1  loss 0.2500  lr 1.00e-04" in lines[-1]
    assert len(lines) <= 3, "plain lines come seldom where there is no terminal, the last one always"


def test_only_the_main_process_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar takes over stderr, and a quiet one would swallow a traceback."""
    for is_main in (False, True):
        console = RunConsole(is_main)
        monkeypatch.setattr(console, "_console", Console(file=io.StringIO(), quiet=not is_main, force_terminal=True))
        before = sys.stderr
        console.begin(3)
        assert (sys.stderr is before) == (not is_main)
        console.end()
        assert sys.stderr is before


def test_an_evaluation_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    batches = [MicroBatch({}, {}, np.arange(2)) for _ in range(3)]
    console = RunConsole(True, line_seconds=0.0)
    assert list(console.track(batches, rows=11, world_size=2)) == batches
    assert capsys.readouterr().out.splitlines() == [f"evaluation: {rows}/11 rows" for rows in (4, 8, 11)]
    RunConsole(False, line_seconds=0.0).track(batches, rows=11, world_size=2)
    assert capsys.readouterr().out == ""


def entry(**changes: Any) -> dict[str, Any]:
    keys = ("updated_parameters", "planned_updated_parameters", "peak_memory_bytes", "optimizer_state_bytes")
    seconds = ("train_seconds", "switch_seconds", "audit_seconds", "samples_per_second", "tokens_per_second")
    return {"stage": 1, "first_block": 4, **dict.fromkeys((*keys, *seconds), 1_234_000), "frozen_changed": 0, **changes}


def test_the_table_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    RunConsole(True).show(stage_table([entry(), entry(stage=2, first_block={"encoder": 1, "decoder": 2})]))
    shown = capsys.readouterr().out
    assert "What each stage did" in shown
    assert shown.count("1.23") >= 4
    assert score_line("validation", {"accuracy": 0.5, "f1": 1.0}) == "validation: accuracy 0.5000  f1 1.0000"
