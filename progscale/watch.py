"""Nobody waits for the dead: a thread on every rank that sees when another rank is gone or stands still, and ends this one.

Collectives alone would wait: NCCL until its time-out, and a rank that sleeps outside of one for ever. Ranks tell each other
through the launcher's key-value store that they live (ring-wise, so that the traffic grows with the ranks and not with
their square), and how often they showed a sign of progress. The store may itself stand still (its process is stopped, its node
is off), and then answers no call and heeds no time-out: a second thread talks to it, and nobody waits for that one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from progscale.engine.ranks import connect_store
from progscale.launcher import machine, process_state

T = TypeVar("T")

BEAT_SECONDS = 2.0
# A rank on another node whose thread shows nothing for so long is taken for dead; on this node its process is looked at.
SILENT_BEATS = 30
# The store may be slow, or its host be gone: then collectives fail as well.
STORE_SECONDS = 10.0
# A rank that was told the end and is still there after so long does not run Python at all (a deadlock in compiled code).
HEED_SECONDS = 10.0
HANGS = "no progress for"
STOPPED = ("T", "t")


class Watch:
    """Watches the ranks of a run; without a process group, this process alone.

    Args:
        rank: of this process.
        world_size: ranks.
        timeout_seconds: without a sign of progress for so long a rank hangs.
        stopping: whether this rank was told to stop; a launcher that is gone is then no news.
    """

    def __init__(self, rank: int, world_size: int, timeout_seconds: float, stopping: Callable[[], bool] = lambda: False) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._stopping = stopping
        self._signs = 0
        self._where = "starting"
        self._signed = time.monotonic()
        self._reached = time.monotonic()
        self._done = threading.Event()
        self._store = _connect(timeout_seconds) if world_size > 1 else None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._talk = threading.Thread(target=self._talk_to_the_others, name="watch's store", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self.sign("starting")
        self._reached = time.monotonic()
        if self._store is not None:
            self._store.set(f"who/{self.rank}", json.dumps([machine(), os.getpid()]))
            self._talk.start()
        self._thread.start()

    def sign(self, where: str | None = None) -> None:
        """This rank goes on.

        Args:
            where: what it is doing. Signs that say so are counted, and told to the others: every rank must give as many, or
                they cannot be compared. None says no more than that this rank is alive, from any thread.
        """
        if where is not None:
            self._signs += 1
            self._where = where
        self._signed = time.monotonic()

    def stop(self) -> None:
        """Ends the watch; the others are told that this rank left in order."""
        self._done.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        if self._store is not None:
            # The launcher may have gone first; then nobody is left to tell.
            self._ask(lambda store: store.set(f"left/{self.rank}", "1"), None)

    def failed(self, what: str) -> None:
        """Tells the other ranks why this one ends, and ends those on this node that are stopped and would never hear of it."""
        self._done.set()

        def tell(store: Any) -> None:
            self._tell(what)
            self._kill_stopped()

        self._ask(tell, None)

    def _tell(self, what: str) -> bool:
        """Tells the other ranks why the run ends; returns whether this rank is the first to say so."""
        assert self._store is not None
        told = f"rank {self.rank}: {what}"
        return self._store.compare_set("failed", "", told).decode() == told

    def gone(self, patience_seconds: float = 2.0) -> list[int]:
        """Ranks of this node whose process ended without a word; after an error in a collective the likely cause."""
        until = time.monotonic() + patience_seconds

        def look(store: Any) -> list[int]:
            while True:
                found = [rank for rank in range(self.world_size) if rank != self.rank and self._is_gone(rank, silent=2)]
                if found or time.monotonic() > until:
                    return found
                time.sleep(0.1)

        return self._ask(look, [])

    def _run(self) -> None:
        """What no store can keep from being seen."""
        # Beats are counted, and not seconds: a job that was suspended for an hour has done nothing wrong.
        signed, quiet, reached, missed = self._signed, 0, self._reached, 0
        while not self._done.wait(self._beat_seconds):
            quiet = quiet + 1 if self._signed == signed else 0
            missed = missed + 1 if self._reached == reached else 0
            signed, reached = self._signed, self._reached
            if quiet * self._beat_seconds >= self.timeout_seconds:
                what = self._hang_here()
                if self._store is not None:
                    what = self._ask(lambda store: self._hang(), f"{what}; the launcher's store cannot be reached")
                self._end(what, dump=True, tell=True)
            # A run that is saving before it leaves needs no store.
            if self._store is not None and missed * self._beat_seconds >= STORE_SECONDS and not self._stopping():
                self._end("the launcher's store cannot be reached: the launcher or its node is gone, or stands still")

    def _talk_to_the_others(self) -> None:
        beats, silent, store = -1, 0, self._store
        assert store is not None
        while not self._done.wait(self._beat_seconds):
            try:
                if store.check(["failed"]):
                    what = store.get("failed").decode()
                    self._end(what, dump=HANGS in what)
                store.add(f"beat/{self.rank}", 1)
                store.set(f"signs/{self.rank}", json.dumps([self._signs, self._where]))
                self._reached = time.monotonic()
                seen = store.add(f"beat/{self._next}", 0)
                silent = silent + 1 if seen == beats else 0
                beats = seen
                if self._is_gone(self._next, silent):
                    self._end(f"rank {self._next} is gone", tell=True)
            except RuntimeError:
                continue  # torch's DistError; the other thread sees how long it has been

    @property
    def _beat_seconds(self) -> float:
        return min(BEAT_SECONDS, self.timeout_seconds / 4)

    def _ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        """The answer to something that needs the store, or `otherwise` where that is gone or does not answer in time."""
        answers: list[T] = []

        def ask() -> None:
            if self._store is not None:
                with contextlib.suppress(RuntimeError):
                    answers.append(question(self._store))

        thread = threading.Thread(target=ask, name="watch's question", daemon=True)
        thread.start()
        thread.join(STORE_SECONDS + HEED_SECONDS)
        return answers[0] if answers else otherwise

    @property
    def _next(self) -> int:
        return (self.rank + 1) % self.world_size

    def _is_gone(self, rank: int, silent: int) -> bool:
        """Whether a rank ended without saying so."""
        assert self._store is not None
        if not self._store.check([f"who/{rank}"]) or self._store.check([f"left/{rank}"]):
            return False
        host, process = json.loads(self._store.get(f"who/{rank}"))
        if host == machine():
            # It may be about to say that it left.
            return process_state(process) in ("", "Z") and silent > 1 and not self._store.check([f"left/{rank}"])
        return silent > SILENT_BEATS

    def _hang_here(self) -> str:
        return f"{HANGS} {self.timeout_seconds:.0f} s (engine.timeout_seconds) while {self._where}"

    def _hang(self) -> str:
        """Who has shown the fewest signs of progress, and where it stands."""
        what = self._hang_here().partition(" while ")[0]
        assert self._store is not None
        # One that is stopped before its first beat has told nothing yet.
        signs: dict[int, tuple[int, str]] = dict.fromkeys(range(self.world_size), (0, "starting"))
        signs[self.rank] = (self._signs, self._where)
        for rank in range(self.world_size):
            if rank != self.rank and self._store.check([f"signs/{rank}"]):
                count, where = json.loads(self._store.get(f"signs/{rank}"))
                signs[rank] = (count, where)
        stopped = [rank for rank in signs if rank != self.rank and self._state_of(rank) in STOPPED]
        if stopped:
            last_seen = ", ".join(f"rank {rank} (last seen: {signs[rank][1]})" for rank in stopped)
            return f"{what}; stopped by a signal: {last_seen}"
        fewest = min(count for count, _ in signs.values())
        late = [f"rank {rank} ({where})" for rank, (count, where) in sorted(signs.items()) if count == fewest]
        if len(late) == self.world_size:
            return f"{what}; all ranks stand at the same place: {signs[self.rank][1]}"
        return f"{what}; behind the others: {', '.join(late)}"

    def _end(self, what: str, *, dump: bool = False, tell: bool = False) -> None:
        """Ends this process, whatever its main thread waits for."""
        if self._done.is_set():  # the main thread has met the end itself, or the other one of the watch
            return
        self._done.set()
        if dump:
            print(f"progscale: [rank {self.rank}] stands here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(f"progscale: [rank {self.rank}] the run ends: {what}", file=sys.stderr, flush=True)
        if tell:

            def tell_them(store: Any) -> None:
                if self._tell(what):
                    self._kill_stopped()
                    self._kill_deaf()

            self._ask(tell_them, None)
        os._exit(1)

    def _kill_stopped(self) -> None:
        """A process that somebody stopped (SIGSTOP) hears no SIGTERM, and the launcher would wait for it."""
        for rank in range(self.world_size):
            if rank != self.rank and self._state_of(rank) in STOPPED:
                self._kill(rank)

    def _kill_deaf(self) -> None:
        """Ends those on this node that do not end by themselves: the launcher waits for them as long as for a save."""
        until = time.monotonic() + HEED_SECONDS
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        while others := [rank for rank in others if self._state_of(rank) not in (None, "", "Z")]:
            if time.monotonic() > until:
                for rank in others:
                    self._kill(rank)
                return
            time.sleep(0.1)

    def _kill(self, rank: int) -> None:
        process = self._process_of(rank)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _process_of(self, rank: int) -> int | None:
        """The process of a rank on this node; None elsewhere."""
        if self._store is None or not self._store.check([f"who/{rank}"]):
            return None
        host, process = json.loads(self._store.get(f"who/{rank}"))
        return int(process) if host == machine() else None

    def _state_of(self, rank: int) -> str | None:
        """As `process_state`; None where the rank is on another node, or has not begun."""
        process = self._process_of(rank)
        return None if process is None else process_state(process)


def _connect(timeout_seconds: float) -> Any:
    return connect_store("progscale/watch", min(STORE_SECONDS, timeout_seconds))
