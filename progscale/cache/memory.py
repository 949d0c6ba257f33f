"""Memory that the ranks of a node share: anonymous, in shared memory, or in a file."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
from pathlib import Path
from typing import Literal

import torch

Storage = Literal["ram", "pinned", "disk"]

SHARED_MEMORY = Path("/dev/shm")


class Memory:
    """Bytes that every rank of a node sees.

    Attributes:
        bytes: all of them, a uint8 tensor.
        pinned: page-locked.
    """

    def __init__(self, size: int, path: Path | None = None, *, create: bool = False, pin: bool = False) -> None:
        """Maps `size` bytes.

        Args:
            size: in bytes.
            path: of the file that is mapped; None for memory of this process alone.
            create: make the file and reserve its space, where it is not there in this size; only one rank may.
            pin: page-lock the memory, so that a GPU reads it without a copy.

        Raises:
            OSError: no space, or no such file.
        """
        # A map of no bytes cannot be.
        self._size = max(1, size)
        if path is None:
            self._map = mmap.mmap(-1, self._size)
        else:
            if create:
                reserve(path, self._size)
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), self._size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)[:size]
        self.pinned = pin and size > 0
        if self.pinned:
            code = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self._size, 0)
            if int(code) != 0:
                self.pinned = False
                with contextlib.suppress(RuntimeError):  # the error would meet the next kernel
                    torch.cuda.synchronize()
                raise OSError(f"{self._size} bytes of memory cannot be page-locked (CUDA error {int(code)})")

    def flush(self) -> None:
        """Writes to the disk what has changed, and waits for it."""
        self._map.flush()

    def will_need(self, start: int, end: int) -> None:
        """Lets the kernel read a range of bytes ahead."""
        page = mmap.PAGESIZE
        first = start // page * page
        if end > start and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_WILLNEED, first, min(end, self._size) - first)

    def close(self) -> None:
        """Lets go of it; a file stays."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self.pinned = False
        # The map is closed with the last tensor that looks into it.
        self.bytes = torch.empty(0, dtype=torch.uint8)


def reserve(path: Path, size: int) -> None:
    """Makes a file of `size` bytes whose space is there: a map of a file with holes dies by SIGBUS when the disk is full.

    Raises:
        OSError: there is no space.
    """
    with path.open("a+b") as file:
        if os.fstat(file.fileno()).st_size != size:
            file.truncate(0)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    file.truncate(size)
            except OSError:
                file.truncate(0)
                raise


def shared_name() -> Path:
    """A path in the node's shared memory that nobody else has."""
    return SHARED_MEMORY / f"progscale-{uuid.uuid4().hex}"
