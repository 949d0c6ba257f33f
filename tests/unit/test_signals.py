"""Being told to stop, in this very process: what a signal does before training and while training, and that it is all undone."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from progscale import run as run_module
from progscale import signals as module
from progscale.config import load_config
from progscale.errors import PreemptedError
from progscale.run import leave_at_once
from progscale.signals import Signals, before_training, follow_the_launcher
from tests.harness.programs import REPOSITORY

# The thread that should have ended the process ends instead.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


class Left(BaseException):
    """os._exit was called."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes that os._exit was called with; instead of the process, the thread ends."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        if threading.current_thread() is threading.main_thread():
            raise Left
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.2)
    monkeypatch.setattr(module, "SAME_PRESS_SECONDS", 0.2)
    monkeypatch.setattr(run_module, "TOGETHER_SECONDS", 0.2)
    return codes


@pytest.fixture
def signals(exits: list[int]) -> Iterator[Signals]:
    """Installed."""
    made = Signals()
    made.install()
    yield made
    made.uninstall()


def send(number: signal.Signals) -> None:
    """To this process; at the return the handler has run."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def listeners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_made_it_does_nothing() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    made = Signals()
    assert (made.received, made.training) == (None, False)
    assert [signal.getsignal(number) for number in NUMBERS] == before
    made.uninstall()
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_before_training_a_signal_ends_the_preparation(signals: Signals, number: signal.Signals) -> None:
    with pytest.raises(PreemptedError, match=f"{number.name} before training began: nothing is lost"):
        send(number)
    assert signals.received == number.name


@pytest.mark.parametrize("number", NUMBERS)
def test_while_training_a_signal_is_a_flag(signals: Signals, exits: list[int], number: signal.Signals) -> None:
    signals.training = True
    send(number)
    assert signals.received == number.name
    time.sleep(0.4)
    assert exits == []


def test_the_first_signal_is_the_one_that_is_told(signals: Signals, exits: list[int]) -> None:
    """A cluster signals every process, and the launcher passes it on: the same thing comes twice, or in two kinds."""
    signals.training = True
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        send(number)
    assert signals.received == "SIGUSR1"
    time.sleep(0.4)
    assert exits == []


def test_a_second_ctrl_c_leaves_at_once(signals: Signals, exits: list[int]) -> None:
    signals.training = True
    send(signal.SIGINT)
    time.sleep(0.3)
    send(signal.SIGINT)
    wait_until(lambda: exits == [130])


def test_one_press_may_come_twice(signals: Signals, exits: list[int]) -> None:
    """From the terminal, and from the launcher that passes it on."""
    signals.training = True
    send(signal.SIGINT)
    send(signal.SIGINT)
    time.sleep(0.3)
    assert exits == []


def test_a_ctrl_c_after_another_signal_is_no_second_press(signals: Signals, exits: list[int]) -> None:
    signals.training = True
    send(signal.SIGTERM)
    time.sleep(0.3)
    send(signal.SIGINT)
    time.sleep(0.1)
    assert exits == []


def test_an_exception_that_somebody_swallows_does_not_keep_the_process(exits: list[int]) -> None:
    """Raised where exceptions are dropped (a destructor, a callback of compiled code), it would be lost."""
    marked: list[str] = []
    signals = Signals()
    signals.install(lambda: marked.append(str(signals.received)))
    try:
        with pytest.raises(PreemptedError):
            send(signal.SIGTERM)
        assert exits == []
        wait_until(lambda: exits == [75])
        assert marked == ["SIGTERM"]
    finally:
        signals.uninstall()


def test_who_has_dealt_with_the_exception_goes_on(exits: list[int]) -> None:
    """In a notebook the process is not the run's to end."""
    signals = Signals()
    signals.install()
    with pytest.raises(PreemptedError):
        send(signal.SIGINT)
    signals.uninstall()
    time.sleep(0.4)
    assert exits == []


def test_training_that_began_in_time_is_not_left(signals: Signals, exits: list[int]) -> None:
    """The signal came between the last word of the preparation and the first of the training."""
    with pytest.raises(PreemptedError):
        send(signal.SIGTERM)
    signals.training = True
    time.sleep(0.4)
    assert exits == []


def test_uninstalled_nothing_is_left() -> None:
    """Handlers, the descriptor that signals are written to, and the thread."""
    handlers = [signal.getsignal(number) for number in NUMBERS]
    others = listeners()
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        signals = Signals()
        signals.install()
        assert [signal.getsignal(number) for number in NUMBERS] == [signals._handle] * 3
        (thread,) = [thread for thread in listeners() if thread not in others]
        signals.uninstall()
        signals.uninstall()
        assert [signal.getsignal(number) for number in NUMBERS] == handlers
        assert signal.set_wakeup_fd(write) == write
        wait_until(lambda: not thread.is_alive())
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


def test_only_the_main_thread_has_signals() -> None:
    handlers = [signal.getsignal(number) for number in NUMBERS]
    signals = Signals()
    thread = threading.Thread(target=signals.install)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in NUMBERS] == handlers
    signals.uninstall()


# -- how a run leaves that had not begun ----------------------------------------------------------------------------


def test_alone_it_leaves_word_and_returns(monkeypatch: pytest.MonkeyPatch, exits: list[int]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    marked: list[bool] = []
    signals = Signals()
    signals._on_leave = lambda: marked.append(True)
    leave_at_once(signals, PreemptedError(before_training("SIGTERM")))
    assert (marked, exits) == ([True], [])


def test_one_of_several_leaves_on_the_spot(
    monkeypatch: pytest.MonkeyPatch, exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The others may be in a collective, where an ordinary end would wait for them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    marked: list[bool] = []
    signals = Signals()
    signals._on_leave = lambda: marked.append(True)
    with pytest.raises(Left):
        leave_at_once(signals, PreemptedError(before_training("SIGTERM")))
    assert (marked, exits) == ([True], [75])
    assert capsys.readouterr().err == "progscale: SIGTERM before training began: nothing is lost; start it again\n"


def interrupted(signals: list[Signals], error: Exception) -> Callable[..., None]:
    """In place of `prepare`: it is told to stop, and something else comes of it."""

    def prepare(*arguments: object, signals: Signals, **options: object) -> None:
        told.append(signals)
        with contextlib.suppress(PreemptedError):
            send(signal.SIGTERM)
        raise error

    told = signals
    return prepare


def test_an_interruption_that_a_library_wraps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exits: list[int]) -> None:
    """Imports that are made late turn every error into their own; the run was still told to stop."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    told: list[Signals] = []
    monkeypatch.setattr(run_module, "prepare", interrupted(told, RuntimeError("Failed to import")))
    with pytest.raises(PreemptedError, match="SIGTERM before training began"):
        run_module.run(load_config([], [f"run.output_dir={tmp_path}", "run.name=a"]))
    assert json.loads((tmp_path / "a" / "PREEMPTED").read_text())["signal"] == "SIGTERM"


def test_an_error_that_nobody_interrupted_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def prepare(*arguments: object, **options: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(run_module, "prepare", prepare)
    with pytest.raises(RuntimeError, match="a fault"):
        run_module.run(load_config([], [f"run.output_dir={tmp_path}", "run.name=a"]))
    assert not (tmp_path / "a").exists()


# -- when the launcher dies -----------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys, time
from progscale.signals import follow_the_launcher
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0 if os.getppid() != launcher else 1))
launcher = os.getppid()
follow_the_launcher()
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
    follow_the_launcher()
