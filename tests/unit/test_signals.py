"""Being told to stop, in this very process: what a signal does before training and while training, and that it is all undone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from progscale import launcher
from progscale import signals as module
from progscale.errors import PreemptedError, ProgscaleError
from progscale.signals import Signals, mark_preempted

# The thread that should have ended the process ends instead.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _as_from_a_terminal() -> Iterator[None]:
    """Under nohup the tests would see SIGHUP ignored, as a run then rightly has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
    monkeypatch.setattr(module, "TOGETHER_SECONDS", 0.05)
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


def test_an_exception_that_somebody_swallows_does_not_keep_the_process(exits: list[int], tmp_path: Path) -> None:
    """Raised where exceptions are dropped (a destructor, a callback of compiled code), it would be lost."""
    signals = Signals()
    signals.folder = tmp_path / "a"
    signals.install()
    try:
        with pytest.raises(PreemptedError):
            send(signal.SIGTERM)
        assert exits == []
        wait_until(lambda: exits == [75])
        assert json.loads((tmp_path / "a" / "PREEMPTED").read_text())["signal"] == "SIGTERM"
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
        assert [signal.getsignal(number) for number in NUMBERS] == [signals._handle] * 4
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


def test_nohup_stays() -> None:
    """A run that was to outlive its terminal does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals()
        signals.install()
        send(signal.SIGHUP)
        assert signals.received is None
        signals.uninstall()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_main_thread_has_signals() -> None:
    handlers = [signal.getsignal(number) for number in NUMBERS]
    signals = Signals()
    thread = threading.Thread(target=signals.install)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in NUMBERS] == handlers
    signals.uninstall()


# -- how a run leaves that had not begun ----------------------------------------------------------------------------


@pytest.fixture
def told(exits: list[int], tmp_path: Path) -> Signals:
    """Of a run in tmp_path/a, not yet installed."""
    signals = Signals()
    signals.folder = tmp_path / "a"
    return signals


def marker(signals: Signals) -> dict[str, object] | None:
    assert signals.folder is not None
    path = signals.folder / "PREEMPTED"
    found: dict[str, object] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def test_alone_it_leaves_word_and_raises(monkeypatch: pytest.MonkeyPatch, told: Signals, exits: list[int]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(PreemptedError, match="SIGTERM before training began"), told.listening():
        send(signal.SIGTERM)
    found = marker(told)
    assert found is not None and (found["step"], found["signal"]) == (None, "SIGTERM")
    assert exits == []


def test_one_of_several_leaves_on_the_spot(
    monkeypatch: pytest.MonkeyPatch, told: Signals, exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The others may be in a collective, where an ordinary end would wait for them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Left), told.listening():
        send(signal.SIGTERM)
    assert exits == [75]
    assert marker(told) is not None
    assert capsys.readouterr().err == "progscale: SIGTERM before training began: nothing is lost; start it again\n"


def test_where_the_folder_is_not_known_yet_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(PreemptedError), Signals().listening():
        send(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_that_a_library_wraps(monkeypatch: pytest.MonkeyPatch, told: Signals) -> None:
    """Imports that are made late turn every error into their own; the run was still told to stop."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(PreemptedError, match="SIGTERM before training began"), told.listening():
        with contextlib.suppress(PreemptedError):
            send(signal.SIGTERM)
        raise RuntimeError("Failed to import")
    assert marker(told) is not None


def test_an_error_that_nobody_interrupted_is_an_error(told: Signals) -> None:
    with pytest.raises(RuntimeError, match="a fault"), told.listening():
        raise RuntimeError("a fault")
    assert marker(told) is None


def test_an_error_while_training_is_an_error(told: Signals) -> None:
    with pytest.raises(RuntimeError, match="a fault"), told.listening():
        told.training = True
        send(signal.SIGTERM)
        raise RuntimeError("a fault")
    assert marker(told) is None


@pytest.mark.parametrize(("wrapped", "rank"), [(False, 0), (True, 0), (False, 1)])
def test_another_ranks_crash_is_no_preemption(
    monkeypatch: pytest.MonkeyPatch, told: Signals, exits: list[int], capsys: pytest.CaptureFixture[str], wrapped: bool, rank: int
) -> None:
    """The launcher ends the ranks that are left with the signal by which it passes on a preemption; one of them says so, unless
    the one that is gone is the one that speaks: it has said what was wrong.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(launcher, "lacks_ranks", lambda process, environment: True)
    with pytest.raises(Left), told.listening():
        with contextlib.suppress(ProgscaleError) if wrapped else contextlib.nullcontext():
            send(signal.SIGTERM)
        raise RuntimeError("Failed to import")
    assert exits == [1]
    assert marker(told) is None
    said = "progscale: another rank of this machine is gone, and the launcher ends the run\n"
    assert capsys.readouterr().err == ("" if rank else said)


@pytest.mark.parametrize(("age_seconds", "code"), [(0.0, 75), (3600.0, 1)])
def test_a_rank_that_left_before_for_the_same_reason(
    monkeypatch: pytest.MonkeyPatch, told: Signals, exits: list[int], age_seconds: float, code: int
) -> None:
    """It has left the marker; one that is older than this process is of an earlier run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launcher, "lacks_ranks", lambda process, environment: True)
    assert told.folder is not None
    mark_preempted(told.folder, None, "SIGTERM")
    told._started += age_seconds
    with pytest.raises(Left), told.listening():
        send(signal.SIGTERM)
    assert exits == [code]


def test_a_marker_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code says the same."""
    (tmp_path / "file").touch()
    mark_preempted(tmp_path / "file", 3, "SIGTERM")
    assert "PREEMPTED cannot be written (File exists)" in capsys.readouterr().err


def test_orphans_do_not_begin(monkeypatch: pytest.MonkeyPatch, told: Signals) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launcher, "is_orphan", lambda: True)
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(PreemptedError, match="the launcher is gone"), told.listening():
        raise AssertionError("it began")
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert marker(told) is not None
