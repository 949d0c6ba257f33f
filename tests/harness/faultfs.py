"""Counts the changes that a process makes under a folder, and breaks the K-th of them: faultfs.c, built and put to use.

    faults = file_faults()
    environment = os.environ | faults.environment(folder, log=log, fault="kill@7")
    subprocess.run(command, env=environment)
    read_log(log)

A dry pass without a fault tells how many operations there are; each of them can then be tried in turn.
"""

from __future__ import annotations

import atexit
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faultfs.c")
SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
ERRORS = ("ENOSPC", "EROFS", "EACCES", "EDQUOT", "EIO")
FAULT = re.compile(rf"(kill|killafter|tear|errno:({'|'.join(ERRORS)})|sleep:\d{{1,6}}(\.\d+)?)@[1-9]\d*\+?")


@dataclass(frozen=True)
class Operation:
    """A change of a file that was about to be made; that it then succeeded is not said.

    Attributes:
        k: number of the operation in its process, 1-based.
        kind: open (to create or empty a file), write, mmap (shared and writable), truncate, allocate, fsync, rename,
            link, symlink, unlink, mkdir, rmdir, chmod; whatever system call it was.
        path: absolute, without symbolic links in the folder; of a rename and a link the new name.
        bytes: to be written, or the new length; 0 for what has none.
    """

    k: int
    kind: str
    path: str
    bytes: int


def read_log(path: Path) -> list[Operation]:
    """The operations of a log, in the order written; several processes may have appended to it."""
    operations = []
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        k, kind, rest = line.split(" ", 2)
        name, _, size = rest.rpartition(" ")
        operations.append(Operation(int(k), kind, name, int(size)))
    return operations


def build_shim(folder: Path) -> Path:
    """Compiles the shim into `folder`.

    Raises:
        RuntimeError: there is no compiler, or it says no (its words are in the message).
    """
    target = folder / "libfaultfs.so"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-Wall", "-o", str(target), str(SOURCE), "-ldl"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{' '.join(command)}: {error}; the tests of file faults need a C compiler") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return target


class FileFaults:
    """The compiled shim.

    Args:
        shim: from `build_shim`.
    """

    def __init__(self, shim: Path) -> None:
        self.shim = shim

    def environment(
        self, root: Path, *, log: Path | str | None = None, fault: str | None = None, rank: int | None = None
    ) -> dict[str, str]:
        """The variables that a process and its children need in addition to their environment.

        Every process counts for itself, its threads together.

        Args:
            root: changes under this folder (and of itself) are counted; it must exist.
            log: file that gets a line for each; "{rank}" in it becomes the process's RANK (0 without).
            fault: kill@K (SIGKILL before the K-th operation, 1-based), killafter@K, tear@K (half of a write, then
                SIGKILL), errno:ENOSPC@K (or EROFS, EACCES, EDQUOT, EIO: nothing is done, and the caller is told so),
                sleep:SECONDS@K. A + at the end means the K-th and all after it, where ENOSPC and EDQUOT let files and
                folders be deleted, as a full disk does.
            rank: the fault meets the process with this RANK alone (0 without).

        Raises:
            ValueError: the fault cannot be read.
        """
        if fault is not None and not FAULT.fullmatch(fault):
            raise ValueError(f"{fault!r} is no file fault: kill@K, killafter@K, tear@K, errno:{'|'.join(ERRORS)}@K, sleep:S@K")
        # What is preloaded already (by a sanitizer, say) stays.
        preload = [str(self.shim), *filter(None, [os.environ.get("LD_PRELOAD")])]
        chosen = {"FAULTFS_LOG": log, "FAULTFS_FAULT": fault, "FAULTFS_RANK": rank}
        given = {name: str(value) for name, value in chosen.items() if value is not None}
        return {"LD_PRELOAD": ":".join(preload), "FAULTFS_ROOT": str(root.resolve(strict=True)), **given}


@functools.cache
def file_faults() -> FileFaults:
    """The shim, compiled at the first call and removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="progscale-faultfs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return FileFaults(build_shim(folder))
