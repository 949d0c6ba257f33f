"""The cache of the frozen prefix: what is read, what is computed, and whether it pays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash

from progscale.blocks import Partition
from progscale.cache.feed import EvalFeed, Repeats
from progscale.cache.ledger import Nodes
from progscale.cache.room import CacheSettings, Room
from progscale.cache.store import RowStore
from progscale.data import GlobalBatch, MicroBatch
from progscale.engine.base import Engine
from progscale.prefix import Passage, Prefix, frozen_names
from progscale.tasks.base import Tokenized

PROBES = 2
"""Micro-batches that run from the tokens before anything is kept: one to see what the blocks give, one to measure."""

COUNTED = ("read", "extended", "computed")


@dataclass(frozen=True)
class Costs:
    """Seconds of a micro-batch on the slowest rank: computing the prefix, writing what it gives, reading that.

    Attributes:
        depth: blocks of the prefix.
    """

    compute: float
    write: float
    read: float
    depth: int

    def at(self, depth: int) -> Costs:
        """Of a prefix of another number of blocks, which are all alike."""
        return replace(self, compute=self.compute * depth / self.depth, depth=depth)

    def pays(self, again: float) -> bool:
        """Whether writing pays for rows that are read `again` times."""
        return again * (self.compute - self.read) > self.write


class PrefixCache(EvalFeed):
    """Reads what the prefix gave for a row, and computes the rest of the way.

    Args:
        engine: that trains.
        prefix: of its model.
        partition: of its model.
        splits: whose rows may be kept, "train" first.
        nodes: where the ranks are.
        settings: of the user.
        say: shows a line.
    """

    def __init__(
        self,
        engine: Engine,
        prefix: Prefix,
        partition: Partition,
        splits: Mapping[str, Tokenized],
        nodes: Nodes,
        settings: CacheSettings,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(prefix)
        self._engine = engine
        self._partition = partition
        self._nodes = nodes
        self._say = say
        lengths = {name: split.columns["input_ids"].lengths for name, split in splits.items()}
        self._room = Room(engine, nodes, settings, lengths)
        self._room.sign = lambda: self.sign()
        self._stage = 0
        self._repeats = Repeats()
        self._probes = 0
        # As found out once; None before.
        self._measured: Costs | None = None
        self._impossible: str | None = None
        # Of this stage; None where the cache is off.
        self._costs: Costs | None = None
        # Of the hidden states as the first live block receives them.
        self._dtype = torch.float32
        self._counts = dict.fromkeys(COUNTED, 0)

    # -- stages ---------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: int, depth: int, repeats: Repeats) -> None:
        """Decides anew, for the prefix is higher and fewer passes are left. A collective."""
        super().begin_stage(stage, depth, repeats)
        self._stage, self._repeats, self._costs, self._probes = stage, repeats, None, 0
        self._counts = dict.fromkeys(COUNTED, 0)
        if depth == 0:
            return
        if self._impossible is not None:
            self._tell(f"off, {self._impossible}")
        elif self._measured is not None:
            self._room.note(depth, self._digest)
            self._decide()
        elif repeats.training <= 0 and not self._room.left_over():
            self._tell("off, no row is run again after this pass")
        else:
            self._probes = PROBES

    def at(self, repeats: Repeats) -> None:
        """Whether to write is decided by what is left."""
        self._repeats = repeats

    def expect(self, batch: GlobalBatch) -> None:
        """Lets the kernel read the next batch from the disk while this one is computed."""
        if self._costs is not None and self._room.storage == "disk":
            for micro in batch.micro_batches:
                self._room.stores["train"].will_need(micro.rows.tolist())

    @property
    def bytes(self) -> int:
        """Reserved on this node, for all splits."""
        return self._room.bytes

    def counts(self) -> Mapping[str, int]:
        """Training rows: `read`, `extended` from a lower depth, `computed` from the tokens."""
        return dict(self._counts)

    def _count(self, depths: np.ndarray) -> None:
        read, computed = int((depths == self.prefix.depth).sum()), int((depths == 0).sum())
        for key, rows in zip(COUNTED, (read, len(depths) - read - computed, computed), strict=True):
            self._counts[key] += rows

    def restore(self, counts: Mapping[str, int]) -> None:
        """Goes on counting."""
        for key in self._counts:
            self._counts[key] += counts.get(key, 0)

    def close(self, *, finished: bool) -> None:
        """Lets go of the memory; files are removed at the end of a run, and kept for one that may go on."""
        super().close(finished=finished)
        self._room.close()
        if finished:
            self._room.remove()

    # -- a micro-batch --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def around(self, micro: MicroBatch, split: str = "train") -> Iterator[None]:
        """See `Feed`. What is read and what computed is one decision for all ranks where they must run the same blocks."""
        if self.prefix.depth == 0:
            yield
        elif self._probes and split == "train":
            with self._probing(micro):
                yield
        elif self._costs is None or split not in self._room.stores:
            with self.prefix.running():
                yield
        else:
            with self._from_store(micro, split, self._costs):
                yield

    @contextlib.contextmanager
    def _from_store(self, micro: MicroBatch, split: str, costs: Costs) -> Iterator[None]:
        ledger, store, depth = self._room.ledgers[split], self._room.stores[split], self.prefix.depth
        own = ledger.depths(self._nodes.rank, micro.rows)
        starts = np.unique(own)
        if self._engine.partitions_parameters:
            everywhere = [ledger.depths(rank, rows) for rank, rows in enumerate(micro.run_by_all())]
            starts = np.unique(np.concatenate(everywhere))
        writes = costs.pays(self._repeats.training if split == "train" else self._repeats.evaluation)
        missing = own < depth
        if split == "train":
            self._skipped.append((micro.length, int(own.sum())))
        if split == "train" and micro.weight:
            self._count(own)
        copies: list[Copy] = []
        if len(starts) == 1:
            # All rows at one depth, as they are wherever stages begin with an epoch: no pass but the usual one.
            start = int(starts[0])
            hidden = self._read(store, micro.rows, micro.length) if start > 0 else None
        else:
            start, hidden = depth, self._assembled(micro, store, own, starts.tolist())
            if writes and missing.any():
                copies.append(Copy(hidden[torch.from_numpy(np.flatnonzero(missing)).to(hidden.device)], store.dtype))
        with self.prefix.running(start, hidden) as passage:
            if writes and start < depth:
                passage.then = lambda output: copies.append(Copy(output[:, : micro.length], store.dtype))
            yield
        if writes:
            if copies and micro.weight:
                store.write(micro.rows[missing].tolist(), depth, copies[0].done())
            ledger.keep(micro.peers, depth)

    def _assembled(self, micro: MicroBatch, store: RowStore, own: np.ndarray, starts: Sequence[int]) -> torch.Tensor:
        """What the prefix gives for rows that are kept at several depths, or not at all.

        The rows of one depth go through what is left of the prefix together. A rank that has none of a depth which another
        has goes along with its first row.
        """
        depth, length = self.prefix.depth, micro.length
        whole = torch.empty(len(own), length, store.width, dtype=self._dtype, device=self._engine.device)
        for start in starts:
            mine = np.flatnonzero(own == start)
            chosen = mine if len(mine) else np.zeros(1, dtype=np.int64)
            hidden = None
            if len(mine) and start > 0:
                hidden = self._read(store, micro.rows[mine], length)
            elif start > 0:
                hidden = whole.new_zeros(1, length, store.width)
            if start < depth:
                index = torch.from_numpy(chosen)
                inputs = {name: values[index] for name, values in micro.inputs.items()}
                hidden = self.prefix.compute(inputs, start, hidden)[:, :length]
            if len(mine):
                assert hidden is not None
                whole[torch.from_numpy(mine).to(whole.device)] = hidden
        return whole

    def _read(self, store: RowStore, rows: np.ndarray, length: int) -> torch.Tensor:
        """Rows as the first live block receives them, on the device."""
        return store.read(rows.tolist(), length, self._engine.device).to(self._dtype)

    # -- whether it pays ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _probing(self, micro: MicroBatch) -> Iterator[None]:
        """Runs a micro-batch from the tokens; after the last of them all ranks decide together."""
        copies: list[Copy] = []
        with self.prefix.running(timed=True) as passage:
            passage.then = lambda output: copies.append(Copy(output[:, : micro.length], output.dtype))
            yield
        if micro.weight:
            self._count(np.zeros(len(micro.rows)))
        self._probes -= 1
        if self._probes == 0:
            self._look(micro, passage, copies[0].done())

    def _look(self, micro: MicroBatch, passage: Passage, hidden: torch.Tensor) -> None:
        """Opens the store, measures, and decides about this stage. A collective."""
        reason = self.prefix.opaque
        if reason is None:
            self._dtype = hidden.dtype
            reason = self._room.open(hidden.shape[2], hidden.dtype, self._digest, self.prefix.depth)
        if reason is not None:
            self._impossible = reason
            self._tell(f"off, {reason}")
            return
        self._room.note(self.prefix.depth, self._digest)
        self._measured = self._measure(micro, passage.seconds, hidden)
        self._decide()

    def _decide(self) -> None:
        """Whether rows are read in this stage, and whether more are kept, from what was measured."""
        assert self._measured is not None
        costs, again = self._measured.at(self.prefix.depth), self._repeats.training
        figures = f"a micro-batch takes {1000 * costs.compute:.1f} ms to compute, {1000 * costs.read:.1f} ms to read"
        if costs.read >= costs.compute:
            self._tell(f"off, {figures}")
            return
        self._costs = costs
        passes = f"rows are run {again:.3g} more times" if costs.pays(again) else "nothing more is kept for what is left"
        self._tell(f"on, {figures}, {passes} ({self._room.storage}, {self.bytes / 1e9:.2f} GB)")

    def _measure(self, micro: MicroBatch, compute: float, hidden: torch.Tensor) -> Costs:
        """Writes the rows of a micro-batch that has just run, and reads them. A collective."""
        store = self._room.stores["train"]
        begin = time.perf_counter()
        if micro.weight:
            store.write(micro.rows.tolist(), self.prefix.depth, hidden.to(store.dtype))
        written = time.perf_counter()
        self._read(store, micro.rows, micro.length)
        self._engine.synchronize()
        mine = (compute, written - begin, time.perf_counter() - written)
        self._room.ledgers["train"].keep(micro.peers, self.prefix.depth)
        computing, writing, reading = (max(values) for values in zip(*self._engine.gather_objects(mine), strict=True))
        return Costs(computing, writing, reading, self.prefix.depth)

    def _digest(self, depth: int) -> str:
        """Of the weights that decide what the lowest `depth` blocks give. A collective."""
        names = frozen_names(self._partition, depth)
        parts = self._engine.gather_objects(self._engine.digests(names))
        # Whole weights are the same on every rank, and on any number of them.
        text = repr([sorted(part.items()) for part in (parts if self._engine.partitions_parameters else parts[:1])])
        return xxhash.xxh3_128_hexdigest(text.encode())

    def _tell(self, decision: str) -> None:
        depth = self.prefix.depth
        self._say(f"stage {self._stage}: cache of block{'s 0 to' if depth > 1 else ''} {depth - 1}: {decision}")


class Copy:
    """Hidden states on their way to the CPU, while the GPU goes on."""

    def __init__(self, hidden: torch.Tensor, dtype: torch.dtype) -> None:
        self._event: torch.cuda.Event | None = None
        if hidden.device.type == "cuda":
            self._tensor = torch.empty(hidden.shape, dtype=dtype, pin_memory=True)
            self._tensor.copy_(hidden.detach().to(dtype), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(hidden.device))
        else:
            self._tensor = hidden.detach().to(dtype, copy=True)  # a block may work in place on what it is given

    def done(self) -> torch.Tensor:
        """The copy, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
