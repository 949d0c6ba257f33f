"""A run that trains, saves, is killed and goes on, in any order: always the step, stage and rows that were next.

Everything but the model is the product's own: stages, order of the data, loop over a stage's batches, when a save is due,
publishing, what a killed process leaves, finding and checking a checkpoint, and the run folder. Beside it stands a run said
plainly, as a list of steps and a list of what is saved.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from progscale.cache import Feed
from progscale.checkpoint import store as store_module
from progscale.checkpoint.manifest import MANIFEST, STATE
from progscale.checkpoint.store import LATEST, REPLACED, STAGED, Store
from progscale.config import Checkpoint, Config, Run, Schedule, Train
from progscale.data import TrainLoader, global_batches
from progscale.errors import RejectedError
from progscale.folder import open_folder, restore_replaced
from progscale.models.family import FAMILIES
from progscale.resume import FOLDER, derive_stage, find_checkpoint, stage_values
from progscale.schedule import Stage
from progscale.session import Session
from progscale.setup import stages_of, total_steps_of
from progscale.tasks.base import Tokenized
from progscale.tasks.ragged import Ragged
from progscale.trackers import RunFolder
from tests.harness.fuzz import LENGTHS

PLAN: Any = SimpleNamespace(to_json=dict)


class Killed(BaseException):
    """The process is gone: nothing of it runs any more, whatever it would have cleaned up."""


@dataclass(frozen=True)
class Shape:
    """A run to be.

    Attributes:
        lengths: of the rows.
        blocks: of the model.
    """

    lengths: tuple[int, ...]
    blocks: int
    config: Config

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.config.train.global_batch_size)

    def batches(self, epoch: int) -> list[list[int]]:
        train = self.config.train
        found = global_batches(self.lengths, train.global_batch_size, seed=3, epoch=epoch, group_by_length=train.group_by_length)
        return [rows.tolist() for rows in found]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    steps_per_epoch, batch, factor = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(0, 8))
    rows = batch * (steps_per_epoch - 1) + draw(st.integers(1, batch))
    # There is at least one whole batch.
    lengths = tuple(1 + row * factor % 9 for row in range(max(rows, batch)))
    epochs = draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]))
    total = math.ceil(epochs * steps_per_epoch)
    config = Config(
        run=Run(name="a", seed=3),
        schedule=Schedule(
            name=draw(st.sampled_from(["progtuning", "none", "growing", "without_low_blocks"])),
            stages=draw(st.integers(1, min(5, total))),
        ),
        train=Train(epochs=epochs, global_batch_size=batch, group_by_length=draw(st.booleans())),
        checkpoint=Checkpoint(
            every_steps=draw(st.none() | st.integers(1, 5)),
            at_epochs=draw(st.booleans()),
            at_stages=draw(st.booleans()),
            keep=draw(st.integers(2, 3)),
        ),
    )
    return Shape(lengths, draw(st.integers(1, 6)), config)


class Reference:
    """The run, said plainly.

    Attributes:
        plan: (stage, lowest live block, rows) of every step.
        step: how many are done.
        saved: steps of the checkpoints on the disk, oldest first.
    """

    def __init__(self, shape: Shape) -> None:
        config, blocks = shape.config, shape.blocks
        count, keep = config.stages, config.checkpoint.keep
        total = math.ceil(config.train.epochs * shape.steps_per_epoch)
        rows = [batch for epoch in range(math.ceil(config.train.epochs)) for batch in shape.batches(epoch)][:total]
        stages = [max(t for t in range(count) if t * total // count <= step) for step in range(total)]
        lowest = {
            "progtuning": lambda t: t * blocks // count,
            "none": lambda t: 0,
            "growing": lambda t: (count - 1 - t) * blocks // count,
            "without_low_blocks": lambda t: (t + 1) * blocks // count,
        }[config.schedule.name]
        self.plan = [(t + 1, lowest(t), batch) for t, batch in zip(stages, rows, strict=True)]
        self.step, self.saved, self.keep = 0, list[int](), keep

    def save(self) -> None:
        self.saved = [*(step for step in self.saved if step < self.step), self.step][-self.keep :]

    def resume(self) -> None:
        self.step = self.saved[-1] if self.saved else 0


class Process:
    """One life of the run: what setup, session and loop do, without a model."""

    def __init__(self, shape: Shape, output: Path, resume: str) -> None:
        config = shape.config.model_copy(update={"run": Run(name="a", seed=3, output_dir=str(output))})
        path = output / "a"
        self.config, self.steps_per_epoch = config, shape.steps_per_epoch
        total = total_steps_of(config, self.steps_per_epoch)
        parts: Any = SimpleNamespace(num_blocks={"blocks": shape.blocks})
        self.stages = stages_of(config, FAMILIES.get("bert"), parts, total)
        split = Tokenized(
            {"input_ids": Ragged.from_rows([[row] * length for row, length in enumerate(shape.lengths)])},
            np.array(shape.lengths),
            {"labels": np.arange(len(shape.lengths))},
        )
        self.loader = TrainLoader(
            split,
            {"input_ids": 0},
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=4,
            seed=config.run.seed,
            group_by_length=config.train.group_by_length,
        )
        self.identity = {"schedule's stages": [stage_values(stage) for stage in self.stages], "steps": self.steps_per_epoch}
        restore_replaced(path)
        found = None if resume == "never" else find_checkpoint(resume, path, self.identity)
        self.resumed_from = None if found is None else found.checkpoint.step
        self.step, self.stage = 0, self.stages[0]
        if found is not None:
            self.step, self.stage = found.checkpoint.step, derive_stage(self.stages, found.checkpoint)
        self.store = Store(path / FOLDER, config.checkpoint.keep)
        self.folder: RunFolder = open_folder(config, PLAN, path, found, self.store)
        self.feed = Feed()
        self._running = self._steps()

    def _steps(self) -> Iterator[tuple[Stage, list[int]]]:
        """As in `progscale.loop.train`: a stage begins where the run stands when the one before is done."""
        session: Any = self
        for stage in self.stages[self.stage.index - 1 :]:
            self.stage = stage
            for step, batch in Session.batches(session, stage, self.step):
                assert step == self.step
                yield stage, batch.rows.tolist()

    def switch(self) -> None:
        """The next stage begins; nothing is trained in it yet."""
        self.stage = self.stages[self.stage.index]
        self._running = self._steps()

    def train_step(self) -> tuple[int, int, list[int]]:
        """(stage, lowest live block, rows) of the step that is done."""
        stage, rows = next(self._running)
        self.step += 1
        self.folder.record("step", step=self.step, rows=rows)
        return stage.index, min(stage.live_blocks["blocks"], default=-1), rows

    @property
    def save_due(self) -> bool:
        session: Any = self
        return Session.save_due(session, self.step, self.stage)

    def save(self) -> None:
        state = saved_state(self.step, self.stage.index, self.identity, self.folder.sync())
        self.store.publish(self.store.begin(self.step), self.step, state, {})


def saved_state(step: int, stage: int, identity: dict[str, Any], metrics_bytes: int) -> dict[str, Any]:
    """All that state.json must have."""
    seconds = dict.fromkeys(("evaluation_seconds", "saving_seconds", "switch_seconds", "earlier_seconds"), 0.5)
    progress = {"step": step, "stage": stage, "evaluation_due": False, "metrics": {}, "best": {}, "best_step": 0}
    meter = dict.fromkeys(("rows", "tokens", "skipped_steps", "volume_before"), 0)
    return {
        **{"step": step, "stage": stage, "run": identity, "engine": "plain", "world_size": 1, "versions": {}},
        **{"loss_scale": None, "learning_rate": 0.1, "unlogged": [], "metrics_bytes": metrics_bytes, "parameters": {}},
        "progress": {**progress, **seconds, "stages": [], "skipped_in_a_row": 0, "carried": "none"},
        "meter": {**meter, "seconds": 0.0, "audit_seconds": 0.0, "peak": {}},
    }


@contextmanager
def killed_at(operation: int) -> Iterator[None]:
    """Ends the process at the n-th file operation of a save; what it was writing or deleting is left half done."""
    count = 0

    def dying(original: Callable[..., Any], half: Callable[..., None]) -> Callable[..., Any]:
        def operate(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count > operation:
                half(*arguments)
                raise Killed
            return original(*arguments, **named)

        return operate

    def tear(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])

    def delete_one(path: Path, *rest: Any) -> None:
        for entry in list(path.iterdir())[:1] if path.is_dir() else []:
            entry.unlink()

    def nothing(*arguments: Any) -> None:
        pass

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(store_module, "write_durably", dying(store_module.write_durably, tear)))
        for name in ("rename", "replace"):
            stack.enter_context(mock.patch.object(os, name, dying(getattr(os, name), nothing)))
        stack.enter_context(mock.patch.object(shutil, "rmtree", dying(shutil.rmtree, delete_one)))
        yield


class Machine(RuleBasedStateMachine):
    """What can happen to a run."""

    process: Process | None = None
    shape: Shape
    reference: Reference
    # More than is kept lies there only until the next save, after a kill.
    killed_in_save = False

    def __init__(self) -> None:
        super().__init__()
        # By step: which stages may have been at work when it was saved.
        self.saved_in: dict[int, set[int]] = {}
        memory = Path("/dev/shm")
        usable = memory.is_dir() and os.access(memory, os.W_OK)
        self.output = Path(tempfile.mkdtemp(prefix="progscale-machine-", dir=memory if usable else None))

    def teardown(self) -> None:
        self.kill()
        shutil.rmtree(self.output)

    @property
    def places(self) -> dict[int, Path]:
        """Checkpoints by their steps, with one that was being replaced when the process was killed."""
        folder = self.output / "a" / FOLDER
        found = [*Store(folder).replaced(), *folder.glob("step-*")]
        return {int(path.name.rpartition("-")[2]): path for path in found}

    @property
    def checkpoints(self) -> list[int]:
        return sorted(self.places)

    @initialize(shape=shapes())
    def begin(self, shape: Shape) -> None:
        self.shape, self.reference = shape, Reference(shape)
        self.process = Process(shape, self.output, "never")

    def alive(self) -> bool:
        return self.process is not None

    def unfinished(self) -> bool:
        return self.process is not None and self.reference.step < len(self.reference.plan)

    def dead(self) -> bool:
        return self.process is None and hasattr(self, "shape")

    @precondition(unfinished)
    @rule(steps=st.integers(1, 6))
    def train(self, steps: int) -> None:
        for _ in range(min(steps, len(self.reference.plan) - self.reference.step)):
            self.train_step()

    def train_step(self) -> None:
        assert self.process is not None
        stage, lowest, rows = self.reference.plan[self.reference.step]
        found_stage, found_lowest, found_rows = self.process.train_step()
        assert (found_stage, found_rows) == (stage, rows)
        assert found_lowest == (lowest if lowest < self.shape.blocks else -1)
        self.reference.step += 1
        assert self.process.step == self.reference.step
        if self.process.save_due:
            self.save()

    @precondition(unfinished)
    @rule()
    def train_to_the_end_of_the_epoch(self) -> None:
        self.train_step()
        while self.unfinished() and self.reference.step % self.shape.steps_per_epoch:
            self.train_step()

    @precondition(unfinished)
    @rule()
    def train_to_the_end_of_the_stage(self) -> None:
        self.train_step()
        while self.unfinished() and not self.at_a_boundary():
            self.train_step()

    def at_a_boundary(self) -> bool:
        return self.unfinished() and self.process is not None and self.process.step == self.process.stage.end_step

    @precondition(at_a_boundary)
    @rule(save=st.booleans())
    def switch(self, save: bool) -> None:
        assert self.process is not None
        self.process.switch()
        if save:
            self.save()

    @precondition(alive)
    @rule()
    def save(self) -> None:
        """Because it is due, or because the run was told to stop: also between two stages, and between a switch and a step."""
        assert self.process is not None
        self.process.save()
        self.saved_in[self.reference.step] = {self.process.stage.index}
        self.reference.save()
        self.killed_in_save = False
        latest = json.loads((self.output / "a" / FOLDER / LATEST).read_text())
        assert latest["step"] == self.reference.step
        assert self.checkpoints == self.reference.saved

    @rule()
    def kill(self) -> None:
        if self.process is not None:
            self.process.folder.close()  # the system does as much
        self.process = None

    @precondition(alive)
    @rule(operation=st.integers(0, 11))
    def kill_in_a_save(self, operation: int) -> None:
        assert self.process is not None
        before = list(self.reference.saved)
        self.saved_in.setdefault(self.reference.step, set()).add(self.process.stage.index)
        try:
            with killed_at(operation):
                self.process.save()
        except Killed:
            self.killed_in_save = True
        self.kill()
        # The one that was on its way is there, or it is not; of those before, none is lost that would be kept.
        if self.reference.step in self.checkpoints:
            self.reference.save()
        else:
            self.reference.saved = [step for step in before if step != self.reference.step]
        assert set(self.reference.saved) <= set(self.checkpoints)
        # One that was to be deleted may be there still, and be gone on from when the others are damaged.
        self.reference.saved = sorted({*self.reference.saved, *(step for step in before if step in self.checkpoints)})

    @precondition(lambda self: self.dead() and self.reference.saved)
    @rule(name=st.sampled_from([MANIFEST, STATE]), size=st.none() | st.integers(0, 40))
    def damage_the_newest(self, name: str, size: int | None) -> None:
        path = self.places[self.reference.saved.pop()] / name
        path.unlink()
        if size is not None:
            path.write_bytes(b"{" * size)
        self.killed_in_save = True  # it lies there beside those that are kept

    @precondition(dead)
    @rule(policy=st.sampled_from(["auto", "must"]))
    def resume(self, policy: str) -> None:
        before = self.reference.step
        self.reference.resume()
        if policy == "must" and not self.reference.saved:
            with pytest.raises(RejectedError, match="needs a valid checkpoint"):
                Process(self.shape, self.output, policy)
            self.reference.step = before
            return
        self.process = Process(self.shape, self.output, policy)
        assert self.process.resumed_from == (self.reference.step if self.reference.saved else None)
        assert self.process.step == self.reference.step <= before
        if self.reference.saved:
            assert self.process.stage.index in self.saved_in[self.reference.step]
        left = [path.name for path in (self.output / "a" / FOLDER).glob(".*")]
        assert not [name for name in left if name.startswith((STAGED, REPLACED))]

    @invariant()
    def the_records_are_those_of_the_run(self) -> None:
        """Each step once, in order; so within an epoch no row is lost and none comes twice."""
        if self.process is None:
            return
        lines = (self.output / "a" / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "step"]
        done = self.reference.plan[: self.reference.step]
        assert [(record["step"], record["rows"]) for record in records] == [(i + 1, rows) for i, (*_, rows) in enumerate(done)]
        for epoch in range(0, len(done), self.shape.steps_per_epoch):
            seen = [row for *_, rows in done[epoch : epoch + self.shape.steps_per_epoch] for row in rows]
            assert len(set(seen)) == len(seen)
            if len(done) - epoch >= self.shape.steps_per_epoch:
                assert sorted(seen) == list(range(len(self.shape.lengths)))

    @invariant()
    def no_more_are_kept_than_asked_for(self) -> None:
        if hasattr(self, "shape"):
            assert len(self.checkpoints) <= self.reference.keep + self.killed_in_save


@pytest.mark.parametrize("length", LENGTHS)
def test_a_run_goes_on_where_it_was(length: settings) -> None:
    run_state_machine_as_test(Machine, settings=settings(length, stateful_step_count=30))
