"""Tokens a second, share of the machine's matrix products (MFU), and peak memory beside the plan, stage by stage.

    python benchmarks/throughput.py                                                on a GPU: BERT-base and BERT-large, 128 and 384
    python benchmarks/throughput.py --models bert-base-uncased --lengths 128 --rows 8 --steps 3        an afternoon's laptop
    python benchmarks/throughput.py --largest                                      on a GPU: which encoder still fits

Rows of full length and random tokens, one process, fused AdamW, dropout as published; the stages of progtuning in order, each
with warm-up steps that do not count.

How to read it: `MFU` is the plan's operations of a step (those of the model, no recomputation) over the time of the step, as a
share of the ceiling: the fastest of several large square matrix products of the same precision, in the same run. `peak GB` is
what torch's allocator held at most (on a CPU: resident memory above that before the model), `plan GB` the plan's weights,
gradients, optimizer's state and activations; what the plan leaves out (temporary results, fragments) is the difference.
`--largest` takes steps of each encoder of a ladder, everything trained, until the GPU's memory is too small.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, random_engine, show_machine, show_table, write_json
from workload import DECAY, LR, row_loss

from progscale.cli import quiet_libraries
from progscale.config import Config
from progscale.config.schema import Train
from progscale.data import MicroBatch
from progscale.engine.launch import set_up_cpu
from progscale.estimate import StageCost, stage_costs
from progscale.meters import MemoryMeter
from progscale.optim import build_for
from progscale.optimizers import AdamW
from progscale.plan import plan_for
from progscale.schedule import build_stages

LADDER = (
    *("bert-base-uncased", "bert-large-uncased", "deberta-v2-xlarge", "deberta-v2-xxlarge"),
    *("xlm-roberta-xl", "xlm-roberta-xxl"),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ceiling(device: torch.device, precision: str) -> float:
    """Operations a second of the fastest large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        wait(device)
        begin = time.perf_counter()
        torch.mm(left, right)
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def planned_bytes(cost: StageCost) -> int | None:
    """At the peak, as far as the plan knows it."""
    return None if cost.activation_bytes is None else cost.rank.state.total + cost.activation_bytes


def measure(options: argparse.Namespace, name: str, length: int, stages: int) -> list[dict[str, Any]]:
    """Every stage of a model at a length."""
    schedule = "progtuning" if stages > 1 else "none"
    train = Train(global_batch_size=options.rows, micro_batch_size=options.rows, max_length=length, precision=options.precision)
    plan = plan_for(
        name,
        schedule=schedule,
        stages=stages,
        epochs=stages,
        embeddings=options.embeddings,
        method=options.method,
    )
    costs = stage_costs(plan, Config(train=train), 1, AdamW().state_bytes_per_element)
    # Planned before: what imports take is not the model's memory.
    memory = MemoryMeter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    engine, parts, method = random_engine("plain", name, options.precision, options.rows, options.method)
    built = build_stages(
        schedule,
        num_blocks=parts.num_blocks,
        stages=stages,
        total_steps=stages * (options.steps + options.warm_up),
        embeddings=options.embeddings,
        options={},
    )
    tokens = torch.randint(1000, 2000, (options.rows, length))
    batch = MicroBatch(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, {"labels": tokens[:, 0] % 2}, np.arange(options.rows)
    )
    found = []
    for build, cost in zip(build_for(built, parts, method, weight_decay=DECAY), costs, strict=True):
        switch = engine.begin_stage(build)
        memory.reset()
        seconds = []
        for step in range(options.warm_up + options.steps):
            wait(engine.device)
            begin = time.perf_counter()
            engine.train_step([batch], options.rows, row_loss, LR)
            wait(engine.device)
            if step >= options.warm_up:
                seconds.append(time.perf_counter() - begin)
        taken = statistics.median(seconds)
        found.append(
            {
                "model": name,
                "length": length,
                "stage": build.stage.index,
                "tokens_per_second": options.rows * length / taken,
                "spread": (min(seconds), max(seconds)),
                "flops_per_second": cost.flops.total / taken,
                "peak_bytes": memory.peak()["peak_memory_bytes"],
                "planned_bytes": planned_bytes(cost),
                "switch_seconds": switch.seconds,
            }
        )
    engine.close()
    del engine
    gc.collect()
    return found


def largest(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each encoder of the ladder, until one does not fit."""
    found = []
    for name in LADDER:
        try:
            found.append({**measure(options, name, options.lengths[0], 1)[0], "fits": True})
        except torch.OutOfMemoryError:
            found.append({"model": name, "length": options.lengths[0], "fits": False})
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["bert-base-uncased", "bert-large-uncased"]
    parser.add_argument("--models", nargs="+", default=models, help="well-known architectures, with random weights")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 384], help="tokens of a row")
    parser.add_argument("--rows", type=int, default=32, help="of a step, run at once")
    parser.add_argument("--stages", type=int, default=3, help="stages of progtuning")
    parser.add_argument("--embeddings", choices=["always", "first_stage", "never"], default="first_stage", help="when trained")
    parser.add_argument("--method", default="full", help="a registered method")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the model and of the ceiling")
    parser.add_argument("--steps", type=int, default=10, help="steps of a stage that count")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of a stage that do not")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--largest", action="store_true", help="which encoder fits on the GPU at the first of --lengths")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    quiet_libraries()
    set_up_cpu(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.largest and device.type != "cuda":
        parser.error("--largest fills the memory of a GPU, and there is none here")
    top = ceiling(device, options.precision)
    if options.largest:
        results = largest(options)
    else:
        results = [
            stage
            for name in options.models
            for length in options.lengths
            for stage in measure(options, name, length, options.stages)
        ]
    show_machine()
    print(f"{options.method}, {options.precision}, {options.rows} rows a step, embeddings {options.embeddings}")
    print(f"ceiling: {top / 1e12:.3g} TFLOP/s")
    table = []
    for r in results:
        if not r.get("fits", True):
            table.append([r["model"], r["length"], "does not fit", *[None] * 4])
            continue
        planned = r["planned_bytes"]
        rate, share, peak = r["tokens_per_second"], r["flops_per_second"] / top, r["peak_bytes"] / 1e9
        table.append([r["model"], r["length"], r["stage"], rate, share, peak, None if planned is None else planned / 1e9])
    show_table(["model", "length", "stage", "tokens/s", "MFU", "peak GB", "plan GB"], table)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    content = {"settings": settings, "machine": machine(), "ceiling_flops_per_second": top, "results": results}
    write_json(options.output, content)


if __name__ == "__main__":
    main()
