"""Command lines of progscale in forked children of one warm process, each of which meets a file fault at a place of its own.

    with Driver(root, "kill") as driver:
        operations = driver.operations(["train", ...])
        answer = driver.run(["train", ...], at=17)

A process that trains takes seconds to import what it needs, and a save has dozens of places where it can be killed. So one
process imports everything under the shim of faultfs.py, runs the demo once, and forks for each case. The shim's fault waits
at one number, PLACE, and every process counts for itself: the child of a case first makes so many changes that mean nothing
that the operation asked for is the one with that number.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tests.harness.cases import reset_accelerate
from tests.harness.faultfs import Operation, file_faults, read_log
from tests.harness.programs import REPOSITORY, Answer, in_process

# The operation at which the shim's fault waits; a case has fewer.
PLACE = 2000
HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PROGSCALE_FAULT")


class Driver:
    """The test process's side.

    Args:
        root: changes below are counted; cases must write there.
        fault: as faultfs.py has it, without the place: "kill", "tear", "errno:ENOSPC", "errno:ENOSPC+" (from there on).
        warm_up: a command line that runs before the first fork, in a folder that goes away.
    """

    def __init__(self, root: Path, fault: str, warm_up: Sequence[str] = ("train", "--print-config")) -> None:
        self.root = root
        self._folder = tempfile.TemporaryDirectory(prefix="progscale-cases-")
        self._log = self.folder / "log"
        place = f"{fault.removesuffix('+')}@{PLACE}{'+' * fault.endswith('+')}"
        added = file_faults().environment(root, log=self._log, fault=place)
        environment = {name: value for name, value in os.environ.items() if name not in HIDDEN} | added
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.harness.save_driver", json.dumps({"root": str(root), "warm_up": [*warm_up]})]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=self.folder, env=environment, text=True)

    @property
    def folder(self) -> Path:
        """Outside of what is counted."""
        return Path(self._folder.name)

    def run(
        self,
        arguments: Sequence[str],
        *,
        at: int | None = None,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> Answer:
        """`progscale …` in a child of the warm process; the code of one that was killed is -9.

        Args:
            arguments: of progscale.
            at: the operation that meets the fault, 1-based; None: none.
            environment: variables that are added.
            largest_file: RLIMIT_FSIZE, bytes.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._log.unlink(missing_ok=True)
        case = {"arguments": [*arguments], "at": at, "environment": {**(environment or {})}, "largest_file": largest_file}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the warm process is gone; its stderr tells why"
        return Answer(int(line), (self.folder / "err").read_text(), (self.folder / "out").read_text())

    def operations(self, arguments: Sequence[str], **options: Any) -> list[Operation]:
        """What a case does below the root when no fault meets it; paths begin at the root."""
        answer = self.run(arguments, **options)
        assert answer.code in (0, 75), answer.err
        found = [replace(one, path=one.path.removeprefix(f"{self.root.resolve()}/")) for one in read_log(self._log)]
        assert [one.k for one in found] == list(range(1, len(found) + 1)), "several processes"
        assert len(found) < PLACE
        return found

    def close(self) -> None:
        """Ends the warm process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def drive(root: Path, warm_up: Sequence[str]) -> None:
    """The warm process: a case in each line that comes, its exit code in each line that goes."""
    answer = in_process(*warm_up)
    assert answer.code == 0, answer.err
    with tempfile.TemporaryDirectory(prefix=".counted-", dir=root) as scratch:
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                run_child(scratch, **json.loads(line))
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


def run_child(
    scratch: str, arguments: Sequence[str], at: int | None, environment: Mapping[str, str], largest_file: int | None
) -> NoReturn:
    """A case."""
    code = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
            os.close(file)
        os.environ.update(environment)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        from progscale.cli import main

        reset_accelerate()
        for _ in range(PLACE - at if at is not None else 0):
            os.chmod(scratch, 0o700)
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    drive(Path(wanted["root"]), wanted["warm_up"])
