"""Being told to stop: SIGTERM, SIGUSR1 and Ctrl-C.

Before training there is nothing to save, and the signal ends the process at once. While training it only sets a flag, which
the ranks tell each other with every step and every evaluation batch; they then save at the same step and leave together.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from progscale.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal sends Ctrl-C to every process of the launch, and the launcher passes it on: the second one is the same press.
SAME_PRESS_SECONDS = 1.0
# How long the main thread may take to come out of compiled code before training, where nothing can be lost.
LEAVE_SECONDS = 5.0


class Signals:
    """What this process was told. Made, it does nothing; `install` lets signals reach it.

    Attributes:
        received: name of the first signal; None when there was none.
        training: whether there is something to save.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        self._on_leave: Callable[[], None] = lambda: None
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._there: socket.socket | None = None

    def install(self, on_leave: Callable[[], None] = lambda: None) -> None:
        """Takes over the signals, in the main thread only: elsewhere Python has none.

        Args:
            on_leave: called when the process leaves before it began to train (writes the marker).
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._on_leave = on_leave
        here, there = socket.socketpair()
        there.setblocking(False)
        # A handler of Python's waits until compiled code returns; the number arrives here at once.
        self._wakeup_before, self._there = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False), there
        threading.Thread(target=self._listen, args=(here,), name="signals", daemon=True).start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        follow_the_launcher()

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

    def mark(self) -> None:
        """Leaves word that the run was stopped before it began."""
        self._on_leave()

    def leave(self) -> None:
        """Ends the process on the spot."""
        self.mark()
        os._exit(PreemptedError.exit_code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            if not self.training:
                raise PreemptedError(before_training(self.received))

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
                # The handler's exception may be late, or raised where exceptions are dropped.
                time.sleep(LEAVE_SECONDS)
                # A caller that has dealt with the exception goes on (a notebook).
                if not self.training and self._there is not None:
                    self.leave()


def before_training(name: str) -> str:
    """What is said when a run ends that had not begun."""
    return f"{name} before training began: nothing is lost; start it again"


def follow_the_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher dies: it may be killed, or pass no signals on (one process).

    Started by hand there is no launcher: a shell that closes must not end a run that was meant to go on.
    """
    if not any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")):
        return
    set_option = getattr(ctypes.CDLL(None), "prctl", None)
    if set_option is not None:  # Linux
        parent_death_signal = 1
        set_option(parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
    if is_orphan():  # it died before the kernel was asked
        raise PreemptedError("the launcher is gone: nothing is lost; start it again")


def is_orphan() -> bool:
    """Whether the process that started this one is gone, and the system's first process stands in for it."""
    first = Path("/proc/1/cmdline")
    # In a container the launcher may itself be the first process.
    return os.getppid() == 1 and first.exists() and not re.search(rb"python|accelerate|torchrun", first.read_bytes())
