"""What frozen blocks save: time of a schedule as a share of plain fine-tuning, step by step on the same batches.

    python benchmarks/stage_speed.py                                    all rows of the table, BERT-base shape, bf16
    python benchmarks/stage_speed.py --rows first_stage cache-10 --steps-per-epoch 8
    python benchmarks/stage_speed.py --model bert-large-uncased --batch 32 --max-length 384

Two engines over the same random weights take turns step by step, so that a slow second of the machine hits both: one trains all
in every step, the other has the row's schedule, embeddings policy, method and cache. Both take the step as the loop does it
(seeding, batches by length, loss, clipping, fused AdamW). The ratio is that of the sums over the run; `limit` is what the blocks
alone could give (`compute_share` of the plan), without the optimizer's step, which frozen parameters save too.

Switches, and the audit of frozen tensors, are left out: at these few steps an epoch they would stand for more than they are in a
real run. The cache's first look is in it, two micro-batches that are computed from the tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from common import machine, random_encoder, reset_accelerate, show_machine, show_table, write_json
from workload import CLIP, DECAY, LR, row_loss, synthetic

from progscale.blocks import partition
from progscale.cache import CacheSettings, Feed, Nodes, PrefixCache, Repeats
from progscale.cli import quiet_libraries
from progscale.data import TrainLoader
from progscale.engine.base import EngineSettings
from progscale.engine.launch import create_engine, make_accelerator, set_up_cpu
from progscale.engine.loading import load_module
from progscale.layers import seeded
from progscale.loop import seed_step
from progscale.methods import Subject, make_method
from progscale.models.loading import find_family
from progscale.optim import build_for
from progscale.optimizers import AdamW
from progscale.plan import compute_share, make_plan
from progscale.prefix import Prefix
from progscale.schedule import build_stages
from progscale.tasks.base import Tokenized


@dataclass(frozen=True)
class Row:
    """A row of the table: what is compared with the same method without stages."""

    epochs: int
    stages: int
    embeddings: str
    cache: bool = False
    method: str = "full"


ROWS = {
    "always": Row(3, 3, "always"),
    "first_stage": Row(3, 3, "first_stage"),
    "cache-6-3": Row(6, 3, "first_stage", cache=True),
    "cache-10": Row(10, 10, "first_stage", cache=True),
    "cache-3-12": Row(3, 12, "first_stage", cache=True),
    "lora-cache-10": Row(10, 10, "never", cache=True, method="lora"),
}


class Side:
    """One of the two runs."""

    def __init__(self, options: argparse.Namespace, row: Row, split: Tokenized, schedule: str, *, cache: bool) -> None:
        request = random_encoder(options.model)
        family = find_family(request, None)
        method = make_method(row.method, Subject(family, precision=options.precision))
        reset_accelerate()
        accelerator = make_accelerator(deepspeed=None)
        torch.manual_seed(0)
        with seeded(0):
            module = method.prepare(load_module(request, family, None)).train()
        self.loader = TrainLoader(
            split,
            {"input_ids": 0},
            global_batch_size=options.batch,
            micro_batch_size=options.micro_batch or options.batch,
            seed=1,
        )
        per_epoch = self.loader.steps_per_epoch
        self.total = row.epochs * per_epoch
        parts = partition(module, family)
        stages = build_stages(
            schedule,
            num_blocks=parts.num_blocks,
            stages=1 if schedule == "none" else row.stages,
            total_steps=self.total,
            embeddings="always" if schedule == "none" else cast(Any, row.embeddings),
            options={},
        )
        self.plan = make_plan(parts, stages, method, per_epoch)
        self.builds = build_for(stages, parts, method, weight_decay=DECAY)
        settings = EngineSettings(options.precision, AdamW(), CLIP, self.loader.micro_batch_size)
        self.engine = create_engine(module, settings, accelerator, None)
        self.feed = Feed()
        if cache:
            where = CacheSettings("ram", Path(tempfile.gettempdir()), "")
            self.feed = PrefixCache(self.engine, Prefix(self.engine, family), parts, {"train": split}, Nodes(), where, print)
        self.per_epoch = per_epoch
        self.seconds: list[float] = []
        self.switch_seconds: list[float] = []

    def step(self, number: int, batch: Any) -> None:
        """The next step; a stage begins before it where one does."""
        left = Repeats.after(number, self.total, self.per_epoch)
        for build, stage in zip(self.builds, self.plan.stages, strict=True):
            if build.stage.start_step == number:
                self.switch_seconds.append(self.engine.begin_stage(build).seconds)
                self.feed.begin_stage(build.stage.index, stage.lowest_trained, left)
        self.engine.synchronize()
        begin = time.perf_counter()
        seed_step(1, number, 0)
        self.feed.at(left)
        self.engine.train_step(batch.micro_batches, batch.weight, row_loss, LR, around=self.feed.around)
        self.engine.synchronize()
        self.seconds.append(time.perf_counter() - begin)


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Both sides of a row, step by step."""
    row = ROWS[name]
    split = synthetic(options.batch * options.steps_per_epoch, options.max_length, 30000)
    none, ours = Side(options, row, split, "none", cache=False), Side(options, row, split, "progtuning", cache=row.cache)
    number = 0
    for epoch in range(row.epochs):
        for batch in none.loader.epoch(epoch):
            # Who goes first changes.
            for side in (none, ours) if number % 2 else (ours, none):
                side.step(number, batch)
            number += 1
    # The very first step of a process warms up.
    pairs = list(zip(ours.seconds, none.seconds, strict=True))[1:]
    ratio = sum(first for first, _ in pairs) / sum(second for _, second in pairs)
    by_stage = [
        statistics.median(a / b for a, b in pairs[max(0, build.stage.start_step - 1) : build.stage.end_step - 1])
        for build in ours.builds
    ]
    share = compute_share(ours.plan, cache=row.cache)
    result = {
        "row": name,
        "ratio": ratio,
        "limit": share,
        "by_stage": by_stage,
        "seconds_none": sum(none.seconds),
        "median_step_none": statistics.median(none.seconds),
        "seconds_switch": sum(ours.switch_seconds[1:]),
        "median_switch": statistics.median(ours.switch_seconds[1:]),
        "steps": ours.total,
    }
    for side in (none, ours):
        side.feed.close(finished=True)
        side.engine.close()
    return result


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--model", default="bert-base-uncased", help="well-known architecture, with random weights")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of both sides")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--micro-batch", type=int, help="rows run at once; default: all of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row at most (they have 53 in the mean, as MRPC)")
    parser.add_argument("--steps-per-epoch", type=int, default=8, help="steps of an epoch")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    for name in options.rows:
        # The run's very first step is not counted, and every stage needs one that is.
        fewest = 2 * ROWS[name].stages / ROWS[name].epochs
        if options.steps_per_epoch < fewest:
            parser.error(
                f"--steps-per-epoch: {options.steps_per_epoch}; {name} needs {math.ceil(fewest)}, two steps for each stage"
            )
    quiet_libraries()
    threads = set_up_cpu(options.threads)
    results = []
    for name in options.rows:
        results.append(measure(options, name))
        print(f"{name}: {results[-1]['ratio']:.3f}", flush=True)
    show_machine()
    size = f"{options.batch} rows a step, {options.steps_per_epoch} steps an epoch"
    print(f"{options.model}, {options.precision}, {threads} threads, {size}")
    header = ["row", "ratio", "limit", "first stage", "last stage", "s a step (none)", "s a switch"]
    show_table(
        header,
        [
            [r["row"], r["ratio"], r["limit"], r["by_stage"][0], r["by_stage"][-1], r["median_step_none"], r["median_switch"]]
            for r in results
        ],
    )
    write_json(options.output, {"options": {**vars(options), "output": str(options.output)}, **machine(), "results": results})


if __name__ == "__main__":
    main()
