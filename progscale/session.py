"""All that the loop needs of a run, and the small questions it asks."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from progscale import __version__
from progscale.blocks import Partition
from progscale.config import Config
from progscale.data import GlobalBatch, MicroBatch, TrainLoader, eval_batches
from progscale.engine.base import Engine, StepResult
from progscale.learning_rate import LearningRate
from progscale.meters import MemoryMeter
from progscale.optim import StageBuild
from progscale.plan import Plan
from progscale.schedule import Stage
from progscale.tasks.base import Task, Tokenized
from progscale.trackers import RunConsole, RunFolder


@dataclass
class Session:
    """A run, ready to start. Only the main process has a `folder`.

    Attributes:
        padding: the value that fills up each model input, by name.
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one pass over the training split.
    """

    config: Config
    task: Task
    tokenizer: Any
    padding: Mapping[str, int]
    splits: Mapping[str, Tokenized]
    loader: TrainLoader
    partition: Partition
    builds: tuple[StageBuild, ...]
    plan: Plan
    learning_rate: LearningRate
    engine: Engine
    memory: MemoryMeter
    console: RunConsole
    folder: RunFolder | None
    total_steps: int
    steps_per_epoch: int
    _unlogged: list[float] = field(default_factory=list)

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

    def batches(self, stage: Stage) -> Iterator[tuple[int, GlobalBatch]]:
        """(optimizer step, global batch) of a stage; a stage may begin and end inside an epoch."""
        step = stage.start_step
        while step < stage.end_step:
            epoch, position = divmod(step, self.steps_per_epoch)
            for batch in self.loader.epoch(epoch, start=position):
                yield step, batch
                step += 1
                if step == stage.end_step:
                    return

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
        )
        return self.console.track(batches, len(split), world_size)

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

    def first_block(self, stage: Stage) -> int | dict[str, int]:
        """The stage's lowest live block, by stack where the model has several."""
        by_stack = stage.first_block(self.partition.num_blocks)
        return next(iter(by_stack.values())) if len(by_stack) == 1 else by_stack

    def log(self, kind: str, **values: Any) -> None:
        """A line in metrics.jsonl."""
        if self.folder is not None:
            self.folder.record(kind, **values)

    def log_step(self, step: int, stage: int, result: StepResult, rate: float) -> None:
        """Shows a step, and records the mean loss since the last record at each logging step; faulty steps do not count."""
        if result.fault is None:
            self._unlogged.append(result.loss)
        self.console.step(step, stage, result.loss, rate)
        if (step + 1) % self.config.train.logging_steps == 0 or step + 1 == self.total_steps:
            mean = sum(self._unlogged) / len(self._unlogged) if self._unlogged else None
            self._unlogged.clear()
            self.log("step", step=step + 1, stage=stage, loss=mean, grad_norm=result.grad_norm, learning_rate=rate)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json, by the main process."""
        if self.folder is not None:
            self.folder.write("summary.json", summary)
            self.folder.close()

    def close(self) -> None:
        """Lets go of the engine, the progress bar and the process group."""
        self.console.end()
        self.engine.close()
        self.engine.accelerator.end_training()
        gc.unfreeze()  # frozen by `prepare`

    @property
    def environment(self) -> dict[str, Any]:
        """What figures depend on: versions, device, threads, precision, seed."""
        device = self.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        packages = ("torch", "transformers", "accelerate", "deepspeed")
        return {
            "seed": self.config.run.seed,
            "precision": self.config.train.precision,
            "device": name,
            "threads": torch.get_num_threads(),
            "versions": {"progscale": __version__, **{package: version(package) for package in packages}},
        }
