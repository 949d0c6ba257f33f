"""All that the loop needs of a run, and the small questions it asks."""

from __future__ import annotations

import functools
import gc
import logging
import platform
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from progscale import __version__
from progscale.blocks import Partition
from progscale.cache import CACHE_FOLDER, Feed, Nodes, Repeats
from progscale.checkpoint.reader import check_fits, load_optimizer, load_weights
from progscale.checkpoint.saver import Saved, Saver
from progscale.compiling import Compiler
from progscale.config import Config, dump_config
from progscale.data import GlobalBatch, MicroBatch, TrainLoader, eval_batches
from progscale.engine.base import Engine, StepResult, Switch
from progscale.errors import CheckpointError, WriteError
from progscale.export import export_model, exported_origin
from progscale.fit import SHARE_OF_FREE, fit_micro_batch
from progscale.learning_rate import LearningRate
from progscale.machine import command_line, cores, memory_bytes, processor
from progscale.meters import MemoryMeter, StageOperations
from progscale.methods import Method
from progscale.numbers import encode_numbers
from progscale.optim import StageBuild
from progscale.plan import Plan
from progscale.report import write_report
from progscale.resume import Resumed, fingerprint
from progscale.schedule import Stage
from progscale.signals import Signals, mark_begun
from progscale.tasks.base import Task, Tokenized
from progscale.trackers import RunConsole, RunFolder
from progscale.tracking import Tracking
from progscale.watch import Watch

log = logging.getLogger("progscale")

# Bits of what a rank tells the others with each step.
STOP, WRITTEN = 1, 2


