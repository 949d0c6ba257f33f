"""Saving, as the loop sees it: all ranks write their own parts, vote, and rank 0 publishes; in place or in the background."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from progscale.checkpoint import shards
from progscale.checkpoint.manifest import FileInfo
from progscale.checkpoint.store import Store
from progscale.engine.base import Engine
from progscale.engine.mapped import is_mapped
from progscale.engine.state import Slice
from progscale.errors import CheckpointError

log = logging.getLogger("progscale")

# Room for any dtype to begin at.
ALIGNMENT = 64


@dataclass(frozen=True)
class Saved:
    """A published checkpoint.

    Attributes:
        path: of its folder.
        step: optimizer steps done.
        bytes: of all files of all ranks.
        blocked_seconds: for which training stood still on this rank.
        seconds: from the beginning to the publication.
    """

    path: Path
    step: int
    bytes: int
    blocked_seconds: float
    seconds: float


@dataclass
class _Part:
    """What one rank writes.

    Attributes:
        bytes: of its tensors.
        files: those that are on the disk.
        failure: why one is not.
    """

    bytes: int
    files: dict[str, FileInfo] = field(default_factory=dict)
    failure: str | None = None


@dataclass
class _Pending:
    """A checkpoint on its way."""

    staged: Path
    step: int
    state: Mapping[str, Any]
    started: float
    part: _Part
    thread: threading.Thread | None = None
    blocked: float = 0.0


class Saver:
    """Writes checkpoints of an engine. Its methods are collectives, unless they say otherwise.

    Args:
        engine: whose state is written.
        store: where to.
        shard_bytes: size of a file at most.
        background: copy the state and write it in a thread.

    Attributes:
        sign: called between files: the rank is alive.
    """

    def __init__(self, engine: Engine, store: Store, *, shard_bytes: int, background: bool = False) -> None:
        self._engine = engine
        self._store = store
        self._shard_bytes = shard_bytes
        self._background = background
        self.sign: Callable[[], None] = lambda: None
        self._pending: _Pending | None = None
        self._copy = torch.empty(0, dtype=torch.uint8)
        self._reserving: threading.Thread | None = None

    @property
    def written(self) -> bool:
        """Whether this rank's part of a background save is on the disk, and waits to be published. No collective."""
        return self._pending is not None and self._pending.thread is not None and not self._pending.thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether a save is on its way. No collective."""
        return self._pending is not None

    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = False) -> Saved | None:
        """Saves the engine's state after `step` optimizer steps.

        Args:
            step: optimizer steps done.
            state: for state.json; rank 0's is taken.
            wait: do not leave the writing to the background.

        Returns:
            What was published; None when the background still writes.

        Raises:
            CheckpointError: on all ranks, when one of them could not write. Earlier checkpoints are untouched.
        """
        assert self._pending is None, "the save before this one was not finished"
        started = time.perf_counter()
        slices = list(self._engine.own_slices())
        part = _Part(bytes=sum(map(shards.slice_bytes, slices)))
        try:
            staged = self._engine.on_main(lambda: self._store.begin(step))
        except Exception as error:  # rank 0's own on rank 0, and what it said of it elsewhere
            raise self._failed(str(error), sum(self._engine.gather_objects(part.bytes))) from error
        pending = _Pending(staged, step, state, started, part)
        self._pending = pending
        if self._background and not wait:
            copied = self._copied(slices)
            # Where one rank has no memory for it, all of them write at once.
            if self._engine.any_true(copied is None):
                self._write(pending, slices)
                return self.finish()
            assert copied is not None
            pending.thread = threading.Thread(target=self._write, args=(pending, copied), name="checkpoint", daemon=True)
            pending.thread.start()
            pending.blocked = time.perf_counter() - started
            return None
        self._write(pending, slices)
        return self.finish()

    def finish(self) -> Saved | None:
        """Waits until every rank has written its part, and publishes.

        Raises:
            CheckpointError: on all ranks, when one of them could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        begin = time.perf_counter()
        if pending.thread is not None:
            pending.thread.join()
        parts: list[_Part] = self._engine.gather_objects(pending.part)
        failures = [f"rank {rank}: {part.failure}" for rank, part in enumerate(parts) if part.failure]
        needed = sum(part.bytes for part in parts)
        path: Path | None = None
        if not failures:
            files = {name: info for part in parts for name, info in part.files.items()}
            try:
                path = self._engine.on_main(lambda: self._store.publish(pending.staged, pending.step, pending.state, files))
            except Exception as error:
                failures = [str(error)]
        if failures:
            self._engine.on_main(lambda: self._store.discard(pending.staged))
            raise self._failed("; ".join(failures), needed)
        assert path is not None
        now = time.perf_counter()
        size = sum(info.bytes for part in parts for info in part.files.values())
        blocked = pending.blocked + now - begin if pending.thread is not None else now - pending.started
        return Saved(path, pending.step, size, blocked, now - pending.started)

    def _write(self, pending: _Pending, slices: Iterable[Slice]) -> None:
        """Writes this rank's files; what goes wrong is told at the vote. No collective."""
        part, rank = pending.part, self._engine.rank
        try:
            for number, shard in enumerate(shards.shards_of(slices, self._shard_bytes)):
                name = f"rank{rank:05d}-{number:05d}.safetensors"
                part.files[name] = shards.write_shard(pending.staged / name, shard.tensors, shard.metadata())
                self.sign()
        except Exception as error:
            # Any error must reach the vote: the other ranks wait there.
            part.failure = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)

    def _copied(self, slices: list[Slice]) -> Iterator[Slice] | None:
        """The slices with copies of their tensors, all in one buffer that stays for the next save; None without memory for it.

        What lies in a file is frozen: its view keeps the file, whatever becomes of the parameter.
        """
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        needed = _room(slices)
        if needed > self._copy.numel() and not self._allocate(needed):
            return None
        offset = 0

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal offset
            if is_mapped(tensor):
                return tensor.detach().view(-1)
            size = tensor.numel() * tensor.element_size()
            place = self._copy[offset : offset + size].view(tensor.dtype)
            offset += _aligned(size)
            return place.copy_(tensor.detach().view(-1), non_blocking=True)

        copies = [part.map(copy) for part in slices]
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        return iter(copies)

    def _allocate(self, size: int) -> bool:
        """A new buffer in place of the old one; whether there is memory for it."""
        self._copy = torch.empty(0, dtype=torch.uint8)  # the two are never held together
        try:
            self._copy = _buffer(size, self._engine.device)
        except (RuntimeError, MemoryError) as error:
            log.warning("no memory for the copy of a background save (%d bytes: %s): it is written in place", size, error)
            return False
        return True

    def reserve(self) -> None:
        """Has the buffer of background saves made ready while training goes on, so that the first copy costs no page faults.

        No collective.
        """
        if not self._background:
            return
        assert self._engine.build is not None
        slices, live = list(self._engine.own_slices()), set(self._engine.build.live)
        # Moments come with the first step.
        optimizer = self._engine.settings.optimizer
        coming = [part for part in slices if part.name in live and not set(optimizer.moments) & set(part.tensors)]
        sizes = (size for part in coming for size in optimizer.moment_bytes(part.end - part.start))
        # The scales of a range may be one more than those of a tensor that begins with a block.
        size = _room(slices) + sum(_aligned(size + 4) for size in sizes)
        if size <= self._copy.numel():
            return

        # A save that is being written holds the buffer, and so may the thread before this one.
        before = [self._reserving, None if self._pending is None else self._pending.thread]

        def fill() -> None:
            for thread in before:
                if thread is not None:
                    thread.join()
            if size > self._copy.numel() and self._allocate(size):
                self._copy.zero_()

        self._reserving = threading.Thread(target=fill, name="checkpoint buffer", daemon=True)
        self._reserving.start()

    def _failed(self, what: str, needed: int) -> CheckpointError:
        root = self._store.root
        existing = next(folder for folder in (root, *root.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        return CheckpointError(
            f"a checkpoint could not be written to {root}: {what}. It needs {needed} bytes, {free} are free there; "
            "the checkpoints before it are untouched. Make room, or choose another run.output_dir; with "
            "--set checkpoint.on_error=warn a run trains on without"
        )


def _room(slices: Iterable[Slice]) -> int:
    """Bytes that copies of the slices' tensors take in one buffer."""
    tensors = (tensor for part in slices for tensor in part.all_tensors() if not is_mapped(tensor))
    return sum(_aligned(tensor.numel() * tensor.element_size()) for tensor in tensors)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
