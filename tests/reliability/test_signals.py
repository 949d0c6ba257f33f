"""Told to stop, wherever it stands, a run saves the step it has reached, leaves word, and goes on later as if never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.evidence import checkpoints, step_of
from tests.harness.forks import Ended
from tests.harness.interrupted import Runs, ranks_of, twelve
from tests.harness.launches import Finished, Launch
from tests.harness.programs import records

TERM, USR1 = "SIGTERM", "SIGUSR1"
ACTIONS = {TERM: "term", USR1: "usr1"}
# Phase → the point of tests.harness.inject where the signal is sent.
PHASES = {
    "training": "step=4",
    "evaluating": "evaluation=2",
    "saving": "save=1",
    "preparing": "tokenize=1",
    "switching": "switch=2",
}


@dataclass(frozen=True)
class Case:
    """A signal.

    Attributes:
        name: of the signal.
        phase: a key of PHASES.
        engine: plain (one process), ddp or zero2.
        to: whom it is sent to: the launcher, the launcher twice, or one worker alone.
    """

    name: str
    phase: str
    engine: str
    to: str = "launcher"

    def __str__(self) -> str:
        return f"{self.name}-{self.phase}-{self.engine}-{self.to.replace(' ', '_')}"

    @property
    def fault(self) -> str:
        """As PROGSCALE_FAULT. Whichever rank tokenises, the others wait for it."""
        action = ACTIONS[self.name] + ("" if self.to == "worker" else "parent")
        rank = "*" if self.phase == "preparing" else str(int(self.to == "worker"))
        return f"{action}@{PHASES[self.phase]},rank={rank}"

    @property
    def told(self) -> str | None:
        """What the marker says: the signal as the main process got it."""
        if self.engine == "plain":
            return TERM  # the kernel's word that the launcher is gone: it forwards nothing
        return None if self.to == "worker" else self.name


def marker(folder: Path) -> dict[str, Any]:
    """PREEMPTED of a run folder."""
    content: dict[str, Any] = json.loads((folder / "PREEMPTED").read_text())
    assert content.keys() == {"step", "signal", "time"}
    return content


def saved_where_it_stood(folder: Path, ranks: int) -> int:
    """The step that a run was stopped at, once it is shown that none is lost."""
    reached = records(folder, "step")[-1]["step"]
    last = checkpoints(folder)[-1]
    assert step_of(last) == reached == records(folder, "stopped")[-1]["step"] == marker(folder)["step"]
    assert {path.name[:9] for path in last.glob("*.safetensors")} == {f"rank{rank:05d}" for rank in range(ranks)}
    assert not list((folder / "checkpoints").glob(".tmp*"))
    return int(reached)


def preempted(case: Case, folder: Path, cache: Path, **options: Any) -> Finished:
    """Launches and signals; every worker leaves with 75, and nothing of the launch is left."""
    ranks = ranks_of(case.engine)
    arguments = [*twelve(folder, case.engine), "--resume", "auto"]
    with Launch(folder, arguments, ranks=ranks, cache=cache, fault=case.fault, **options) as launch:
        if case.to == "launcher twice":
            launch.wait_until(lambda: "injected on rank" in launch.err)
            time.sleep(0.5)
            if launch.process.poll() is None:
                launch.signal(getattr(signal, case.name))
        finished = launch.finish()
    assert finished.left == ()
    assert finished.exits == dict.fromkeys(range(ranks), 75), finished.err
    assert finished.code != 0
    return finished


def preempted_and_resumed(runs: Runs, case: Case, folder: Path, cache: Path) -> None:
    """Nothing is lost by the signal, and the resumed run computes the bits of one that was never stopped."""
    slow = 1.5 if case.phase == "saving" or case.to == "launcher twice" else 0.0
    if case.phase == "preparing":
        cache = folder / "cache"
    finished = preempted(case, folder, cache, slow_save_seconds=slow)
    if case.phase == "preparing":
        assert marker(folder / "a")["step"] is None
        assert not (folder / "a" / "checkpoints").exists()
        assert "before training began: nothing is lost" in finished.err
    else:
        assert 0 < saved_where_it_stood(folder / "a", ranks_of(case.engine)) < 12
        assert marker(folder / "a")["signal"] == case.told
        assert "progscale: told to stop: saved after step" in finished.err
    runs.finish(folder, case.engine)
    assert not (folder / "a" / "PREEMPTED").exists()


@pytest.mark.parametrize("case", [Case(TERM, "training", "plain"), Case(USR1, "evaluating", "ddp")], ids=str)
def test_a_signal_to_the_launcher(runs: Runs, tmp_path: Path, cache: Path, case: Case) -> None:
    preempted_and_resumed(runs, case, tmp_path, cache)


@pytest.mark.slow
@pytest.mark.parametrize("phase", list(PHASES))
@pytest.mark.parametrize(
    ("name", "engine", "to"),
    [
        (TERM, "plain", "launcher"),
        (USR1, "plain", "launcher"),
        (TERM, "ddp", "launcher twice"),
        (USR1, "ddp", "launcher"),
        (TERM, "zero2", "launcher"),
        (USR1, "zero2", "worker"),
    ],
)
def test_a_signal_in_every_phase(runs: Runs, tmp_path: Path, cache: Path, name: str, engine: str, to: str, phase: str) -> None:
    preempted_and_resumed(runs, Case(name, phase, engine, to), tmp_path, cache)


@pytest.mark.slow
def test_a_save_of_45_seconds_comes_to_its_end(runs: Runs, tmp_path: Path, cache: Path) -> None:
    """The launcher kills what is left 30 s after a signal, unless it is told to wait."""
    started = time.monotonic()
    with Launch(
        tmp_path,
        twelve(tmp_path, "zero2"),
        ranks=2,
        cache=cache,
        fault="termparent@step=1,rank=0",
        slow_save_seconds=45,
    ) as launch:
        finished = launch.finish(180)
    assert time.monotonic() - started > 45
    assert finished.exits == {0: 75, 1: 75}, finished.err
    assert saved_where_it_stood(tmp_path / "a", 2) < 3
    runs.finish(tmp_path, "zero2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "zero3"])
def test_a_launcher_that_is_killed(runs: Runs, tmp_path: Path, cache: Path, engine: str) -> None:
    """It can tell nobody, and its store is gone; the kernel tells the workers, and they save."""
    ranks = ranks_of(engine)
    with Launch(tmp_path, twelve(tmp_path, engine), ranks=ranks, cache=cache, slow_save_seconds=0.5) as launch:
        launch.wait_for_record(tmp_path / "a", "step", step=4)
        launch.signal(signal.SIGKILL)
        finished = launch.finish()
    assert finished.left == ()
    assert finished.exits == dict.fromkeys(range(ranks), 75), finished.err
    saved_where_it_stood(tmp_path / "a", ranks)
    runs.finish(tmp_path, engine)


def exit_codes(ended: list[Ended]) -> list[int]:
    return [rank.code for rank in ended]


def test_a_signal_to_one_worker_stops_all(runs: Runs, tmp_path: Path) -> None:
    """They save the same step, though nobody told the others."""
    ended = runs.train(tmp_path, "ddp", fault="term@step=4,rank=1")
    assert exit_codes(ended) == [75, 75], ended[1].err
    assert saved_where_it_stood(tmp_path / "a", 2) == 5
    runs.finish(tmp_path, "ddp")


def test_a_signal_while_tokenising(runs: Runs, tmp_path: Path) -> None:
    """There is nothing to save; a script sees that the run wants to be started again."""
    (ended,) = runs.train(tmp_path, fault="term@tokenize=1", environment={"PROGSCALE_CACHE": str(tmp_path / "cache")})
    assert ended.code == 75, ended.err
    assert {"step": None, "signal": TERM}.items() <= marker(tmp_path / "a").items()
    assert ended.err.endswith("progscale: SIGTERM before training began: nothing is lost; start it again\n")
    runs.finish(tmp_path)


# -- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves(runs: Runs, tmp_path: Path) -> None:
    (ended,) = runs.train(tmp_path, fault="int@step=4")
    assert ended.code == 75, ended.err
    assert saved_where_it_stood(tmp_path / "a", 1) == 5
    assert marker(tmp_path / "a")["signal"] == "SIGINT"
    runs.finish(tmp_path)


def test_a_second_ctrl_c_leaves_at_once(runs: Runs, tmp_path: Path) -> None:
    """In the middle of the save that the first one began; what was saved before is enough to go on from."""
    (ended,) = runs.train(
        tmp_path, fault="int@step=4;sleep@midstep=4,seconds=1.5;int@save=2", slow_save_seconds=5, checkpoint__at_epochs=False
    )
    assert ended.code == 130, ended.err
    assert step_of(checkpoints(tmp_path / "a")[-1]) == 3
    runs.finish(tmp_path, checkpoint__at_epochs=False)


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_of_a_launch(runs: Runs, tmp_path: Path, cache: Path) -> None:
    """The terminal signals the launcher's process group."""
    with Launch(tmp_path, twelve(tmp_path, "ddp"), ranks=2, cache=cache, slow_save_seconds=1.0) as launch:
        launch.wait_for_record(tmp_path / "a", "step", step=4)
        os.killpg(launch.process.pid, signal.SIGINT)
        finished = launch.finish()
    assert finished.left == ()
    assert finished.exits == {0: 75, 1: 75}, finished.err
    saved_where_it_stood(tmp_path / "a", 2)
    runs.finish(tmp_path, "ddp")