@dataclass
class Session:
    """A run, ready to start. Only the main process has a `folder`.

    Attributes:
        padding: the value that fills up each model input, by name.
        about: what an export says of itself.
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one pass over the training split.
        saver: writes checkpoints.
        identity: what a checkpoint must have in common with this run.
        resumed: the checkpoint that the run goes on from.
        signals: what this process was told.
        watch: sees when another rank is gone.
        feed: how the frozen blocks are run.
        nodes: where the ranks are.
        steps_done: of the last checkpoint.
        finished: the run has come to its end, nobody will go on from it.
        stopping: some rank was told to stop, and all ranks know.
        unlogged: losses since the last record.
        tracking: services that are told the run's figures; the main process alone has them.
    """

    config: Config
    task: Task
    tokenizer: Any
    padding: Mapping[str, int]
    splits: Mapping[str, Tokenized]
    loader: TrainLoader
    partition: Partition
    method: Method[Any]
    builds: tuple[StageBuild, ...]
    plan: Plan
    learning_rate: LearningRate
    engine: Engine
    memory: MemoryMeter
    console: RunConsole
    folder: RunFolder | None
    total_steps: int
    steps_per_epoch: int
    saver: Saver
    identity: Mapping[str, Any]
    about: Mapping[str, Any]
    resumed: Resumed | None = None
    signals: Signals = field(default_factory=Signals)
    watch: Watch | None = None
    feed: Feed = field(default_factory=Feed)
    nodes: Nodes = field(default_factory=Nodes)
    compiler: Compiler | None = None
    stopping: bool = False
    steps_done: int = 0
    finished: bool = False
    unlogged: list[float] = field(default_factory=list)
    tracking: Tracking | None = None
    _written_everywhere: bool = False

    def __post_init__(self) -> None:
        # A rank that writes a large checkpoint is not silent; other ranks write other numbers of files.
        self.saver.sign = self.feed.sign = lambda: self.sign(None)

    @property
    def evaluation_splits(self) -> dict[str, Tokenized]:
        """All splits but "train"."""
        return {name: split for name, split in self.splits.items() if name != "train"}

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of every parameter."""
        return {name: info.numel for name, info in self.partition.parameters.items()}

    @property
    def model_path(self) -> Path:
        """Where the exported model goes; every rank takes part in an export, the main process writes."""
        return Path(self.config.run.output_dir) / self.config.run_name / "model"

    @property
    def skip_limit(self) -> int:
        """How many steps in a row may be left out for a loss or gradient that is not finite."""
        policy = self.config.train.nonfinite
        return 0 if policy == "stop" else int(policy.partition(":")[2])

    def batches(self, stage: Stage, start: int) -> Iterator[tuple[int, GlobalBatch]]:
        """(optimizer step, global batch) of a stage from step `start` on; a stage may begin and end inside an epoch."""
        step = start
        while step < stage.end_step:
            epoch, position = divmod(step, self.steps_per_epoch)
            upcoming = self.loader.epoch(epoch, start=position)
            batch = next(upcoming, None)
            while batch is not None:
                after = next(upcoming, None) if step + 1 < stage.end_step else None
                if after is not None:
                    self.feed.expect(after)
                yield step, batch
                step, batch = step + 1, after

    def evaluation_batches(self, split: Tokenized) -> Iterator[MicroBatch]:
        """This rank's micro-batches of an evaluation split."""
        size = self.config.train.eval_batch_size
        world_size, rank = self.engine.world_size, self.engine.rank
        batches = eval_batches(
            split,
            size,
            world_size,
            rank,
            pad=self.padding,
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            multiple_of=self.loader.multiple_of,
            min_tokens=self.loader.min_tokens,
            nodes=self.loader.nodes,
        )
        return self.console.track(batches, len(split), world_size)

    # -- stopping and saving --------------------------------------------------------------------------------------

    def sign(self, where: str | None) -> None:
        """Tells the watch that this rank goes on, and where it stands; None where other ranks may not come by as often."""
        if self.watch is not None:
            self.watch.sign(where)

    def notice(self) -> int:
        """What this rank tells the others with a step: whether it was told to stop, and whether its checkpoint is written."""
        return STOP * (self.signals.received is not None) + WRITTEN * self.saver.written

    def heed(self, notices: Sequence[int]) -> None:
        """Takes in what all ranks told with a step."""
        self.stopping = self.stopping or any(notice & STOP for notice in notices)
        self._written_everywhere = all(notice & WRITTEN for notice in notices)

    def ask_to_stop(self) -> bool:
        """Whether some rank was told to stop. A collective."""
        self.stopping = self.stopping or self.engine.any_true(self.signals.received is not None)
        return self.stopping

    def begin_stage(self, build: StageBuild, step: int) -> Switch:
        """Switches to a stage; the first one of a resumed run gets its weights and its optimizer's state from the checkpoint.

        Args:
            build: of the stage.
            step: optimizer steps done.
        """
        self.sign(f"switching to stage {build.stage.index}")
        if self.resumed is None or self.engine.build is not None:
            switch = self.engine.begin_stage(build)
        else:
            checkpoint = self.resumed.checkpoint
            check_fits(checkpoint, self.engine)
            load_weights(checkpoint, self.engine)
            switch = self.engine.begin_stage(build)
            requantized = load_optimizer(checkpoint, self.engine)
            switch = replace(switch, requantized=switch.requantized + requantized)
            if checkpoint.state["loss_scale"] is not None and self.engine.scales_loss:
                self.engine.load_scaler_state(checkpoint.state["loss_scale"])
        self.saver.reserve()
        if switch.requantized:
            self.console.show(
                f"stage {build.stage.index}: {switch.requantized} values of the optimizer's 8-bit state were quantised anew, "
                "their blocks lie elsewhere than before: the run goes on close to one that was never moved, not equal to it"
            )
            self.log("requantized", stage=build.stage.index, values=switch.requantized)
        if self.compiler is not None:
            self.compiler.begin_stage(self.depth_of(build.stage) if self.config.frozen_mode == "eval" else 0)
        self._fit(build.stage)
        self.feed.begin_stage(build.stage.index, self.depth_of(build.stage), self.repeats(step))
        if self.resumed is not None and build.stage.index == self.resumed.checkpoint.state["stage"] and self.engine.is_main:
            self.feed.restore(self.resumed.checkpoint.state.get("cache") or {})
        return switch

    def _fit(self, stage: Stage) -> None:
        """Finds the stage's micro-batch, where the config leaves it open; one that goes on keeps what it had. A collective."""
        train = self.config.train
        if train.micro_batch_size != "auto":
            return
        saved = None
        if self.resumed is not None:
            state = self.resumed.checkpoint.state
            if (state["stage"], state["world_size"]) == (stage.index, self.engine.world_size):
                saved = state.get("micro_batch_size")
        if saved is not None:
            self.loader.micro_batch_size = int(saved)
            return
        limit = None if train.memory_gigabytes is None else int(train.memory_gigabytes * 1e9)
        # A cache in the CPU's memory takes half of what is free there, and may not have done so yet.
        both = self.engine.device.type == "cpu" and self.config.cache.storage in ("auto", "ram")
        fit = fit_micro_batch(
            self.engine,
            self.loader,
            self.task.loss,
            local_ranks=self.nodes.local,
            limit_bytes=limit,
            share_of_free=SHARE_OF_FREE / 2 if both else SHARE_OF_FREE,
        )
        self.loader.micro_batch_size = fit.rows
        self.console.show(f"stage {stage.index}: {fit}")
        self.log("micro_batch", stage=stage.index, **asdict(fit))

    def operations(self, stage: Stage) -> StageOperations | None:
        """What a stage's steps compute, by the plan's arithmetic; None for several stacks, which see rows of other lengths."""
        if len(self.partition.num_blocks) > 1:
            return None
        work, train = self.plan.stages[stage.index - 1].work, self.config.train
        a_row = work.flops(train.max_length, self.plan.width).total
        return StageOperations(
            work,
            self.plan.baseline_work,
            self.plan.width,
            block=int(next(iter(self.plan.block_parameters.values()))),
            planned=a_row * train.global_batch_size * stage.steps,
            countable=train.compile == "off",
        )

    def depth_of(self, stage: Stage) -> int:
        """Blocks of the first stack that no gradient reaches in a stage."""
        most = next(iter(self.partition.num_blocks.values()))
        return min(most, self.plan.stages[stage.index - 1].lowest_trained)

    def repeats(self, step: int) -> Repeats:
        """How often rows are run again, when `step` optimizer steps are done."""
        left = len(self._evaluated_after) - bisect_left(self._evaluated_after, step)
        return Repeats.after(step, self.total_steps, self.steps_per_epoch, max(0, left - 1))

    @functools.cached_property
    def _evaluated_after(self) -> list[int]:
        """Steps after which the run is evaluated, ascending."""
        stages = {build.stage.end_step - 1: build.stage for build in self.builds}
        last = max(stages)
        steps = sorted({*stages, *range(self.steps_per_epoch - 1, last, self.steps_per_epoch)})
        stage_of = {step: stages[min(end for end in stages if end >= step)] for step in steps}
        return [step + 1 for step in steps if self.evaluation_due(step, stage_of[step])]

    def cache_counts(self) -> dict[str, int] | None:
        """What the cache did in this stage, over all ranks; None without one. A collective."""
        counts = self.engine.gather_objects(dict(self.feed.counts()))
        if not counts[0]:
            return None
        largest = max(self.engine.gather_objects(self.feed.bytes))
        return {key: sum(part[key] for part in counts) for key in counts[0]} | {"bytes": largest}

    def builds_from(self, stage: int) -> tuple[StageBuild, ...]:
        """The stages that are left, from the 1-based `stage` on."""
        return tuple(build for build in self.builds if build.stage.index >= stage)

    def save_due(self, step: int, stage: Stage) -> bool:
        """Whether to save when `step` optimizer steps are done."""
        when = self.config.checkpoint
        by_steps = when.every_steps is not None and step % when.every_steps == 0
        by_epoch = when.at_epochs and step % self.steps_per_epoch == 0
        return bool(by_steps or by_epoch or (when.at_stages and step == stage.end_step))

    def save(self, step: int, stage: Stage, content: Mapping[str, Any]) -> float:
        """Saves after `step` optimizer steps; when the run is stopping it is on the disk at the return. A collective.

        Args:
            step: optimizer steps done.
            stage: at work.
            content: of the loop: what it needs to go on.

        Returns:
            Seconds for which training stood still.

        Raises:
            CheckpointError: it cannot be written, and `checkpoint.on_error` is "stop".
        """
        begin, self.steps_done = time.perf_counter(), step
        # When the run is to stop, the one before may fail: this one is tried all the same.
        self._report(self._finish, must=not self.stopping and self._must_save)
        self.sign(f"saving step {step}")
        state = {
            **content,
            "step": step,
            "stage": stage.index,
            "epoch": step // self.steps_per_epoch,
            "position": step % self.steps_per_epoch,
            "seed": self.config.run.seed,
            "learning_rate": self.learning_rate(min(step, self.total_steps - 1)),
            "loss_scale": self.engine.scaler_state(),
            "engine": self.engine.name,
            "world_size": self.engine.world_size,
            "micro_batch_size": self.loader.micro_batch_size if self.config.train.micro_batch_size == "auto" else None,
            "run": dict(self.identity),
            "config": dump_config(self.config),
            "versions": self.environment["versions"],
            "metrics_bytes": self.folder.sync() if self.folder is not None else 0,
            "parameters": self.engine.sizes(),
        }
        # A run that is stopping would be lost: its failure must be seen.
        save = functools.partial(self.saver.save, step, encode_numbers(state), wait=self.stopping)
        self._report(save, must=self.stopping or self._must_save)
        return time.perf_counter() - begin

    def publish(self) -> None:
        """Publishes a background save that all ranks have written. A collective.

        Raises:
            CheckpointError: it cannot be written, and `checkpoint.on_error` is "stop".
        """
        if self.publish_due:
            self._report(self._finish, must=self._must_save)

    def finish_saving(self, *, ends_anyway: bool = False) -> None:
        """Waits for a background save that is on its way, and publishes it. A collective.

        Args:
            ends_anyway: the run ends by an error of its own, beside which a failure is only shown.

        Raises:
            CheckpointError: as for `publish`.
        """
        self._report(self._finish, must=self._must_save and not ends_anyway)

    def _finish(self) -> Saved | None:
        self._written_everywhere = False
        return self.saver.finish()

    @property
    def _must_save(self) -> bool:
        return self.config.checkpoint.on_error == "stop"

    @property
    def publish_due(self) -> bool:
        """Whether all ranks have written a background save that is not published yet."""
        return self.saver.busy and self._written_everywhere

    def _report(self, action: Callable[[], Saved | None], *, must: bool) -> None:
        try:
            saved = action()
        except CheckpointError as error:
            if must:
                raise
            self.console.show(f"warning: {error}")
            self.log("checkpoint_failed", message=str(error))
            return
        if saved is not None:
            if self.engine.is_main:
                mark_begun()
            self.log(
                "checkpoint",
                step=saved.step,
                path=saved.path.name,
                bytes=saved.bytes,
                blocked_seconds=saved.blocked_seconds,
                seconds=saved.seconds,
            )

    # -- what is due, what is shown -------------------------------------------------------------------------------

    def evaluation_due(self, step: int, stage: Stage) -> bool:
        """Whether to evaluate after optimizer step `step` (0-based); always after the last."""
        done = step + 1
        if done == self.total_steps:
            return True
        return {
            "epoch": done % self.steps_per_epoch == 0,
            "stage": done == stage.end_step,
            "end": False,
        }[self.config.train.evaluate]

    def is_better(self, metrics: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether the primary metric is better than the best so far (a NaN never is, unless it is the first)."""
        if not best:
            return True
        new, old = metrics[self.task.primary_metric], best[self.task.primary_metric]
        return old != old or (new > old if self.task.higher_is_better else new < old)

    def best_so_far(self, best: dict[str, float], step: int) -> tuple[dict[str, float], int]:
        """Scores and step of the best model, for a run that goes on: those of the model that lies in its folder. A collective.

        It may be of a later step than the checkpoint, exported before the run was stopped.
        """
        if self.config.train.save_model != "best":
            return best, step
        origin = self.engine.on_main(lambda: exported_origin(self.model_path))
        if origin is None or self.task.primary_metric not in origin["metrics"]:
            return {}, 0
        return (best, step) if origin["step"] == step else (origin["metrics"], origin["step"])

    def export(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the model as it is after `step` optimizer steps. A collective.

        Raises:
            WriteError: it cannot be written.
        """
        export_model(
            self.engine,
            self.tokenizer,
            self.model_path,
            step=step,
            metrics=metrics,
            save=self.method.save,
            names=self.method.exported(self.partition),
            about=self.about,
        )

    def first_block(self, stage: Stage) -> int | dict[str, int]:
        """The stage's lowest live block, by stack where the model has several."""
        by_stack = stage.first_block(self.partition.num_blocks)
        return next(iter(by_stack.values())) if len(by_stack) == 1 else by_stack

    def log(self, kind: str, **values: Any) -> None:
        """A line in metrics.jsonl, and what trackers take of it."""
        if self.folder is not None:
            self.folder.record(kind, **values)
        if self.tracking is not None:
            self.tracking.record(kind, values)
            self._tell(self.tracking.failures())

    def _tell(self, failures: Sequence[str]) -> None:
        for message in failures:
            self.console.show(f"warning: {message}")
            if self.folder is not None:
                self.folder.record("tracker_failed", message=message)

    def log_step(self, step: int, stage: int, result: StepResult, rate: float) -> None:
        """Shows a step, and records the mean loss since the last record at each logging step; faulty steps do not count."""
        if result.fault is None:
            self.unlogged.append(result.loss)
        self.console.step(step, stage, result.loss, rate)
        if (step + 1) % self.config.train.logging_steps == 0 or step + 1 == self.total_steps:
            mean = sum(self.unlogged) / len(self.unlogged) if self.unlogged else None
            self.unlogged.clear()
            self.log("step", step=step + 1, stage=stage, loss=mean, grad_norm=result.grad_norm, learning_rate=rate)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json, by the main process. A collective.

        Raises:
            WriteError: it cannot be written.
        """

        def write() -> None:
            assert self.folder is not None
            try:
                self.folder.write("summary.json", summary)
            except OSError as error:
                raise WriteError(f"the run is done, but its summary.json cannot be written: {error}") from error
            try:
                write_report(self.folder.path)
            except Exception as error:
                # All that it shows lies in the folder: no page is worth a run, whatever is wrong with it.
                log.warning("the report could not be written (%s); progscale report %s makes it", error, self.folder.path)

        self.engine.on_main(write)
        self.finished = True

    def close(self) -> None:
        """Lets go of the engine, the progress bar and the process group."""
        self.console.end()
        if self.tracking is not None:
            self._tell(self.tracking.close())
        if self.folder is not None:
            self.folder.close()
        self.feed.close(finished=self.finished)
        if self.compiler is not None:
            self.compiler.close()
        if self.finished and self.engine.is_main:
            # Of a run that was stopped with a cache, and went on without one.
            shutil.rmtree(self.model_path.parent / CACHE_FOLDER, ignore_errors=True)
        self.engine.close()
        self.engine.accelerator.end_training()
        gc.unfreeze()  # frozen by `prepare`

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What the run is, for those who compare it with others: the data by their content, what is scored, where it runs."""
        return {
            "task": self.task.name,
            "model": self.plan.model,
            "method": self.method.name,
            "schedule": self.config.schedule.name,
            "embeddings": self.config.schedule.embeddings,
            "frozen_mode": self.config.frozen_mode,
            "cache": self.config.cache.storage,
            "engine": self.engine.name,
            "world_size": self.engine.world_size,
            "primary_metric": self.task.primary_metric,
            "higher_is_better": self.task.higher_is_better,
            "data": {name: {"rows": len(split), "content": fingerprint(split)} for name, split in self.splits.items()},
            **self.environment,
        }

    @property
    def environment(self) -> dict[str, Any]:
        """What figures depend on: versions, device, threads, precision, seed."""
        device = self.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        packages = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes")
        return {
            "seed": self.config.run.seed,
            "precision": self.config.train.precision,
            "device": name,
            "device_type": device.type,
            "cores": cores(),
            "machine_memory_bytes": memory_bytes(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "command": command_line(),
            "versions": {"progscale": __version__, **{package: version(package) for package in packages}},
        }
