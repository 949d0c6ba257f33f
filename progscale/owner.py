"""Whose a run's folder is: two runs in one folder would write over each other, on one machine or on two that share a file system.

A lock of the system ends with the process that holds it, however it ends, and is enough on one machine. Between machines it is
only as good as the file system: NFS may keep locks to each client, Lustre without its option has none. So the owner also leaves a
file in which a number grows. Who finds such a file of another machine looks at it for some time: it takes the folder when the
number stands still. Clocks are not compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from progscale.errors import ConfigError, Fault
from progscale.launcher import machine, process_state

LOCK, OWNER = ".lock", ".owner"
BEAT_SECONDS = 10.0
# A file system may be slow to show a change to others, and its server to answer.
WAIT_SECONDS = 35.0

log = logging.getLogger("progscale")


class Hold:
    """A run's folder that is this process's, until `release`, or until the process ends.

    Args:
        folder: of the run.
        descriptor: of the locked file; None where the file system has no locks.
    """

    def __init__(self, folder: Path, descriptor: int | None) -> None:
        self._path = folder / OWNER
        self._descriptor = descriptor
        self._token = uuid4().hex
        self._beat = 0
        self._done = threading.Event()
        self._guard = threading.Lock()
        if descriptor is not None:
            _HELD.add(descriptor)

    def claim(self) -> None:
        """Leaves this process's file, once nobody else's is alive.

        Raises:
            ConfigError: another machine's process is at work in the folder.
        """
        there = self._read()
        if there is not None and self._may_live(there):
            self._wait_for(there)
        made = False
        try:
            if there is None:
                # Of two that begin at once only one makes it.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
                    made = True
                if not made:
                    self._refuse(self._read() or {})
            self._write()
        except OSError:  # what cannot be written here the run itself will say
            if made:
                self._path.unlink(missing_ok=True)
            return
        if there is not None and there.get("machine") != machine():
            # Others may have waited for the same process, and written before this one or after it.
            time.sleep(WAIT_SECONDS / 10)
        if (found := self._read()) is not None and found.get("token") != self._token:
            self._refuse(found)
        threading.Thread(target=self._run, name="owner of the run's folder", daemon=True).start()

    def release(self) -> None:
        """Lets others have the folder; a second time it does nothing."""
        self._done.set()
        with self._guard:  # not between two looks of the thread
            found = self._read()
            if found is not None and found.get("token") == self._token:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
        if self._descriptor is not None:
            _HELD.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _may_live(self, there: dict[str, Any]) -> bool:
        """Whether nothing tells that the process which left a file has ended; on this machine the lock does, if there is one."""
        if there.get("machine") != machine():
            return True
        return self._descriptor is None and process_state(int(there.get("process", 0))) not in ("", "Z")

    def _wait_for(self, there: dict[str, Any]) -> None:
        log.warning(
            "%s was %s's: looking for %.0f s whether that is still at work",
            self._path.parent,
            there.get("host", "another machine"),
            WAIT_SECONDS,
        )
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, WAIT_SECONDS / 10))
            found = self._read()
            if found is None:
                return
            if (found.get("token"), found.get("beat")) != (there.get("token"), there.get("beat")):
                self._refuse(found)

    def _refuse(self, found: dict[str, Any]) -> None:
        job = f" of job {found['job']}" if found.get("job") else ""
        who = f"process {found.get('process', '?')} on {found.get('host', 'another machine')}{job}"
        folder = self._path.parent
        raise ConfigError(
            Fault("run.name", f"{who} is at work in '{folder}'; wait for it, or choose another with --set run.name=…")
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            return self._load()
        except (ValueError, RecursionError):
            return {}
        except OSError:
            return None

    def _load(self) -> dict[str, Any]:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        content = {
            "token": self._token,
            "beat": self._beat,
            "machine": machine(),
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "process": os.getpid(),
        }
        partial = self._path.with_name(f"{OWNER}.{self._token}")
        try:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(partial, self._path)
        finally:
            partial.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with self._guard:
                if self._done.is_set():
                    return
                try:
                    found = self._load()
                except FileNotFoundError:
                    return  # the folder was moved
                except (OSError, ValueError, RecursionError):
                    continue  # a file server that is away for a while
                if found.get("token") != self._token:
                    if (found.get("machine"), found.get("process")) != (machine(), os.getpid()):
                        self._taken()
                    return
                self._beat += 1
                with contextlib.suppress(OSError):  # a disk that is full for a while
                    self._write()

    def _taken(self) -> None:
        """Ends this process: it stood still for so long that another one took the folder for left, and both would write to it."""
        print(
            f"progscale: another process has taken '{self._path.parent}' while this one stood still; it ends, and saves nothing",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def hold(folder: Path) -> Hold:
    """Keeps other processes out of a run's folder.

    Raises:
        ConfigError: another process holds it.
    """
    held = Hold(folder, _lock(folder))
    try:
        held.claim()
    except BaseException:
        held.release()
        raise
    return held


def _lock(folder: Path) -> int | None:
    """The descriptor of the locked file; None where the file system has no such locks.

    Only a lock of the system will do: one that is a file (as filelock makes where there is no other) outlives a killed process.

    Raises:
        ConfigError: another process holds it.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            return None
        raise ConfigError(
            Fault("run.name", f"another process is at work in '{folder}'; wait for it, or choose another with --set run.name=…")
        ) from error
    return descriptor


# Descriptors of this process's locks.
_HELD: set[int] = set()


def _forget_locks() -> None:
    """In a forked child: a loader's process may outlive a killed run by seconds, and must not keep its successor out."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_forget_locks)
