"""What a run measures: time, throughput, memory, updated parameters, and that frozen tensors kept their bits. Compute only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from progscale.cost import Work
from progscale.energy import EnergyMeter
from progscale.engine.base import Engine
from progscale.errors import AuditError
from progscale.memory import status_bytes
from progscale.optim import StageBuild

# Of a stage, kept by a checkpoint as they are.
COUNTED = ("rows", "tokens", "skipped_steps", "seconds")


class MemoryMeter:
    """Peak memory of this rank since the last reset.

    GPU: bytes allocated and reserved by torch's allocator. CPU: resident bytes of the process above what it held when
    the meter was made, from the kernel's high-water mark, which is reset through /proc/self/clear_refs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.baseline_bytes = 0 if self.on_gpu else status_bytes("VmRSS")
        self.reset()

    def reset(self) -> None:
        """Starts a new peak."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")

    def peak(self) -> dict[str, int]:
        """`peak_memory_bytes`, and on a GPU `peak_reserved_bytes`, else `peak_resident_bytes` (baseline included)."""
        if self.on_gpu:
            return {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
            }
        resident = status_bytes("VmHWM")
        return {"peak_memory_bytes": max(0, resident - self.baseline_bytes), "peak_resident_bytes": resident}


_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class StageRecord:
    """What one stage did; the entries of `summary.json`'s `stages`.

    Attributes:
        stage: 1-based.
        first_block: lowest live block (the number of blocks where none is live), by stack where there are several.
        embeddings_live: whether the embeddings were trained.
        start_step: first optimizer step.
        end_step: one past the last.
        trainable_parameters: elements of the live tensors.
        planned_updated_parameters: Σ over the stage's steps of live elements, divided by the steps of an epoch.
        updated_parameters: the same from the optimizer's own step counters.
        skipped_steps: steps whose update was left out.
        train_seconds: of training steps alone.
        switch_seconds: building the stage and moving the state.
        audit_seconds: hashing the frozen tensors, before the switch and at the end of the stage.
        samples_per_second: rows of all ranks.
        tokens_per_second: real tokens of all ranks, without padding.
        peak_memory_bytes: the rank that needs most; GPU: allocated, CPU: resident above the start of the run.
        optimizer_state_bytes: moments and separate fp32 masters, the rank that holds most.
        frozen_changed: frozen tensors whose bits changed in the switch or during the stage; anything but 0 is a fault.
        carried: how the optimizer state reached this stage: none, shards or slices.
        engine: its name in this stage.
        micro_batch_size: rows that a rank ran at once, at most.
        communicated_bytes: of all collectives of a step on a rank (the stage's third, or its last); None where the run was
            stopped before it and resumed too late for another.
        planned_flops: floating-point operations of all ranks, were every row as long as the longest allowed.
        flops: those of the rows as long as they were, with their padding, and without what a cache spared.
        baseline_flops: of the same rows and the same method without stages.
        counted_share: of one step's operations on the main process, as torch counted them kernel by kernel, in what `flops`
            holds for that step; None where they could not be counted (compiled blocks).
        energy_joules: of all GPUs while training steps ran, from NVML; None without a GPU that tells.
        frozen_prefix: blocks below the lowest trained tensor, which the backward pass does not reach.
        cache: training rows whose frozen prefix was `read`, `extended` from a lower depth or `computed`, and `bytes` reserved on
            the node that has most; None without a cache.
    """

    stage: int
    first_block: int | dict[str, int]
    embeddings_live: bool
    start_step: int
    end_step: int
    trainable_parameters: int
    planned_updated_parameters: float
    updated_parameters: float
    skipped_steps: int
    train_seconds: float
    switch_seconds: float
    audit_seconds: float
    samples_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int
    optimizer_state_bytes: int
    frozen_changed: int
    carried: str
    engine: str = ""
    micro_batch_size: int = 0
    communicated_bytes: int | None = None
    planned_flops: int | None = None
    flops: int | None = None
    baseline_flops: int | None = None
    counted_share: float | None = None
    energy_joules: float | None = None
    frozen_prefix: int = 0
    cache: dict[str, int] | None = None
    peak_reserved_bytes: int | None = None
    peak_resident_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As a plain dict, without the memory entries that the device does not have."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Audit:
    """Hashes of the bits of a stage's frozen tensors, taken before the switch and compared at the stage's end.

    What a switch itself changes shows too. Before a run's first switch nothing is where it will stay (a ZeRO-3 engine
    partitions it, a cast changes it), so there the hashes are taken when the stage starts.
    """

    def __init__(self, engine: Engine, build: StageBuild) -> None:
        self._engine = engine
        self._frozen = [name for name in engine.parameters if name not in build.live]
        self._before: dict[str, str] | None = None
        self.seconds = 0.0
        if engine.build is not None:
            self.start()

    def start(self) -> None:
        """Takes the hashes, unless they are there."""
        if self._before is None:
            start = time.perf_counter()
            self._before = self._engine.digests(self._frozen)
            self.seconds += time.perf_counter() - start

    def check(self, stage: int) -> None:
        """Stops the run when a frozen tensor changed on any rank. A collective.

        Raises:
            AuditError: naming the first of them.
        """
        changed = self.changed()
        if changed:
            raise AuditError(
                f"stage {stage}: {len(changed)} frozen tensors changed their bits, the first of them {changed[0]}. "
                "This must never happen: the run is stopped; do not use a model that it exported"
            )

    def changed(self) -> list[str]:
        """Names of the frozen tensors that changed on any rank. A collective."""
        assert self._before is not None, "an audit that was never started"
        start = time.perf_counter()
        after = self._engine.digests(self._frozen)
        mine = [name for name, bits in self._before.items() if after[name] != bits]
        everywhere = sorted({name for names in self._engine.gather_objects(mine) for name in names})
        self.seconds += time.perf_counter() - start
        return everywhere


@dataclass(frozen=True)
class StageOperations:
    """What a stage's micro-batches compute, by the formula of `progscale.cost.work`.

    Attributes:
        work: of the stage.
        baseline: of the same method without stages.
        width: of attention.
        block: matrix elements of one block.
        planned: operations of the stage, were every row as long as the longest allowed.
        countable: whether torch sees every kernel, so that its own count can be set beside the formula.
    """

    work: Work
    baseline: Work
    width: int
    block: int
    planned: int
    countable: bool = True

    def of(self, shapes: Sequence[tuple[int, int]], skipped: Sequence[tuple[int, int]] = ()) -> int:
        """Of micro-batches.

        Args:
            shapes: rows and tokens of each, padding included.
            skipped: tokens of a row, and Σ over rows of the blocks whose forward pass was spared.
        """
        done = sum(rows * self.work.flops(length, self.width).total for rows, length in shapes)
        return done - sum(blocks * (2 * length * self.block + 4 * length * length * self.width) for length, blocks in skipped)

    def of_baseline(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Of the same micro-batches with every block and the embeddings trained."""
        return sum(rows * self.baseline.flops(length, self.width).total for rows, length in shapes)


