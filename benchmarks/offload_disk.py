"""What parameters on a disk spare and cost beside parameters in CPU memory: both in turns, stage by stage.

    torchrun --nproc_per_node 2 benchmarks/offload_disk.py --folder /local_nvme

How to read it: `memory MB` is what a rank holds and the kernel cannot take back (anonymous pages), beyond what it held before the
model was built; `file MB` what of the files happens to be in memory, which it can. `step s` is the median of a stage's steps
without its first. While there is memory enough the kernel reads each file once, so that the steps show the price of the disk
only where memory is short (run it under `systemd-run --scope -p MemoryMax=…`, or in a container with a limit). All of rank 0.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ZERO, machine, random_engine, shape_overrides, show_machine, show_table, write_json
from switch_cost import batch
from workload import DECAY, row_loss

from progscale.cli import quiet_libraries
from progscale.engine.launch import set_up_cpu
from progscale.engine.loading import give_back_memory
from progscale.launcher import read_ranks
from progscale.memory import status_bytes
from progscale.optim import build_for
from progscale.schedule import build_stages

MEMORY, DISK = "zero3-offload", "zero3-offload-nvme"


def measure(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A run of one engine kind, by stage."""
    gc.collect()
    give_back_memory()
    before = {key: status_bytes(key) for key in ("RssAnon", "RssFile")}
    engine, parts, method = random_engine(
        kind, options.model, options.precision, options.rows, **shape_overrides(options.blocks, options.hidden)
    )
    stages = build_stages(
        "progtuning",
        num_blocks=parts.num_blocks,
        stages=options.stages,
        total_steps=options.stages * options.steps,
        embeddings="first_stage",
        options={},
    )
    found = []
    for build in build_for(stages, parts, method, weight_decay=DECAY):
        switch = engine.begin_stage(build)
        seconds = []
        for step in range(options.steps):
            start = time.perf_counter()
            micro = batch(step, engine.rank, options.rows, options.length)
            engine.train_step([micro], options.rows * engine.world_size, row_loss, 1e-5)
            seconds.append(time.perf_counter() - start)
        give_back_memory()
        found.append(
            {
                "engine": kind,
                "stage": build.stage.index,
                "memory_bytes": status_bytes("RssAnon") - before["RssAnon"],
                "file_bytes": status_bytes("RssFile") - before["RssFile"],
                "switch_seconds": switch.seconds,
                "step_seconds": statistics.median(seconds[1:]),
            }
        )
    engine.close()
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk")
    parser.add_argument("--model", default="bert-base-uncased", help="well-known architecture, with random weights")
    parser.add_argument("--blocks", type=int, default=12, help="blocks")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size")
    parser.add_argument("--stages", type=int, default=3, help="stages")
    parser.add_argument("--steps", type=int, default=4, help="steps of a stage, 2 or more")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turns")
    parser.add_argument("--rows", type=int, default=2, help="rows of a rank's micro-batch")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="train.precision")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; default: cores / ranks")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    if options.steps < 2:
        parser.error(f"--steps: {options.steps}; a stage's first step is not counted, give 2 or more")
    quiet_libraries()
    set_up_cpu(options.threads)
    on_disk = copy.deepcopy(ZERO[MEMORY])
    assert on_disk is not None
    on_disk["zero_optimization"]["offload_param"] |= {"device": "nvme", "nvme_path": str(options.folder)}
    ZERO[DISK] = on_disk
    # Which side is first shows too, so that it changes.
    turns = [kind for round in range(options.rounds) for kind in ((MEMORY, DISK) if round % 2 == 0 else (DISK, MEMORY))]
    results = [stage for kind in turns for stage in measure(kind, options)]
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    show_machine()
    ranks = read_ranks(os.environ).world_size
    print(f"{options.model}, {options.blocks} blocks of {options.hidden}, {ranks} ranks, {options.precision}, seed 0")
    rows = []
    for stage in range(1, options.stages + 1):
        for kind in (MEMORY, DISK):
            runs = [result for result in results if result["engine"] == kind and result["stage"] == stage]
            sizes = [round(statistics.median(run[key] for run in runs) / 1e6) for key in ("memory_bytes", "file_bytes")]
            times = [[run[key] for run in runs] for key in ("switch_seconds", "step_seconds")]
            # Each side's own run of a round beside the other's: the machine changes more from round to round.
            rows.append([f"{stage} {kind}", *sizes, *(statistics.median(values) for values in times)])
        sides = [
            [result["step_seconds"] for result in results if result["engine"] == kind and result["stage"] == stage]
            for kind in (MEMORY, DISK)
        ]
        ratios = [disk / memory for memory, disk in zip(*sides, strict=True)]
        rows[-1].append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows[-2].append("1")
    show_table(["stage, engine", "memory MB", "file MB", "switch s", "step s", "step, ratio"], rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_json(options.output, {"settings": settings, "machine": machine(), "ranks": ranks, "results": results})


if __name__ == "__main__":
    main()
