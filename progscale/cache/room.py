"""Where rows are kept: which memory, of which splits, within which budget; and what an earlier process has left there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import psutil
import torch

from progscale.cache.ledger import Ledger, Nodes
from progscale.cache.memory import SHARED_MEMORY, Memory, Storage
from progscale.cache.store import RowStore
from progscale.engine.base import Engine

META = "cache.json"
# Of what is free; the rest is for everybody else.
SHARE_OF_FREE = 0.5


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
    """

    def __init__(self, engine: Engine, nodes: Nodes, settings: CacheSettings, lengths: Mapping[str, np.ndarray]) -> None:
        self._engine = engine
        self._nodes = nodes
        self._settings = settings
        self._lengths = dict(lengths)
        self.stores: dict[str, RowStore] = {}
        self.ledgers: dict[str, Ledger] = {}
        self.storage: Storage = "ram"
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
        # The node that has least decides for all: every rank must keep the same.
        self.storage, names, reason = min(self._engine.gather_objects(self._choose(sizes)), key=lambda entry: len(entry[1]))
        if not names:
            return reason
        self._values = {"identity": self._settings.identity, "width": width, "dtype": str(dtype), "splits": names}
        self._digests = self._read_digests() if self.storage == "disk" else {}
        token = self._engine.gather_objects(uuid4().hex)[0]
        failure = None
        for first in (True, False):  # the node's first rank makes the files, the others find them
            problem = None
            if first == self._nodes.first:
                problem = self._map([(name, sizes[name]) for name in names], width, dtype, token)
            failure = failure or next(filter(None, self._engine.gather_objects(problem)), None)
            if failure is not None:
                break
        self._unlink_shared(token)
        if failure is not None:
            self.close()
            return failure
        self.ledgers = {name: Ledger(self._nodes, len(self._lengths[name])) for name in names}
        if self.storage == "disk":
            self._take_over(digest, depth)
        return None

    def _choose(self, sizes: Mapping[str, int]) -> tuple[Storage, list[str], str]:
        """Where to keep rows, those of which splits, and why of none."""
        wanted = self._settings.storage
        memory: Storage = "pinned" if self._engine.device.type == "cuda" else "ram"
        kinds: list[Storage] = [memory, "disk"] if wanted == "auto" else [wanted]
        reasons = []
        for kind in kinds:
            free, given = self._free(kind), self._settings.budget_bytes
            limit = int(free * SHARE_OF_FREE) if given is None else min(given, free)
            names: list[str] = []
            used = 0
            for name, size in sizes.items():
                if used + size > limit:
                    break
                names.append(name)
                used += size
            if names:
                return kind, names, ""
            told = "half of what is free" if given is None else f"cache.budget_gigabytes; {free / 1e9:.2f} GB are free"
            reasons.append(f"{limit / 1e9:.2f} GB ({kind}: {told})")
        return kinds[-1], [], f"the training rows need {sizes['train'] / 1e9:.2f} GB, there are {' and '.join(reasons)}"

    def _free(self, storage: Storage) -> int:
        """Bytes that this node still has; what this cache has there already counts as free."""
        if storage == "disk":
            folder = self._settings.folder.absolute()
            while not folder.exists():
                folder = folder.parent
            mine = sum(path.stat().st_size for path in self.folder.glob("*.rows"))
            return shutil.disk_usage(folder).free + mine
        free = int(psutil.virtual_memory().available)
        # A container's shared memory may be far smaller than its memory.
        return min(free, shutil.disk_usage(SHARED_MEMORY).free) if self._nodes.local > 1 else free

    def _path(self, split: str, token: str) -> Path | None:
        """The file of a split; None for memory of one process."""
        if self.storage == "disk":
            return self.folder / f"{split}.rows"
        return SHARED_MEMORY / f"progscale-{token}-{self._nodes.own}-{split}" if self._nodes.local > 1 else None

    def _map(self, sizes: Sequence[tuple[str, int]], width: int, dtype: torch.dtype, token: str) -> str | None:
        """Maps the splits' rows; the node's first rank makes them, empty unless they are those of an earlier process.

        Returns:
            Why it failed, if it did.
        """
        try:
            if self._nodes.first and self.storage == "disk":
                self.folder.mkdir(parents=True, exist_ok=True)
            for name, size in sizes:
                path, first = self._path(name, token), self._nodes.first
                fresh = path is None or not path.exists() or path.stat().st_size != size
                memory = Memory(size, path, create=first, pin=self.storage == "pinned")
                store = RowStore(memory, self._lengths[name], width, dtype, hashed=self.storage == "disk")
                self.stores[name] = store
                if first and not fresh and not self._digests:
                    store.forget(range(len(self._lengths[name])))
            if self._nodes.first and self.storage == "disk":
                self._write_meta()
        except OSError as error:
            return f"no room: {error}"
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
            depths = store.verify(rows.tolist()) if good else np.zeros(len(rows), dtype=np.int16)
            other = ~np.isin(depths, good)
            store.forget(rows[other].tolist())
            depths[other] = 0
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
        """Removes this node's files; nobody may have them open."""
        if self._nodes.first:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another node's may lie there
                self._settings.folder.rmdir()
