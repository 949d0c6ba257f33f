"""A rank that stands still ends the run in time, and the message says which and where; nothing is left of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness.interrupted import Runs, twelve
from tests.harness.launches import Launch

# How much longer than engine.timeout_seconds the end may take.
GRACE_SECONDS = 60.0
STACK = "most recent call first"


def message_of(err: str, rank: int) -> str:
    """Why the run ends, as a rank says it."""
    found = re.search(rf"progscale: \[rank {rank}\] the run ends: (.*)", err)
    assert found is not None, err
    return found[1]


def test_a_stopped_rank(runs: Runs, tmp_path: Path) -> None:
    """SIGSTOP, as a debugger or a frozen container does it; the other rank waits in the gradient's all-reduce."""
    ended = runs.train(tmp_path, "ddp", fault="stop@step=4,rank=1", engine__timeout_seconds=8, seconds=8 + GRACE_SECONDS)
    assert not ended[0].timed_out
    assert [rank.code for rank in ended] == [1, -9]
    message = message_of(ended[0].err, 0)
    assert message.startswith("no progress for 8 s (engine.timeout_seconds); stopped by a signal: rank 1 (last seen: ")
    assert STACK in ended[0].err
    assert "in train_step" in ended[0].err, "where rank 0 waits"


def launched_hang(folder: Path, cache: Path, engine: str, timeout: int, fault: str = "", plugins: Sequence[str] = ()) -> str:
    """What a launch of two ranks said that hung, with the launcher ready to wait for them for 600 s."""
    arguments = twelve(folder, engine, engine__timeout_seconds=timeout)
    arguments += [word for plugin in plugins for word in ("--plugin", plugin)]
    with Launch(folder, arguments, ranks=2, cache=cache, fault=fault) as launch:
        launch.wait_until(lambda: "injected on rank" in launch.err)
        finished = launch.finish(timeout + GRACE_SECONDS)
    assert finished.left == (), f"still there after {finished.seconds:.0f} s\n{finished.err}"
    assert finished.code == 1
    assert finished.seconds > 0.8 * timeout, "it was given its time"
    return finished.err


@pytest.mark.slow
def test_a_stopped_rank_under_the_launcher(runs: Runs, tmp_path: Path, cache: Path) -> None:
    """It hears no SIGTERM, so that the launcher would wait for it."""
    err = launched_hang(tmp_path, cache, "zero2", 20, fault="stop@step=4,rank=1")
    message = message_of(err, 0)
    assert message.startswith("no progress for 20 s (engine.timeout_seconds); stopped by a signal: rank 1 (last seen: ")
    assert STACK in err
    runs.finish(tmp_path, "zero2")


@pytest.mark.slow
def test_a_loader_that_hangs_on_one_rank(runs: Runs, tmp_path: Path, cache: Path) -> None:
    err = launched_hang(tmp_path, cache, "ddp", 20, fault="sleep@loader=5,rank=1,seconds=600")
    assert "no progress for 20 s (engine.timeout_seconds); behind the others: rank 1 (step 3)" in message_of(err, 1)
    for rank in range(2):
        assert f"[rank {rank}] stands here" in err
    assert STACK in err
    assert re.search(r"data\.py.* in epoch", err), "where the loader stands"
    runs.finish(tmp_path, "ddp")


@pytest.mark.slow
def test_a_rank_that_runs_no_python(runs: Runs, tmp_path: Path, cache: Path) -> None:
    """A deadlock in compiled code that holds the interpreter: it answers to no signal but SIGKILL."""
    err = launched_hang(tmp_path, cache, "ddp", 10, plugins=["tests.harness.deaf"])
    assert "no progress for 10 s" in message_of(err, 0)
    runs.finish(tmp_path, "ddp")


@pytest.mark.slow
def test_a_loader_that_hangs_alone(runs: Runs, tmp_path: Path) -> None:
    (ended,) = runs.train(tmp_path, fault="sleep@loader=5,seconds=600", engine__timeout_seconds=20, seconds=20 + GRACE_SECONDS)
    assert (ended.timed_out, ended.code) == (False, 1)
    assert message_of(ended.err, 0) == "no progress for 20 s (engine.timeout_seconds) while step 3"
    assert STACK in ended.err
    runs.finish(tmp_path)


@pytest.mark.slow
def test_a_loader_process_that_hangs(runs: Runs, tmp_path: Path) -> None:
    """The fault is in a process of the loader; the rank waits for its batch."""
    changes: dict[str, Any] = {"train__num_workers": 2}
    (ended,) = runs.train(
        tmp_path, fault="sleep@loader=2,seconds=600", engine__timeout_seconds=8, seconds=8 + GRACE_SECONDS, **changes
    )
    assert (ended.timed_out, ended.code) == (False, 1)
    assert "no progress for 8 s (engine.timeout_seconds) while" in message_of(ended.err, 0)
    assert STACK in ended.err
    runs.finish(tmp_path, engine__timeout_seconds=8, **changes)


@pytest.mark.slow
def test_the_right_rank_is_named_after_a_slow_background_save(runs: Runs, tmp_path: Path) -> None:
    """Rank 0 alone waited for its files before it went on; later it alone hangs."""
    ended = runs.train(
        tmp_path,
        "ddp",
        fault="sleep@save=1,rank=0,seconds=3;sleep@loader=9,rank=0,seconds=600",
        checkpoint__background=True,
        engine__timeout_seconds=8,
        seconds=8 + GRACE_SECONDS,
    )
    assert [rank.code for rank in ended] == [1, 1]
    for rank in ended:
        assert "behind the others: rank 0 (step 7)" in rank.err