class StageMeter:
    """Measures one stage, from after the switch to its end; its audit begins before."""

    def __init__(
        self,
        engine: Engine,
        build: StageBuild,
        sizes: Mapping[str, int],
        memory: MemoryMeter,
        audit: Audit,
        operations: StageOperations | None = None,
    ) -> None:
        self._engine = engine
        self._build = build
        self._operations = operations
        self._memory = memory
        self.audit = audit
        audit.start()
        self.trainable_parameters = sum(sizes[name] for name in build.live)
        self._volume_before = engine.updated_volume()
        self.rows = 0
        self.tokens = 0
        self.skipped_steps = 0
        self.seconds = 0.0
        self.flops = self.baseline_flops = 0
        self._counted_share: float | None = None
        self._energy = EnergyMeter(engine.device)
        memory.reset()
        self._peak_before: dict[str, int] = {}
        self._traffic_before: int | None = None
        self._running_since: float | None = None

    def start(self) -> None:
        """Time runs from here."""
        self._running_since = time.perf_counter()
        self._energy.start()

    def stop(self) -> None:
        """Time stands still (evaluation, saving)."""
        if self._running_since is not None:
            self._engine.synchronize()
            self.seconds += time.perf_counter() - self._running_since
            self._running_since = None
            self._energy.stop()

    def step(
        self,
        rows: int,
        tokens: int,
        applied: bool,
        shapes: Sequence[tuple[int, int]] = (),
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        """One optimizer step.

        Args:
            rows: of all ranks.
            tokens: of them, without padding.
            applied: whether the update was made.
            shapes: rows and tokens of this rank's micro-batches, padding included.
            skipped: of `Feed.take_skipped`.
        """
        self.rows += rows
        self.tokens += tokens
        self.skipped_steps += not applied
        if self._operations is None:
            return
        flops = self._operations.of(shapes, skipped)
        self.flops += flops
        self.baseline_flops += self._operations.of_baseline(shapes)
        if self._engine.operations is not None and flops and self._operations.countable:
            self._counted_share = self._engine.operations / flops

    def to_json(self) -> dict[str, Any]:
        """What a resumed run needs to finish the stage's record. A collective."""
        counted = {name: getattr(self, name) for name in COUNTED}
        flops, baseline_flops = self._all_flops()
        return {
            **counted,
            "flops": flops,
            "baseline_flops": baseline_flops,
            "counted_share": self._counted_share,
            "energy_joules": self._all_joules(),
            "audit_seconds": self.audit.seconds,
            "volume_before": self._volume_before,
            "peak": self._peak(),
            "communicated_bytes": self._traffic,
            "communicated_by": self._ranks,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on counting from what `to_json` gave before the run was stopped."""
        for name in COUNTED:
            setattr(self, name, saved[name])
        # Those of all ranks: one of them goes on from there.
        if self._engine.is_main:
            self.flops, self.baseline_flops = saved.get("flops", 0), saved.get("baseline_flops", 0)
            self._energy.joules = saved.get("energy_joules") or 0.0
        self._counted_share = saved.get("counted_share")
        self.audit.seconds += saved["audit_seconds"]
        self._volume_before = saved["volume_before"]
        self._peak_before = saved["peak"]
        if saved.get("communicated_by") == self._ranks:
            self._traffic_before = saved["communicated_bytes"]

    @property
    def _ranks(self) -> str:
        return f"{self._engine.name}, {self._engine.world_size}"

    @property
    def _traffic(self) -> int | None:
        """Of a step, counted in this process or in those before it."""
        return self._traffic_before if self._engine.traffic is None else self._engine.traffic

    def _all_flops(self) -> tuple[int, int]:
        """Of all ranks. A collective."""
        everyone = self._engine.gather_objects((self.flops, self.baseline_flops))
        return sum(flops for flops, _ in everyone), sum(baseline for _, baseline in everyone)

    def _all_joules(self) -> float | None:
        """Of the GPUs of all ranks; None where one of them does not tell. A collective."""
        everyone = self._engine.gather_objects(self._energy.joules if self._energy.tells else None)
        return None if None in everyone else sum(everyone)

    def _peak(self) -> dict[str, int]:
        """The highest peak of any rank, in this process or in those before it. A collective."""
        peaks = [*self._engine.gather_objects(self._memory.peak()), self._peak_before]
        return max(peaks, key=lambda entry: entry.get("peak_memory_bytes", 0))

    def finish(
        self,
        *,
        steps_per_epoch: int,
        first_block: int | dict[str, int],
        switch_seconds: float,
        carried: str,
        micro_batch_size: int = 0,
        frozen_prefix: int = 0,
        cache: dict[str, int] | None = None,
    ) -> StageRecord:
        """The stage's record; a collective.

        Raises:
            AuditError: a frozen tensor changed.
        """
        self.stop()
        engine, stage = self._engine, self._build.stage
        volume = engine.updated_volume() - self._volume_before
        peak = self._peak()
        state_bytes = engine.optimizer_state_bytes()
        flops, baseline_flops = self._all_flops()
        joules = self._all_joules()
        self.audit.check(stage.index)
        seconds = max(self.seconds, 1e-9)
        return StageRecord(
            stage=stage.index,
            first_block=first_block,
            embeddings_live=stage.embeddings,
            start_step=stage.start_step,
            end_step=stage.end_step,
            trainable_parameters=self.trainable_parameters,
            planned_updated_parameters=_whole(stage.steps * self.trainable_parameters / steps_per_epoch),
            updated_parameters=_whole(volume / steps_per_epoch),
            skipped_steps=self.skipped_steps,
            train_seconds=self.seconds,
            switch_seconds=switch_seconds,
            audit_seconds=self.audit.seconds,
            samples_per_second=self.rows / seconds,
            tokens_per_second=self.tokens / seconds,
            optimizer_state_bytes=state_bytes,
            frozen_changed=0,  # or the audit would have raised
            carried=carried,
            engine=engine.name,
            micro_batch_size=micro_batch_size,
            communicated_bytes=self._traffic,
            planned_flops=None if self._operations is None else self._operations.planned,
            flops=None if self._operations is None else flops,
            baseline_flops=None if self._operations is None else baseline_flops,
            counted_share=self._counted_share,
            energy_joules=joules,
            frozen_prefix=frozen_prefix,
            cache=cache,
            **peak,
        )


def _whole(value: float) -> float:
    """An int where the value is one, so that JSON shows 703123456 and not 703123456.0."""
    return int(value) if float(value).is_integer() else value
