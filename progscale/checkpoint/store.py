"""The folder of a run's checkpoints: staged, published, found again, and thinned out. Rank 0 alone acts on it.

A checkpoint is written into `.tmp-…`, and becomes `step-00000150` by one rename when all of it is on the disk. Whatever
kills the run in between leaves the checkpoints that were there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from progscale.checkpoint.manifest import MANIFEST, STATE, FileInfo, Manifest, canonical, plain_file_bytes, read_manifest
from progscale.errors import RejectedError

NAME = re.compile(r"step-[0-9]{8,}")
STAGED, REPLACED, SIDELINED = ".tmp-", ".old-", "rejected-"
LATEST = "latest.json"

log = logging.getLogger("progscale")


class Store:
    """The checkpoints of one run.

    Args:
        root: the folder; it is made when the first checkpoint is.
        keep: how many of the newest stay.
    """

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root = root
        self.keep = keep

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or will."""
        return self.root / f"step-{step:08d}"

    def clean(self) -> None:
        """Removes what a killed run left half done; a checkpoint that was being replaced comes back."""
        self.restore()
        for path in self._entries():
            if path.name.startswith((STAGED, REPLACED)):
                self._delete(path)

    def restore(self) -> None:
        """Brings a checkpoint back that was being replaced when its run was killed."""
        for path in self.replaced():
            os.rename(path, self.root / path.name.removeprefix(REPLACED))

    def replaced(self) -> list[Path]:
        """Checkpoints that `restore` would bring back."""
        return [
            path
            for path in self._entries()
            if path.name.startswith(REPLACED) and not os.path.lexists(self.root / path.name.removeprefix(REPLACED))
        ]

    def candidates(self) -> list[Path]:
        """Checkpoint folders, the highest step first; what lies there is not yet looked into.

        The name is only where to look: the step counts that the manifest gives, never a time of the file system.
        """
        found = []
        for path in self._entries():
            if NAME.fullmatch(path.name) and not path.is_symlink():
                try:
                    step = read_manifest(path).step
                except RejectedError:
                    step = int(path.name.removeprefix("step-"))  # to be named among the rejected, in its place
                found.append((step, path.name, path))
        return [path for _, _, path in sorted(found, reverse=True)]

    def begin(self, step: int) -> Path:
        """A new folder to write a checkpoint into."""
        self.root.mkdir(parents=True, exist_ok=True)
        staged = self.root / f"{STAGED}{step:08d}-{uuid.uuid4().hex}"
        staged.mkdir()
        return staged

    def publish(self, staged: Path, step: int, state: Mapping[str, Any], files: Mapping[str, FileInfo]) -> Path:
        """Makes a whole checkpoint of a folder that holds all ranks' files; then deletes the oldest.

        Raises:
            OSError: it cannot be written, or a file of another rank is not there.
        """
        for name, info in files.items():
            _check_seen(staged, name, info)
        content = canonical(state)
        files = {**files, STATE: write_durably(staged / STATE, content)}
        write_durably(staged / MANIFEST, Manifest(step, files).to_bytes())
        sync(staged)
        final = self.path_of(step)
        replaced = self.root / f"{REPLACED}{final.name}"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        try:
            os.rename(staged, final)
        except OSError:
            self.restore()
            raise
        sync(self.root)
        # It is there: what fails from here on is no reason to say that it is not.
        if replaced.exists():
            self._delete(replaced)
        self._prune()
        try:
            self._point_to(final, step)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.root / LATEST, error)
        return final

    def discard(self, staged: Path) -> None:
        """Removes a folder that did not become a checkpoint."""
        shutil.rmtree(staged, ignore_errors=True)

    def sideline(self, path: Path) -> Path:
        """Renames a rejected checkpoint, so that it neither counts as kept nor is looked at again."""
        number, aside = 0, self.root / f"{SIDELINED}{path.name}"
        while aside.exists():
            number += 1
            aside = self.root / f"{SIDELINED}{path.name}.{number}"
        os.rename(path, aside)
        return aside

    def _point_to(self, final: Path, step: int) -> None:
        """For people and scripts; a run that resumes reads the manifests."""
        partial = self.root / f".{LATEST}"
        partial.unlink(missing_ok=True)  # it may be a link that somebody put there
        write_durably(partial, (json.dumps({"step": step, "path": final.name}) + "\n").encode())
        os.replace(partial, self.root / LATEST)

    def _prune(self) -> None:
        for path in self.candidates()[self.keep :]:
            # Renamed first: killed in the middle, it leaves no half of a checkpoint under its name.
            doomed = self.root / f"{STAGED}{path.name}"
            try:
                os.rename(path, doomed)
            except OSError as error:
                log.warning("the old checkpoint %s cannot be deleted (%s)", path, error)
            else:
                self._delete(doomed)

    @staticmethod
    def _delete(path: Path) -> None:
        try:
            shutil.rmtree(path)
        except OSError as error:  # a link, a file of somebody else's, no permission: it harms nobody
            log.warning("%s is left over, and cannot be deleted (%s)", path, error)

    def _entries(self) -> list[Path]:
        return sorted(self.root.iterdir()) if self.root.is_dir() else []


def _check_seen(staged: Path, name: str, info: FileInfo) -> None:
    try:
        size = plain_file_bytes(staged, name)
    except RejectedError as error:
        raise OSError(None, f"{error.reason}; the run folder must be on a file system that all nodes share") from error
    if size != info.bytes:
        raise OSError(None, f"{name} has {size} bytes where its rank wrote {info.bytes}")


def write_durably(path: Path, content: bytes) -> FileInfo:
    """Writes a file and sees it onto the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(len(content), hashlib.sha256(content).hexdigest())


def sync(path: Path) -> None:
    """Sees a file's content, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
