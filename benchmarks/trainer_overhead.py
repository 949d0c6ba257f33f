"""How much of the machine progscale's loop leaves to the model: samples a second against a bare loop and transformers' Trainer.

    python benchmarks/trainer_overhead.py                                       MiniLM on MRPC, bf16, 6 rounds of 20 steps
    python benchmarks/trainer_overhead.py --model bert-base-uncased --random-weights --synthetic --steps 5
    python benchmarks/trainer_overhead.py --ranks 2 --trainer-sampling group_by_length         the Trainer tuned, on two ranks
    python benchmarks/trainer_overhead.py --task rte --trainer-padding max_length --trainer-precision fp32   as its example is run

All sides run in one process, in turns of --steps steps, so that a slow minute of the machine hits all of them:
* progscale: `schedule none` on the plain engine, batches from its loader, seeding, meter and console of the real loop;
* bare: a handwritten PyTorch loop over the same batches, collated beforehand; fused AdamW, clipping, autocast, same threads;
* trainer: transformers' Trainer as it comes: its collator, random order, fused AdamW, logging.

How to read it: `vs bare` is progscale's samples/s over the bare loop's by round, at least 0.97 wanted; `vs trainer` at least 1.0.
The Trainer pads batches of random lengths, progscale groups like lengths; --trainer-sampling group_by_length takes that out. Its
example for GLUE pads every row to the longest allowed (--trainer-padding max_length) and computes in fp32. On several ranks all
sides use DDP over gloo. Only a quiet machine gives figures worth keeping: look at the spread first.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from common import (
    DATA,
    FOLDERS,
    fetch_encoder,
    machine,
    random_encoder,
    reset_accelerate,
    show_machine,
    show_table,
    torchrun,
    write_json,
)
from plain_trainer import load
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from workload import CLIP, DECAY, LR, row_loss, synthetic

from progscale.blocks import partition
from progscale.cli import quiet_libraries
from progscale.config import Config
from progscale.config.schema import Model, Run, Task
from progscale.data import GlobalBatch, TrainLoader, pad_values
from progscale.engine.base import Engine, EngineSettings
from progscale.engine.launch import create_engine, make_accelerator, set_up_cpu
from progscale.engine.loading import load_module
from progscale.engine.ranks import barrier
from progscale.loop import seed_step
from progscale.meters import Audit, MemoryMeter, StageMeter
from progscale.methods import Subject, make_method
from progscale.models.loading import family_of, find_family
from progscale.optim import StageBuild, build_for
from progscale.optimizers import AdamW
from progscale.schedule import build_stages
from progscale.tasks.base import Tokenized
from progscale.tasks.demo import demo_tokenizer
from progscale.trackers import RunConsole


class Examples(Dataset[dict[str, Any]]):
    """A tokenised split as the Trainer's own collator wants it."""

    def __init__(self, split: Tokenized) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> dict[str, Any]:
        inputs = {name: column[row].tolist() for name, column in self.split.columns.items()}
        return {**inputs, "labels": int(self.split.labels["labels"][row])}


class Progscale:
    """The engine with what the loop does around each step."""

    def __init__(self, engine: Engine, build: StageBuild, sizes: dict[str, int], total: int) -> None:
        self.engine = engine
        audit = Audit(engine, build)
        engine.begin_stage(build)
        self.meter = StageMeter(engine, build, sizes, MemoryMeter(engine.device), audit)
        self.console = RunConsole(engine.is_main)
        self.console.begin(total)
        self.meter.start()
        self.step = 0

    def run(self, batches: Iterator[GlobalBatch], steps: int) -> None:
        """The next steps, as the loop does them."""
        for batch in itertools.islice(batches, steps):
            seed_step(1, self.step, 0)
            result = self.engine.train_step(batch.micro_batches, batch.size, row_loss, LR)
            self.meter.step(batch.size, batch.tokens, result.applied)
            self.console.step(self.step, 1, result.loss, LR)
            self.step += 1


