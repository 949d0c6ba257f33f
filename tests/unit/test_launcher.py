"""What a launcher says of the ranks, and what becomes of a rank whose launcher or whose peers are gone."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from progscale import launcher
from progscale.errors import LaunchError
from progscale.launcher import Ranks, keeps_store, lacks_ranks, read_ranks, try_port
from tests.harness.programs import REPOSITORY

SECOND = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a-node",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "a-node", "MASTER_PORT": "1"}])
def test_started_by_hand(environment: dict[str, str]) -> None:
    assert read_ranks(environment) == Ranks(1, 1, None)


def test_started_by_a_launcher() -> None:
    assert read_ranks(SECOND) == Ranks(4, 2, 1)


def test_deepspeeds_launcher_tells_no_local_world_size() -> None:
    alone = {key: value for key, value in SECOND.items() if key != "LOCAL_WORLD_SIZE"}
    assert read_ranks(alone) == Ranks(4, 1, 1)
    assert read_ranks({**alone, "LOCAL_SIZE": "2"}) == Ranks(4, 2, 1), "DeepSpeed's launcher has its own name for it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "a launcher's variables are set, but not RANK; unset them, or start with launch/launch.sh"),
        ({"RANK": None, "LOCAL_RANK": None}, "but not RANK, LOCAL_RANK;"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "but not MASTER_ADDR, MASTER_PORT;"),
        ({"RANK": "-1"}, "RANK: '-1' is no number"),
        ({"RANK": "4"}, "RANK: 4 is not below WORLD_SIZE, 4"),
        ({"LOCAL_RANK": "9"}, "LOCAL_RANK: 9 is not below WORLD_SIZE, 4"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE: 'four' is no number"),
        ({"WORLD_SIZE": "0"}, "RANK: 1 is not below WORLD_SIZE, 0"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: '0' is no number of processes, from 1"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE: 8 is more than WORLD_SIZE, 4"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: 99999 is no port, which ends at 65535"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: '' is no number"),
    ],
)
def test_variables_that_do_not_fit(changes: dict[str, str | None], message: str) -> None:
    environment = {key: value for key, value in {**SECOND, **changes}.items() if value is not None}
    with pytest.raises(LaunchError, match=re.escape(message)):
        read_ranks(environment)


def test_who_opens_the_port() -> None:
    assert keeps_store({"RANK": "0"})
    assert not keeps_store({"RANK": "1"})
    assert not keeps_store({"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not keeps_store({})


def test_a_port_in_use() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            try_port(port)
    try_port(port)


# -- when another rank is gone --------------------------------------------------------------------------------------


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that this one started, as a launcher does."""
    environment = {**os.environ, "LOCAL_RANK": "0"}
    made = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment) for _ in range(2)]
    yield made
    for process in made:
        process.kill()
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
@pytest.mark.parametrize("reaped", [False, True])
def test_a_rank_that_is_gone(monkeypatch: pytest.MonkeyPatch, ranks: list[subprocess.Popen[bytes]], reaped: bool) -> None:
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert not lacks_ranks(os.getpid(), {"LOCAL_WORLD_SIZE": "2"})
    ranks[0].kill()
    wait_until(lambda: not is_alive(ranks[0].pid))
    if reaped:
        ranks[0].wait()
    assert lacks_ranks(os.getpid(), {"LOCAL_WORLD_SIZE": "2"})
    assert not lacks_ranks(os.getpid(), {"LOCAL_WORLD_SIZE": "1"})
    assert not lacks_ranks(os.getpid(), {"LOCAL_WORLD_SIZE": "two"})
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not lacks_ranks(os.getpid(), {"LOCAL_WORLD_SIZE": "2"}), "the launcher itself is gone"


# -- when the launcher dies -----------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys, time
from progscale.launcher import follow
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0 if os.getppid() != launcher else 1))
launcher = os.getppid()
follow()
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(30)
"""
LAUNCHER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]]); time.sleep(30)"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
@pytest.mark.parametrize(
    "environment",
    [{"TORCHELASTIC_RUN_ID": "none"}, {"ACCELERATE_MIXED_PRECISION": "no"}, {}],
    ids=["torchrun", "accelerate", "none"],
)
def test_a_launcher_that_is_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    """Its worker is told, though nobody could pass anything on; a shell that closes ends nothing."""
    file = tmp_path / "worker"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "ACCELERATE"))}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, str(file)], env={**inherited, **environment, "PYTHONPATH": str(REPOSITORY)}
    )
    wait_until(lambda: file.exists() and file.stat().st_size > 0, 30)
    worker = int(Path(file).read_text())
    launcher.kill()
    launcher.wait()
    try:
        if environment:
            wait_until(lambda: not is_alive(worker))
        else:
            time.sleep(0.3)
            assert is_alive(worker)
    finally:
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_system_without_that_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no prctl."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    launcher.follow()
