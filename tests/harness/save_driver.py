"""Runs that meet a file fault at any operation, from one process that was started once for all of them.

    with FaultyForks(root, "kill", cache) as forks:
        operations = forks.operations(["train", ...])
        (ended,) = forks.run(["train", ...], at=17)

A process that trains takes seconds to import what it needs, and a save has dozens of places where it can be killed. So the
program of forks.py runs under the shim of faultfs.py, and a run is a fork of it. The shim's fault waits at one number, PLACE,
and every process counts for itself: this module, as a plug-in of the run, first makes so many changes that mean nothing that
the operation asked for is the one with that number.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

from tests.harness.faultfs import Operation, file_faults, read_log
from tests.harness.forks import Ended, Forks

# The operation at which the shim's fault waits; a run has fewer.
PLACE = 2000
# Where the other ranks begin to count while one is watched: all forks write into one log.
ASIDE = 1000
AT, ON, ALONE, LARGEST = "FAULTY_AT", "FAULTY_RANK", "FAULTY_ALONE", "FAULTY_LARGEST_FILE"


class FaultyForks:
    """The test process's side.

    Args:
        root: changes below are counted; it must exist.
        fault: as faultfs.py has it, without the place: "kill", "tear", "errno:ENOSPC", "errno:ENOSPC+" (from there on).
        cache: folder of tokenised data; the runs share it.
    """

    def __init__(self, root: Path, fault: str, cache: Path) -> None:
        self.root = root
        self._outside = tempfile.TemporaryDirectory(prefix="progscale-faults-")
        self._log = Path(self._outside.name) / "log"
        place = f"{fault.removesuffix('+')}@{PLACE}{'+' * fault.endswith('+')}"
        self._environment = file_faults().environment(root, log=self._log, fault=place)
        self._forks = Forks(cache)

    def run(
        self,
        arguments: Sequence[str],
        *,
        at: int | None = None,
        rank: int = 0,
        largest_file: int | None = None,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> list[Ended]:
        """`progscale …` to its end.

        Args:
            arguments: of the command.
            at: the operation that meets the fault, 1-based; None: none.
            rank: whose operation that is.
            largest_file: RLIMIT_FSIZE of all ranks, bytes.
            environment: variables more.
            **options: of `Forks.run`.
        """
        self._log.unlink(missing_ok=True)
        wanted = {AT: at, ON: rank, LARGEST: largest_file}
        added = {name: str(value) for name, value in wanted.items() if value is not None}
        # What is preloaded must be there when the program starts; later it makes no difference.
        with mock.patch.dict(os.environ, self._environment):
            command = [*arguments, "--plugin", __name__]
            return self._forks.run(command, environment={**added, **(environment or {})}, **options)

    def operations(self, arguments: Sequence[str], *, of: int = 0, **options: Any) -> list[Operation]:
        """What rank `of` does when no fault meets it; the paths begin below the root."""
        for ended in self.run(arguments, environment={ALONE: str(of)}, **options):
            assert ended.code in (0, 75), ended.err
        root = str(self.root.resolve())
        found = [one for one in read_log(self._log) if one.path != root and one.k <= ASIDE]
        assert [one.k for one in found] == list(range(1, len(found) + 1)), "too many, or a rank of several processes"
        return [replace(one, path=one.path.removeprefix(f"{root}/")) for one in found]

    def close(self) -> None:
        """Ends the program."""
        self._forks.close()
        self._outside.cleanup()

    def __enter__(self) -> FaultyForks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def count(changes: int) -> None:
    """Makes changes that mean nothing."""
    for _ in range(changes):
        os.chmod(os.environ["FAULTFS_ROOT"], 0o700)


if LARGEST in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ[LARGEST]), resource.RLIM_INFINITY))
RANK = os.environ.get("RANK", "0")
if AT in os.environ and os.environ[ON] == RANK:
    count(PLACE - int(os.environ[AT]))
if os.environ.get(ALONE, RANK) != RANK:
    count(ASIDE)
