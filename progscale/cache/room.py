"""Where rows are kept: which memory, of which splits, within which budget; and what an earlier process has left there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch

from progscale.cache.ledger import Ledger, Nodes
from progscale.cache.memory import SHARED_MEMORY, Memory, Storage
from progscale.cache.store import RowStore
from progscale.engine.base import Engine
from progscale.memory import available_bytes

META = "cache.json"
# Of what is free; the rest is for everybody else.
SHARE_OF_FREE = 0.5
VERIFIED_AT_ONCE = 256


@dataclass(frozen=True)
class CacheSettings:
    """What the user asked for, and what decides whether rows of an earlier process may be used.

    Attributes:
        storage: "auto" takes memory where it suffices, page-locked where there is a GPU, else the disk.
        folder: for "disk"; each node has one of its own in it.
        identity: of all that decides what the prefix gives, but the weights.
        dtype: in which rows are kept; None keeps the dtype that the first live block receives.
        budget_bytes: of a node at most; None takes half of what is free.
    """

    storage: Literal["auto", "ram", "pinned", "disk"]
    folder: Path
    identity: str
    dtype: torch.dtype | None = None
    budget_bytes: int | None = None


class Room:
    """The rows of all splits that are kept, and where.

    Args:
        engine: for the talk between ranks.
        nodes: where the ranks are.
        settings: of the user.
        lengths: tokens of each row by split, "train" first.

    Attributes:
        stores: by split, once it is open.
        ledgers: by split.
        storage: what was chosen.
        sign: called now and then while rows are read.
    """

    def __init__(self, engine: Engine, nodes: Nodes, settings: CacheSettings, lengths: Mapping[str, np.ndarray]) -> None:
        self._engine = engine
        self._nodes = nodes
        self._settings = settings
        self._lengths = dict(lengths)
        self.stores: dict[str, RowStore] = {}
        self.ledgers: dict[str, Ledger] = {}
        self.storage: Storage = "ram"
        self.sign: Callable[[], None] = lambda: None
        self._digests: dict[str, str] = {}
        self._values: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """Of this node, for "disk"."""
        return self._settings.folder / f"node-{self._nodes.own}"

    @property
    def bytes(self) -> int:
        """Reserved on this node."""
        return sum(store.memory.bytes.numel() for store in self.stores.values())

    def left_over(self) -> bool:
        """Whether an earlier process has left rows on some node. A collective."""
        possible = self._settings.storage in ("auto", "disk")
        return self._engine.any_true(possible and (self.folder / META).exists())

    def open(self, width: int, dtype: torch.dtype, digest: Callable[[int], str], depth: int) -> str | None:
        """Reserves memory for as many splits as the budget holds. A collective.

        Args:
            width: of the hidden states.
            dtype: of the hidden states.
            digest: of the weights that decide what the lowest so many blocks give.
            depth: blocks that are frozen now.

        Returns:
            Why there is none even for "train"; None when it is open.
        """
        dtype = self._settings.dtype or dtype
        sizes = {name: RowStore.size_of(lengths, width, dtype) for name, lengths in self._lengths.items()}
        reasons = []
        for kind in self._kinds:
            # The node that has least decides for all: every rank must keep the same.
            offers = self._engine.gather_objects(self._offer(kind, sizes))
            count, reason = min(offers, key=lambda offer: offer[0])
            if count > 0:
                self.storage = kind
                reason = self._reserve({name: sizes[name] for name in list(sizes)[:count]}, width, dtype)
                if reason is None:
                    break
            reasons.append(reason)
        else:
            return f"the training rows need {sizes['train'] / 1e9:.2f} GB: {'; '.join(reasons)}"
        self.ledgers = {name: Ledger(self._nodes, len(self._lengths[name])) for name in self.stores}
        if self.storage == "disk":
            self._take_over(digest, depth)
        return None

    @property
    def _kinds(self) -> tuple[Storage, ...]:
        """Where rows may be kept, the best first."""
        if self._settings.storage != "auto":
            return (self._settings.storage,)
        return ("pinned", "ram", "disk") if self._engine.device.type == "cuda" else ("ram", "disk")

    def _offer(self, kind: Storage, sizes: Mapping[str, int]) -> tuple[int, str]:
        """How many splits this node can keep, and what there is for them."""
        free, given = self._free(kind), self._settings.budget_bytes
        limit = int(free * SHARE_OF_FREE) if given is None else min(given, free)
        used = np.cumsum(list(sizes.values()))
        told = "half of what is free" if given is None else f"cache.budget_gigabytes; {free / 1e9:.2f} GB are free"
        return int((used <= limit).sum()), f"{kind} has {limit / 1e9:.2f} GB ({told})"

    def _reserve(self, sizes: Mapping[str, int], width: int, dtype: torch.dtype) -> str | None:
        """Maps the rows of these splits: first the nodes' first ranks, which make the files, then the others, which find them.

        Returns:
            Why it failed on some rank, if it did; then nothing is left.
        """
        self._values = {"identity": self._settings.identity, "width": width, "dtype": str(dtype), "splits": list(sizes)}
        self._digests = self._read_digests() if self.storage == "disk" else {}
        token = self._engine.gather_objects(uuid4().hex)[0]
        failure: str | None = None
        try:
            for first in (True, False):
                problem = self._map(sizes, width, dtype, token) if first == self._nodes.first else None
                failure = next(filter(None, self._engine.gather_objects(problem)), None)
                if failure is not None:
                    break
        finally:
            self._unlink_shared(token)
        if failure is not None:
            self.close()
        return failure

    def _free(self, storage: Storage) -> int:
        """Bytes that this node still has; what this cache has there already counts as free."""
        if storage == "disk":
            folder = self._settings.folder.absolute()
            while not folder.exists():
                folder = folder.parent
            mine = sum(path.stat().st_size for path in self.folder.glob("*.rows"))
            return shutil.disk_usage(folder).free + mine
        free = available_bytes()
        # A container's shared memory may be far smaller than its memory.
        return min(free, shutil.disk_usage(SHARED_MEMORY).free) if self._nodes.local > 1 else free

    def _path(self, split: str, token: str) -> Path | None:
        """The file of a split; None for memory of one process."""
        if self.storage == "disk":
            return self.folder / f"{split}.rows"
        return SHARED_MEMORY / f"progscale-{token}-{self._nodes.own}-{split}" if self._nodes.local > 1 else None

    def _map(self, sizes: Mapping[str, int], width: int, dtype: torch.dtype, token: str) -> str | None:
        """Maps the splits' rows; the node's first rank makes them, empty unless they are those of an earlier process.

        Returns:
            Why it failed, if it did.
        """
        try:
            if self._nodes.first and self.storage == "disk":
                self.folder.mkdir(parents=True, exist_ok=True)
            for name, size in sizes.items():
                path, first = self._path(name, token), self._nodes.first
                fresh = path is None or not path.exists() or path.stat().st_size != size
                memory = Memory(size, path, create=first, pin=self.storage == "pinned")
                store = RowStore(memory, self._lengths[name], width, dtype, hashed=self.storage == "disk")
                self.stores[name] = store
                if first and not fresh and not self._digests:
                    store.forget(range(len(self._lengths[name])))
            if self._nodes.first and self.storage == "disk":
                self._write_meta()
        except (OSError, RuntimeError, MemoryError, ValueError) as error:
            # Whatever it is, the other ranks wait.
            return f"{self.storage} failed: {error}"
        return None

    def _unlink_shared(self, token: str) -> None:
        """Takes shared memory out of the file system: it is gone with the last rank, however that ends."""
        if self.storage != "disk" and self._nodes.first:
            for name in self._lengths:
                path = self._path(name, token)
                if path is not None:
                    path.unlink(missing_ok=True)

    # -- an earlier process ---------------------------------------------------------------------------------------

    def _read_digests(self) -> dict[str, str]:
        """By depth the digest of the weights that gave the rows left here; empty where they are of no use."""
        try:
            found = json.loads((self.folder / META).read_text(encoding="utf-8"))
            fits = all(found[key] == value for key, value in self._values.items())
            digests = {str(depth): str(digest) for depth, digest in found["digests"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return digests if fits else {}

    def _write_meta(self) -> None:
        path = self.folder / META
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**self._values, "digests": self._digests}), encoding="utf-8")
        os.replace(new, path)

    def _take_over(self, digest: Callable[[int], str], depth: int) -> None:
        """Counts the rows that are here whole and were computed with the very weights of now. A collective."""
        digests = self._engine.gather_objects(self._digests)
        good = [int(kept) for kept in digests[self._nodes.own * self._nodes.local] if int(kept) <= depth]
        wanted = sorted({kept for entry in digests for kept in map(int, entry) if kept <= depth})
        now = {kept: digest(kept) for kept in wanted}
        good = [kept for kept in good if now[kept] == digests[self._nodes.own * self._nodes.local][str(kept)]]
        for name, store in self.stores.items():
            rows = np.arange(self._nodes.local_rank, len(self._lengths[name]), self._nodes.local)
            parts = np.array_split(rows, max(1, len(rows) // VERIFIED_AT_ONCE))
            found = []
            for part in parts:
                self.sign()
                found.append(store.verify(part.tolist(), good))
            depths = np.concatenate(found)
            self.ledgers[name].restore(self._engine.gather_objects({"rows": rows, "depths": depths}))
        self._digests = {str(kept): now[kept] for kept in good}

    def note(self, depth: int, digest: Callable[[int], str]) -> None:
        """Rows of this depth are written from now on, with weights of that digest. A collective."""
        if self.storage == "disk":
            self._digests[str(depth)] = digest(depth)
            if self._nodes.first:
                self._write_meta()

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of all memory; files stay."""
        for store in self.stores.values():
            store.close()
        self.stores, self.ledgers = {}, {}

    def remove(self) -> None:
        """Removes this node's files, and those of nodes that were there in an earlier process; nobody may have them open."""
        if not self._nodes.first:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._nodes.rank == 0:
            for left in self._settings.folder.glob("node-*"):
                number = left.name.removeprefix("node-")
                if number.isdecimal() and int(number) >= self._nodes.count:
                    shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):  # another node's may lie there, or a run
            self._settings.folder.rmdir()
            self._settings.folder.parent.rmdir()
