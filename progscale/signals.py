"""Being told to stop: SIGTERM, SIGUSR1, SIGHUP (a terminal or connection that closes) and Ctrl-C.

Before training there is nothing to save, and the signal ends the process at once. While training it only sets a flag, which
the ranks tell each other with every step and every evaluation batch; they then save at the same step and leave together.
Needs no torch, whose import alone takes seconds in which a signal may come.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from progscale import launcher
from progscale.errors import PreemptedError, ProgscaleError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PREEMPTED = "PREEMPTED"
# Names another file to be the marker too.
ASKED_MARKER = "PROGSCALE_PREEMPTED"
BEGUN_MARKER = "PROGSCALE_BEGUN"
# A terminal sends Ctrl-C to every process of the launch, and the launcher passes it on: the second one is the same press.
SAME_PRESS_SECONDS = 1.0
# How long the main thread may take to come out of compiled code before training, where nothing can be lost.
LEAVE_SECONDS = 5.0
# The launcher tells one rank after the other: who leaves before the last is told looks to it like a crash.
TOGETHER_SECONDS = 1.0


class Signals:
    """What this process was told. Made, it does nothing; `install` lets signals reach it.

    Attributes:
        received: name of the first signal; None when there was none.
        training: whether there is something to save.
        folder: of the run, for the marker of one that was stopped before it began; None while it is not known.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        self.folder: Path | None = None
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._there: socket.socket | None = None
        self._launcher = os.getppid()
        self._started = time.time()
        self._is_crash: bool | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals reach this process within; one that comes before training ends what is done there.

        Raises:
            PreemptedError: this process was told to stop.
            ProgscaleError: another rank crashed.
        """
        try:
            self.install()
            yield
        except PreemptedError as error:
            if not self.training:
                self._leave_together(error)
            raise
        except Exception as error:
            if self.received is None or self.training:
                raise
            # What became of the interruption on its way: libraries wrap it, and a collective fails when a peer was quicker to
            # leave.
            told = self.ending()
            self._leave_together(told)
            raise told from error
        finally:
            self.uninstall()

    def install(self) -> None:
        """Takes over the signals, in the main thread only: elsewhere Python has none.

        Raises:
            PreemptedError: the launcher is gone already.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        here, there = socket.socketpair()
        there.setblocking(False)
        # A handler of Python's waits until compiled code returns; the number arrives here at once.
        self._wakeup_before, self._there = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False), there
        threading.Thread(target=self._listen, args=(here,), name="signals", daemon=True).start()
        for number in SIGNALS:
            # nohup has a run go on when its terminal closes.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        launcher.follow()
        if launcher.is_orphan():  # it died before the kernel was asked
            raise PreemptedError("the launcher is gone: nothing is lost; start it again")

    def uninstall(self) -> None:
        """Gives the signals back to whoever had them."""
        if self._there is None:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        # The thread at the other end sees it, and ends.
        self._there.close()
        self._there = None

    def ending(self) -> ProgscaleError:
        """How a run ends that was told to stop before it began to train."""
        if self._is_crash is None:
            self._is_crash = launcher.lacks_ranks(self._launcher, os.environ) and not self._is_marked()
        if self._is_crash:
            return ProgscaleError("another rank of this machine is gone, and the launcher ends the run")
        return PreemptedError(f"{self.received} before training began: nothing is lost; start it again")

    def leave(self, error: ProgscaleError) -> None:
        """Ends the process on the spot."""
        self._mark(error)
        os._exit(error.exit_code)

    def _leave_together(self, error: ProgscaleError) -> None:
        """Leaves word; one rank of several ends here, as the others may wait for it in a collective."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            say(error)
            time.sleep(TOGETHER_SECONDS)
            self.leave(error)
        self._mark(error)

    def _mark(self, error: ProgscaleError) -> None:
        if self.folder is not None and isinstance(error, PreemptedError):
            mark_preempted(self.folder, None, self.received)

    def _is_marked(self) -> bool:
        """Whether a rank that has left already was told to stop too."""
        if self.folder is None:
            return False
        try:
            return bool(json.loads((self.folder / PREEMPTED).read_text(encoding="utf-8"))["time"] >= self._started)
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            if not self.training:
                raise self.ending()

    def _listen(self, here: socket.socket) -> None:
        pressed: float | None = None
        while received := here.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if number == signal.SIGINT and pressed is not None and now - pressed > SAME_PRESS_SECONDS:
                os._exit(128 + number)
            pressed = pressed or (now if number == signal.SIGINT else None)
            if not self.training:
                self.ending()  # now, while the ranks that were told too are still there
                # The handler's exception may be late, or raised where exceptions are dropped.
                time.sleep(LEAVE_SECONDS)
                # A caller that has dealt with the exception goes on (a notebook).
                if not self.training and self._there is not None:
                    self.received = self.received or signal.Signals(number).name
                    say(self.ending())
                    self.leave(self.ending())


def say(error: ProgscaleError) -> None:
    """Prints why this rank leaves; that another one is gone only where nobody else does.

    A machine's first rank speaks for those that live. Where it is the one that is gone it has said what was wrong, perhaps a
    mistake that this rank was too slow to meet; one that was killed is in the launcher's report.
    """
    if isinstance(error, PreemptedError) or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"progscale: {error}", file=sys.stderr, flush=True)


def mark_begun() -> None:
    """Tells a script, where it asks for it ($PROGSCALE_BEGUN), that a run has something of its own to go on from.

    Until then a script that starts it again leaves `--resume` as its owner gave it.
    """
    if asked := os.environ.get(BEGUN_MARKER):
        _leave(Path(asked), "")


def mark_preempted(folder: Path, step: int | None, signal: str | None) -> None:
    """Leaves the marker by which a script knows that the run wants to be started again; removed when it is.

    It lies in the run's folder, and also where a script asks for it that does not know the folder ($PROGSCALE_PREEMPTED). It is a
    help, and the exit code says the same: on a full disk there is none.

    Args:
        folder: of the run.
        step: that is saved; None where training had not begun.
        signal: that came to this process; None where it came to another.
    """
    content = json.dumps({"step": step, "signal": signal, "time": round(time.time(), 3)}) + "\n"
    asked = os.environ.get(ASKED_MARKER)
    for marker in (folder / PREEMPTED, *([Path(asked)] if asked else [])):
        _leave(marker, content)


def _leave(marker: Path, content: str) -> None:
    partial = marker.with_name(f".{marker.name}.{os.getpid()}")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, marker)
    except OSError as error:
        print(f"progscale: the marker {marker} cannot be written ({error.strerror})", file=sys.stderr)
