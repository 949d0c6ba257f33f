"""Whether the loader keeps up: time to make a batch, in the training process and with workers.

    python benchmarks/loader_speed.py                                  three shapes of a rank's batch, synthetic tokens
    python benchmarks/loader_speed.py --workers 0 2 --rounds 9

How to read it: `ms a batch` is how long the training process is kept from its own work by a rank's global batch: cutting it into
micro-batches and padding them, or, with workers, taking over what they made during a step (of 50 ms here). `tokens/s` is that as
a rate, padding included: a device waits for the loader only when it computes as fast, which benchmarks/throughput.py tells. The
next batch is made while a GPU still runs the optimizer's step of the one before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import machine, show_machine, show_table, write_json
from workload import synthetic

from progscale.data import TrainLoader
from progscale.tasks.base import Tokenized

# Rows of a rank's global batch and tokens of a row at most.
SHAPES = ((32, 128), (64, 384), (256, 512))
STEPS = 24


def seconds_a_batch(split: Tokenized, rows: int, workers: int, epoch: int) -> tuple[float, float]:
    """Mean seconds for a batch of an epoch, the first one (which starts the workers) left out, and its padded tokens."""
    loader = TrainLoader(
        split,
        {"input_ids": 0, "token_type_ids": 0},
        global_batch_size=rows,
        micro_batch_size=min(rows, 64),
        num_workers=workers,
    )
    batches = loader.epoch(epoch)
    next(batches)
    tokens, count, busy = 0, 0, 0.0
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return busy / count, tokens / count
        busy += time.perf_counter() - start
        tokens += sum(len(micro) * micro.length for micro in batch.micro_batches)
        count += 1
        if workers:
            time.sleep(0.05)  # a step, in which workers make the next one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1], help="train.num_workers")
    parser.add_argument("--rounds", type=int, default=5, help="epochs, of which the median is taken")
    parser.add_argument("--output", type=Path, help="JSON of the table")
    options = parser.parse_args()
    show_machine()
    cells: list[list[Any]] = []
    for rows, longest in SHAPES:
        split = synthetic(rows * STEPS, longest, 30000, mean=longest / 2)
        # In turns, so that a slow moment meets all of them.
        rounds = [
            {count: seconds_a_batch(split, rows, count, epoch) for count in options.workers} for epoch in range(options.rounds)
        ]
        for count in options.workers:
            seconds = [measured[count][0] for measured in rounds]
            middle, tokens = statistics.median(seconds), statistics.mean(measured[count][1] for measured in rounds)
            spread = [1e3 * value for value in (middle, min(seconds), max(seconds))]
            cells.append([f"{rows} x {longest}", count, *spread, tokens / middle])
    header = ["rows x tokens", "workers", "ms a batch", "min", "max", "tokens/s"]
    show_table(header, cells)
    write_json(options.output, {"machine": machine(), "cells": [dict(zip(header, values, strict=True)) for values in cells]})


if __name__ == "__main__":
    main()
