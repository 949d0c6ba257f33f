"""One process in a run's folder: on one machine by a lock, between machines by a number that grows."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progscale import owner
from progscale.errors import ConfigError
from progscale.owner import OWNER, hold
from tests.harness.programs import REPOSITORY


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute in a second."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(owner, "WAIT_SECONDS", 1.0)


def of_another_machine(folder: Path, **changes: object) -> None:
    """What a process of another machine has left."""
    content = {"token": "x", "beat": 7, "machine": "other", "host": "node7", "job": "41", "process": 5, **changes}
    (folder / OWNER).write_text(json.dumps(content))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder, as on another machine: its lock is not seen here."""
    program = """
import sys, time
from pathlib import Path
from progscale import owner
owner.BEAT_SECONDS = 0.1
owner.machine = lambda: "other"
owner._lock = lambda folder: None
held = owner.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
held.release()
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SLURM_JOB_ID": "41", "SLURMD_NODENAME": "node7"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(30)


def test_a_folder_is_let_go_without_a_trace(tmp_path: Path) -> None:
    held = hold(tmp_path)
    assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()
    held.release()
    held.release()
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


def test_the_number_grows(tmp_path: Path) -> None:
    held = hold(tmp_path)
    time.sleep(0.5)
    assert json.loads((tmp_path / OWNER).read_text())["beat"] > 1
    held.release()
    time.sleep(0.3)
    assert not (tmp_path / OWNER).exists()


def test_a_process_on_another_machine_is_seen(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(ConfigError, match=f"process {other.pid} on node7 of job 41 is at work in"):
        hold(tmp_path)
    # What it holds is still its own.
    assert json.loads((tmp_path / OWNER).read_text())["process"] == other.pid
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.wait(30) == 0
    begin = time.monotonic()
    hold(tmp_path).release()
    assert time.monotonic() - begin < 0.5, "it left in order: there is nothing to wait for"


def test_a_process_that_died_on_another_machine_is_not(
    tmp_path: Path, other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    other.kill()
    other.wait(30)
    held = hold(tmp_path)
    assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()
    held.release()
    assert f"{tmp_path} was node7's: looking for 1 s whether that is still at work" in caplog.text


def test_what_this_machine_left_needs_no_waiting(tmp_path: Path) -> None:
    """The lock says that its process has ended."""
    of_another_machine(tmp_path, machine=owner.machine())
    begin = time.monotonic()
    hold(tmp_path).release()
    assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"beat": 1}'])
def test_a_file_that_nobody_can_read_is_waited_for_too(tmp_path: Path, content: str) -> None:
    (tmp_path / OWNER).write_text(content)
    begin = time.monotonic()
    hold(tmp_path).release()
    assert time.monotonic() - begin > 0.9


def test_a_folder_that_was_taken_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a process that stood still for long (SIGSTOP, a suspended job): two would write there."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    held = hold(tmp_path)
    of_another_machine(tmp_path)
    time.sleep(0.4)
    held.release()
    assert codes == [1]
    assert f"another process has taken '{tmp_path}' while this one stood still" in capsys.readouterr().err
    assert json.loads((tmp_path / OWNER).read_text())["host"] == "node7"


def test_a_file_server_that_is_away_for_a_while_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, load, away = hold(tmp_path), owner.Hold._load, [True]

    def failing(self: owner.Hold) -> Any:
        if away[0]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return load(self)

    monkeypatch.setattr(owner.Hold, "_load", failing)
    time.sleep(0.4)
    before = json.loads((tmp_path / OWNER).read_text())["beat"]
    (tmp_path / OWNER).write_text("{")  # half of what was written
    away[0] = False
    time.sleep(0.3)
    (tmp_path / OWNER).write_text(json.dumps({"token": held._token}))
    time.sleep(0.4)
    assert json.loads((tmp_path / OWNER).read_text())["beat"] > before
    held.release()


def test_of_two_that_take_a_folder_at_once_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have waited for the same dead process, and the other one writes last."""
    of_another_machine(tmp_path)
    write = owner.Hold._write

    def overtaken(self: owner.Hold) -> None:
        write(self)
        of_another_machine(tmp_path, token="another's", host="node9")

    monkeypatch.setattr(owner.Hold, "_write", overtaken)
    with pytest.raises(ConfigError, match=r"on node9 .*is at work in"):
        hold(tmp_path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number alone has to do, on this machine too."""

    def missing(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    held = hold(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is at work in"):
        hold(tmp_path)
    held.release()
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


def test_a_forked_process_holds_no_lock(tmp_path: Path) -> None:
    """A loader's process lives on for seconds when its run is killed."""
    held = hold(tmp_path)
    begun, begin = os.pipe()
    child = os.fork()
    if not child:
        os.write(begin, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(begun, 1)
        with pytest.raises(ConfigError, match="another process is at work"):
            hold(tmp_path)
        held.release()
        hold(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
