"""Real launches, begun through launch/launch.sh, watched and signalled from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.forks import LAUNCHER, REPOSITORY
from tests.harness.programs import TWO, records

# accelerate's config file for one process on a CPU, and for two.
ONE: list[str] = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Finished:
    """How a launch ended.

    Attributes:
        code: of the launcher; -N where signal N killed it.
        exits: exit code by rank, of those that left by themselves.
        seconds: from `finish` on to the end of the last process.
        left: processes that were still there when the time was over; they have been killed.
    """

    code: int | None
    err: str
    out: str
    exits: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    left: tuple[int, ...] = ()


class Launch:
    """`launch/launch.sh …` in a session of its own, as a context: at its end nothing of it is left.

    Args:
        folder: working directory; gets the logs.
        arguments: of launch/train.py.
        ranks: 1 or 2.
        cache: of tokenised data.
        fault: as PROGSCALE_FAULT.
        slow_save_seconds: as PROGSCALE_SLOW_SAVE.
        environment: variables more.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        ranks: int,
        cache: Path,
        fault: str = "",
        slow_save_seconds: float = 0.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._mark = f"PROGSCALE_LAUNCH={uuid.uuid4().hex}"
        self._exits = folder / f"exits-{self._mark[-8:]}"
        self._exits.mkdir()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        name, _, value = self._mark.partition("=")
        added = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PROGSCALE_CACHE": str(cache),
            "PROGSCALE_EXITS": str(self._exits),
            "PROGSCALE_FAULT": fault,
            "PROGSCALE_SLOW_SAVE": str(slow_save_seconds),
            name: value,
        }
        program = [str(REPOSITORY / "tests" / "harness" / "exits.py"), *arguments, "--plugin", "tests.harness.inject"]
        command = ["bash", str(REPOSITORY / "launch" / "launch.sh"), *(TWO if ranks == 2 else ONE), *program]
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**inherited, **added, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *raised: object) -> None:
        self._end()

    def processes(self) -> list[int]:
        """All processes of the launch that are alive, the launcher among them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0") and not is_zombie(entry):
                        found.append(int(entry.name))
        return found

    def ranks(self) -> dict[int, int]:
        """Process of each rank that the launcher has started; a rank's own data loaders are not among them."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(OSError, StopIteration):
                command = Path(f"/proc/{process}/cmdline").read_bytes()
                if process == self.process.pid or b"exits.py" not in command or parent_of(process) != self.process.pid:
                    continue
                environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                found[int(next((e[5:] for e in environment if e.startswith(b"RANK=")), b"0"))] = process
        return found

    def signal(self, number: signal.Signals, process: int | None = None) -> None:
        """To a process; by default the launcher."""
        os.kill(process or self.process.pid, number)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Waits for something of this launch to be so."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited in vain for {seconds} s\n{self.err}"
            assert self.process.poll() is None, f"the launcher ended before\n{self.err}"
            time.sleep(POLL_SECONDS)

    def wait_for_record(self, run_folder: Path, kind: str, **values: object) -> None:
        """Waits for a line in metrics.jsonl."""

        def is_there() -> bool:
            if not (run_folder / "metrics.jsonl").exists():
                return False
            return any(all(line.get(key) == value for key, value in values.items()) for line in records(run_folder, kind))

        self.wait_until(is_there)

    @property
    def err(self) -> str:
        """What all processes wrote on stderr so far."""
        return self._err.read_text(errors="replace")

    def finish(self, seconds: float = 120.0) -> Finished:
        """Waits for every process of the launch to end."""
        started = time.monotonic()
        left: list[int] = []
        while self.process.poll() is None or (left := self.processes()):
            if time.monotonic() - started > seconds:
                left = self.processes()
                break
            time.sleep(POLL_SECONDS)
        taken = time.monotonic() - started
        self._end()
        exits = {int(path.name): int(path.read_text()) for path in self._exits.iterdir()}
        return Finished(self.process.returncode, self.err, self._out.read_text(errors="replace"), exits, taken, tuple(left))

    def _end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait(30)


def is_zombie(entry: Path) -> bool:
    """Whether a process of /proc has ended and nobody asked how."""
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def parent_of(process: int) -> int:
    """The process that started it, or took it over."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