# -- what is not the run's to decide ---------------------------------------------------------------------------------


def has_mapped_torch(process: int) -> bool:
    """Whether a process has begun to import torch."""
    try:
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "ddp"])
def test_a_signal_while_importing(runs: Runs, tmp_path: Path, cache: Path, engine: str) -> None:
    """In the first seconds of a launch; no worker may train on when its launcher is gone."""
    ranks = ranks_of(engine)
    with Launch(tmp_path, twelve(tmp_path, engine), ranks=ranks, cache=cache) as launch:
        launch.wait_until(lambda: len(launch.ranks()) == ranks and all(map(has_mapped_torch, launch.ranks().values())))
        launch.signal(signal.SIGTERM)
        finished = launch.finish()
    assert finished.exits == dict.fromkeys(range(ranks), 75)
    assert marker(tmp_path / "a")["step"] is None


@pytest.mark.slow
def test_a_rank_that_dies_while_preparing_is_no_preemption(tmp_path: Path, cache: Path) -> None:
    """Nobody told the run to stop; a script that starts preempted runs again must not do so here."""
    # One rank tokenises, slowly, and the other waits for it.
    fault = "sleep@tokenize=1,seconds=30"
    with Launch(tmp_path, twelve(tmp_path, "ddp"), ranks=2, cache=tmp_path / "cache", fault=fault) as launch:
        launch.wait_until(lambda: "injected on rank" in launch.err)
        found = re.search(r"injected on rank (\d)", launch.err)
        assert found is not None
        launch.signal(signal.SIGKILL, launch.ranks()[1 - int(found[1])])
        finished = launch.finish(60)
    assert finished.left == ()
    assert 75 not in finished.exits.values()
    assert not (tmp_path / "a" / "PREEMPTED").exists()
