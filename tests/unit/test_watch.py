"""The watch over the ranks: several of them in this process, over a real store; os._exit is noted instead of done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from progscale import watch as module
from progscale.run import tell_the_others
from progscale.watch import Watch, process_state

# The thread that should have ended the process ends instead.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
BEAT = 0.05
SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


class Ranks:
    """Watches of one run.

    Attributes:
        codes: that os._exit was called with.
    """

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.watches: list[Watch] = []
        self.store: Any = None

    def make(self, rank: int, world_size: int = 2, timeout_seconds: float = 60.0, **options: Any) -> Watch:
        """A watch of a rank, begun."""
        watch = Watch(rank, world_size, timeout_seconds, **options)
        self.watches.append(watch)
        watch.start()
        return watch

    def close(self) -> None:
        for watch in self.watches:
            watch.stop()
            watch._thread.join(5)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A store as the launcher keeps it, and quick beats."""
    made = Ranks()

    def leave(code: int) -> None:
        made.codes.append(code)
        raise SystemExit

    made.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(made.store.port))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(module, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(module, "STORE_SECONDS", 0.5)
    # All ranks of a test are this process, which must not wait for itself to end.
    monkeypatch.setattr(Watch, "_kill_deaf", lambda watch: None)
    yield made
    made.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that can be stopped and killed."""
    process = subprocess.Popen(SLEEPER)
    yield process
    process.kill()
    process.wait()


def be(rank: int, process: int, host: str | None = None) -> None:
    """Says of a rank, which has no watch here, that it is this process."""
    store = module._connect(5)
    store.set(f"who/{rank}", json.dumps([host or module.machine(), process]))
    store.add(f"beat/{rank}", 1)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def dead() -> int:
    """The number of a process that has ended and left nothing."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# -- standing still -------------------------------------------------------------------------------------------------


def test_alone_a_hang_ends_the_process(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    watch = ranks.make(0, world_size=1, timeout_seconds=0.2)
    watch.sign("step 7")
    wait_until(lambda: ranks.codes == [1])
    err = capfd.readouterr().err
    assert "progscale: [rank 0] the run ends: no progress for 0 s (engine.timeout_seconds) while step 7" in err
    assert "most recent call first" in err, "the stacks of all threads"
    assert "test_alone_a_hang_ends_the_process" in err


def test_signs_of_progress_keep_it_alive(ranks: Ranks) -> None:
    watch = ranks.make(0, world_size=1, timeout_seconds=0.3)
    for step in range(10):
        watch.sign(f"step {step}")
        time.sleep(0.1)
    assert ranks.codes == []


def test_the_rank_behind_is_named(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    watches = [ranks.make(rank, timeout_seconds=0.6) for rank in range(2)]
    for watch in watches:
        watch.sign("step 4")
    watches[0].sign("step 5")
    wait_until(lambda: len(ranks.codes) == 2)
    ended = [line for line in capfd.readouterr().err.splitlines() if "] the run ends: " in line]
    assert len(ended) == 2
    for line in ended:
        assert line.endswith("no progress for 1 s (engine.timeout_seconds); behind the others: rank 1 (step 4)")


def test_all_ranks_at_the_same_place(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        ranks.make(rank, timeout_seconds=0.6).sign("evaluating validation after step 3")
    wait_until(lambda: len(ranks.codes) == 2)
    assert "all ranks stand at the same place: evaluating validation after step 3" in capfd.readouterr().err


def test_a_rank_that_has_told_nothing_yet_is_the_one_behind(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    ranks.make(0, timeout_seconds=0.4).sign("step 0")
    wait_until(lambda: ranks.codes == [1])
    assert "behind the others: rank 1 (starting)" in capfd.readouterr().err


def test_a_sign_of_life_is_no_sign_of_progress(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    """Ranks give a different number of them (one for each file of their own), which must not hide who is behind."""
    watches = [ranks.make(rank, timeout_seconds=0.6) for rank in range(2)]
    for watch in watches:
        watch.sign("step 4")
    for _ in range(3):
        watches[1].sign()
    watches[0].sign("step 5")
    wait_until(lambda: len(ranks.codes) == 2)
    assert "behind the others: rank 1 (step 4)" in capfd.readouterr().err


def test_a_stopped_rank_is_named_and_killed(
    ranks: Ranks, sleeper: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    """It hears no SIGTERM, and stands where the others stand who wait for it."""
    be(1, sleeper.pid)
    module._connect(5).set("signs/1", json.dumps([2, "step 4"]))
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: process_state(sleeper.pid) == "T")
    ranks.make(0, timeout_seconds=0.5).sign("step 4")
    wait_until(lambda: ranks.codes == [1])
    assert sleeper.wait(5) == -signal.SIGKILL
    assert "(engine.timeout_seconds); stopped by a signal: rank 1 (last seen: step 4)\n" in capfd.readouterr().err


def test_a_rank_that_runs_no_python_is_killed(
    ranks: Ranks, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadlock in compiled code that holds the interpreter: no thread of its own can end it, and no signal reaches it."""
    monkeypatch.undo()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(ranks.store.port))
    monkeypatch.setattr(module, "HEED_SECONDS", 0.3)
    be(1, sleeper.pid)
    watch = Watch(0, 3, 60.0)
    started = time.monotonic()
    watch._kill_deaf()
    assert sleeper.wait(5) == -signal.SIGKILL
    assert time.monotonic() - started >= 0.3
    watch._kill_deaf()  # nobody is left


def test_a_hang_shows_where_every_rank_stands(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    """Not only the rank whose time is over first: it may be the one that waits."""
    ranks.make(0, timeout_seconds=0.4).sign("step 5")
    ranks.make(1).sign("step 5")
    wait_until(lambda: len(ranks.codes) == 2)
    err = capfd.readouterr().err
    for rank in range(2):
        assert f"progscale: [rank {rank}] stands here:" in err
    assert err.count("most recent call first") >= 2


def test_a_hang_while_the_store_cannot_be_reached(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    """It must not end the watch and leave the process."""
    watch = ranks.make(0, timeout_seconds=0.3)
    watch.sign("step 5")
    ranks.store = None
    wait_until(lambda: ranks.codes == [1])
    assert "no progress for 0 s (engine.timeout_seconds) while step 5" in capfd.readouterr().err


# -- gone -----------------------------------------------------------------------------------------------------------


def test_a_rank_whose_process_is_gone(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    be(1, dead())
    watch = ranks.make(0)
    wait_until(lambda: ranks.codes == [1])
    assert capfd.readouterr().err == "progscale: [rank 0] the run ends: rank 1 is gone\n"
    assert watch.gone() == [1]


def test_a_zombie_is_gone(ranks: Ranks, sleeper: subprocess.Popen[bytes]) -> None:
    """Its parent, the launcher, has not looked yet."""
    be(1, sleeper.pid)
    ranks.make(0)
    time.sleep(10 * BEAT)
    assert ranks.codes == []
    sleeper.kill()
    wait_until(lambda: ranks.codes == [1])
    assert process_state(sleeper.pid) == "Z"


def test_a_rank_that_left_in_order_is_not_gone(ranks: Ranks) -> None:
    be(1, dead())
    module._connect(5).set("left/1", "1")
    watch = ranks.make(0)
    time.sleep(10 * BEAT)
    assert (ranks.codes, watch.gone(patience_seconds=0)) == ([], [])


def test_a_rank_that_has_not_begun_is_not_gone(ranks: Ranks) -> None:
    watch = ranks.make(0)
    time.sleep(10 * BEAT)
    assert (ranks.codes, watch.gone(patience_seconds=0)) == ([], [])


def test_a_silent_rank_on_another_node(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Its process cannot be looked at; it is given time."""
    monkeypatch.setattr(module, "SILENT_BEATS", 10)
    be(1, 1, host="elsewhere")
    started = time.monotonic()
    ranks.make(0)
    wait_until(lambda: ranks.codes == [1])
    assert time.monotonic() - started > 10 * BEAT
    assert "rank 1 is gone" in capfd.readouterr().err


def test_ranks_watch_each_other_in_a_ring(ranks: Ranks) -> None:
    """Three that live, and beat: nobody is gone."""
    for rank in range(3):
        ranks.make(rank, world_size=3)
    time.sleep(20 * BEAT)
    assert ranks.codes == []


def test_an_earlier_start_under_the_same_launcher_is_another_run(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's --max-restarts keeps the store, with what the dead ranks left in it."""
    be(1, dead())
    module._connect(5).set("failed", "rank 1: of the first start")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ranks.make(0)
    time.sleep(10 * BEAT)
    assert ranks.codes == []


# -- telling, and being told ----------------------------------------------------------------------------------------


def test_what_one_rank_failed_of_ends_the_others(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    first, _ = ranks.make(0), ranks.make(1)
    first.failed("RuntimeError: out of memory")
    wait_until(lambda: ranks.codes == [1])
    assert capfd.readouterr().err == "progscale: [rank 1] the run ends: rank 0: RuntimeError: out of memory\n"


def test_the_first_failure_is_the_one_that_is_told(ranks: Ranks) -> None:
    """The others fail because of it."""
    watches = [ranks.make(rank) for rank in range(2)]
    watches[1].failed("the cause")
    watches[0].failed("the consequence")
    assert module._connect(5).get("failed").decode() == "rank 1: the cause"


def test_an_error_in_a_collective_names_who_is_gone(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    be(1, dead())
    watch = Watch(0, 2, 60.0)
    tell_the_others(watch, RuntimeError("Connection reset by peer"))
    assert capsys.readouterr().err == "progscale: [rank 0] the run ends: rank 1 is gone (killed, or out of memory)\n"
    assert module._connect(5).get("failed").decode() == "rank 0: rank 1 is gone"


def test_an_error_of_this_rank_alone_is_told_as_it_is(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(0, 2, 60.0)
    tell_the_others(watch, ValueError("a label of 7"))
    assert capsys.readouterr().err == ""
    assert module._connect(5).get("failed").decode() == "rank 0: ValueError: a label of 7"


# -- the store is gone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopping", [False, True])
def test_a_launcher_that_is_gone(ranks: Ranks, capfd: pytest.CaptureFixture[str], stopping: bool) -> None:
    """The end of a run; no news to one that was told to stop, and still saves."""
    watch = ranks.make(0, stopping=lambda: stopping)
    wait_until(lambda: module._connect(5).check(["beat/0"]))
    ranks.store = None
    if stopping:
        time.sleep(4 * module.STORE_SECONDS)
        assert ranks.codes == []
    else:
        wait_until(lambda: ranks.codes == [1])
        assert "the launcher's store cannot be reached: the launcher or its node is gone" in capfd.readouterr().err
    started = time.monotonic()
    watch.stop()
    watch.failed("too late to tell")
    assert watch.gone() == []
    assert time.monotonic() - started < 5


def test_a_job_that_was_suspended_goes_on(ranks: Ranks) -> None:
    """A cluster stops all processes of a job for an hour, and has them go on."""
    watch = ranks.make(0, timeout_seconds=60.0)
    wait_until(lambda: module._connect(5).check(["beat/0"]))
    watch._signed -= 3600
    watch._reached -= 3600
    time.sleep(6 * BEAT)
    assert ranks.codes == []


class Frozen:
    """A store whose process was stopped: it answers nothing, and heeds no time-out."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: threading.Event().wait()


@pytest.fixture
def frozen(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEED_SECONDS", 0.1)
    connect = module._connect

    def freeze_when_known(timeout_seconds: float) -> Any:
        class Store(Frozen):
            set = connect(timeout_seconds).set

        return Store()

    monkeypatch.setattr(module, "_connect", freeze_when_known)


def test_a_store_that_stands_still(ranks: Ranks, frozen: None, capfd: pytest.CaptureFixture[str]) -> None:
    watch = ranks.make(0)
    wait_until(lambda: ranks.codes == [1])
    assert "the launcher's store cannot be reached: the launcher or its node is gone, or stands still" in capfd.readouterr().err
    started = time.monotonic()
    assert watch.gone() == []
    watch.stop()
    assert time.monotonic() - started < 5


def test_a_hang_while_the_store_stands_still(ranks: Ranks, frozen: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Even of a run that is to stop, which needs no store."""
    ranks.make(0, timeout_seconds=1.0, stopping=lambda: True)
    wait_until(lambda: ranks.codes == [1])
    said = capfd.readouterr().err
    assert "no progress for 1 s (engine.timeout_seconds) while starting; the launcher's store cannot be reached" in said


# -- its end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_stops_at_once(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 30.0)
    watch = ranks.make(0, world_size=world_size, timeout_seconds=600)
    started = time.monotonic()
    watch.stop()
    watch.stop()
    assert time.monotonic() - started < 1
    assert not watch._thread.is_alive()
    assert ranks.codes == []


def test_stopped_it_says_so_to_the_others(ranks: Ranks) -> None:
    ranks.make(0).stop()
    assert module._connect(5).check(["left/0"])


def test_one_that_never_began_can_be_stopped(ranks: Ranks) -> None:
    Watch(0, 1, 60.0).stop()


# -- processes ------------------------------------------------------------------------------------------------------


def test_the_state_of_a_process(sleeper: subprocess.Popen[bytes]) -> None:
    assert process_state(os.getpid()) == "R"
    wait_until(lambda: process_state(sleeper.pid) == "S")
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: process_state(sleeper.pid) == "T")
    sleeper.kill()
    wait_until(lambda: process_state(sleeper.pid) == "Z")
    assert process_state(dead()) == ""


def test_the_state_of_a_process_with_a_strange_name(tmp_path: Path) -> None:
    """/proc gives the name in brackets, and it may hold some itself."""
    path = tmp_path / "a) Z (b"
    path.symlink_to("/bin/sleep")
    process = subprocess.Popen([path, "60"])
    try:
        wait_until(lambda: process_state(process.pid) == "S")
    finally:
        process.kill()
        process.wait()


def test_threads_are_named() -> None:
    """As a stack dump shows them."""
    assert Watch(0, 1, 60.0)._thread.name == "watch"
    assert "watch" not in [thread.name for thread in threading.enumerate()]