class Bare:
    """The loop that one writes by hand."""

    def __init__(self, model: torch.nn.Module, precision: str, ranks: int) -> None:
        # DDP averages over ranks; the sum over the batch is wanted.
        self.model = model if ranks == 1 else torch.nn.parallel.DistributedDataParallel(model)
        self.ranks = ranks
        self.precision = precision
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)

    def run(self, batches: Sequence[GlobalBatch]) -> None:
        """A step for each batch."""
        for batch in batches:
            for micro in batch.micro_batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                    outputs = self.model(**micro.inputs)
                    loss = row_loss(outputs, micro.labels).sum() * self.ranks / batch.size
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Turns(TrainerCallback):
    """The Trainer is the clock: after each of its blocks the other sides have theirs."""

    def __init__(self, steps: int, others: dict[str, Any]) -> None:
        self.steps = steps
        self.others = others
        self.seconds: dict[str, list[float]] = {"trainer": [], **{name: [] for name in others}}
        self.begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The first turn begins."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """After the last step of a turn, the others have theirs."""
        if state.global_step % self.steps:
            return
        self.seconds["trainer"].append(time.perf_counter() - self.begun)
        rounds = len(self.seconds["trainer"])
        # Who goes first changes, so that no side always meets the other's warm caches.
        for name in list(self.others)[:: 1 if rounds % 2 else -1]:
            self.seconds[name].append(self.others[name]())
        self.begun = time.perf_counter()


def prepare(options: argparse.Namespace) -> tuple[torch.nn.Module, Any, Tokenized]:
    """Model, tokenizer (for padding) and training split."""
    data = options.data / FOLDERS[options.task]
    if options.random_weights or options.synthetic or not data.is_dir():
        request = random_encoder(options.model or "bert-base-uncased")
        torch.manual_seed(0)
        model = load_module(request, find_family(request, None), None)
        split = synthetic(4096, options.max_length, int(cast(Any, model).config.vocab_size))
        return model, demo_tokenizer(), split
    config = Config(
        run=Run(seed=1), model=Model(name=options.model or str(fetch_encoder())), task=Task(name=options.task, path=str(data))
    )
    task, tokenizer, model = load(config)
    return model, tokenizer, task.tokenize(tokenizer, options.max_length)["train"]


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Samples a second by round, for each side."""
    threads = set_up_cpu(options.threads)
    model, tokenizer, split = prepare(options)
    accelerator = make_accelerator(deepspeed=None)
    count, rank = int(accelerator.num_processes), int(accelerator.process_index)
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{parameters / 1e6:.1f} M parameters, {len(split)} rows, {count} ranks of {threads} threads")
    model.train()
    size, steps = options.batch, options.steps
    loader = TrainLoader(
        split,
        pad_values(tokenizer),
        global_batch_size=size,
        micro_batch_size=size // count,
        seed=1,
        world_size=count,
        rank=rank,
    )
    total = steps * (options.rounds + 1)
    collated = list(itertools.islice(endless(loader), total))

    parts = partition(model, family_of(model))
    stages = build_stages("none", num_blocks=parts.num_blocks, stages=1, total_steps=total, embeddings="always", options={})
    build = build_for(stages, parts, make_method("full", Subject(family_of(model))), weight_decay=DECAY)[0]
    settings = EngineSettings(options.precision, AdamW(), CLIP, size // count)
    engine = create_engine(copy.deepcopy(model), settings, accelerator, None)
    sizes = {name: info.numel for name, info in parts.parameters.items()}
    ours, bare = Progscale(engine, build, sizes, total), Bare(copy.deepcopy(model), options.precision, count)
    batches, bare_batches = endless(loader), iter(collated)

    def run_ours() -> float:
        barrier()
        start = time.perf_counter()
        ours.run(batches, steps)
        return time.perf_counter() - start

    def run_bare() -> float:
        mine = list(itertools.islice(bare_batches, steps))
        barrier()
        start = time.perf_counter()
        bare.run(mine)
        return time.perf_counter() - start

    turns = Turns(steps, {"progscale": run_ours, "bare": run_bare})
    reset_accelerate()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            ddp_backend="gloo" if count > 1 else None,
            bf16=(options.trainer_precision or options.precision) == "bf16",
            per_device_train_batch_size=size // count,
            report_to="none",
            max_steps=total,
            learning_rate=LR,
            weight_decay=DECAY,
            save_strategy="no",
            train_sampling_strategy=options.trainer_sampling,
        )
        collator = DataCollatorWithPadding(tokenizer, padding=options.trainer_padding, max_length=options.max_length)
        Trainer(model=model, args=arguments, train_dataset=Examples(split), data_collator=collator, callbacks=[turns]).train()
    ours.console.end()
    # The first round warms up.
    return {name: [size * steps / seconds for seconds in times[1:]] for name, times in turns.seconds.items()}


def endless(loader: TrainLoader) -> Iterator[GlobalBatch]:
    """All epochs, one after the other."""
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an encoder, or a well-known architecture; default: MiniLM")
    parser.add_argument("--random-weights", action="store_true", help="random weights and synthetic rows: nothing is downloaded")
    parser.add_argument("--synthetic", action="store_true", help="the same")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with glue/MRPC; synthetic rows where there is none")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of all sides")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side, after one to warm up")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--trainer-sampling", choices=["random", "group_by_length"], default="random", help="the Trainer's order")
    parser.add_argument("--trainer-padding", choices=["longest", "max_length"], default="longest", help="how the Trainer pads")
    parser.add_argument("--trainer-precision", choices=["bf16", "fp32"], help="of the Trainer; default: that of all sides")
    parser.add_argument("--task", choices=["mrpc", "rte"], default="mrpc", help="whose training rows")
    parser.add_argument("--ranks", type=int, default=1, help="processes of this machine")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    if options.ranks > 1 and "RANK" not in os.environ:
        return torchrun(options.ranks, __file__, *(sys.argv[1:] if given is None else given))
    quiet_libraries()
    speeds = measure(options)
    if os.environ.get("RANK", "0") != "0":
        return None
    ratios = {
        f"vs {other}": [a / b for a, b in zip(speeds["progscale"], speeds[other], strict=True)] for other in ("bare", "trainer")
    }
    show_machine()
    print(f"samples/s in rounds of {options.steps} steps, {options.precision}, seed 1, {options.ranks} ranks")
    rows = [[name, *values, statistics.median(values), min(values), max(values)] for name, values in (speeds | ratios).items()]
    show_table(["side", *(f"round {n}" for n in range(1, options.rounds + 1)), "median", "min", "max"], rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    medians = {name: statistics.median(values) for name, values in (speeds | ratios).items()}
    write_json(
        options.output,
        {"settings": settings, "machine": machine(), "samples_per_second": speeds, "ratios": ratios, "median": medians},
    )


if __name__ == "__main__":
    main()
