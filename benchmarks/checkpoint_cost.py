"""What a checkpoint costs: for how long training stands still, how much is written, and how long reading it back takes.

    python benchmarks/checkpoint_cost.py                                       one process: plain, zero2
    torchrun --nproc_per_node 2 benchmarks/checkpoint_cost.py                  two ranks: ddp, zero2, zero3

BERT-base with random weights and the state of Adam, in the first stage, where all of it is live. In each round a foreground
save, a background save and the disk itself take turns: the disk writes and syncs as many bytes from this rank's memory, with
nothing else to do.

How to read it: `blocked s` is for how long a save in the foreground holds up training, median and worst over the rounds; `disk s`
the disk alone, at the same time on all ranks; `over s` the median difference. `background s` is for how long the copy of a
background save holds it up. Before each save a run hashes what is frozen: `hash s` is for the whole model, more than any stage
freezes. `bytes/parameter` counts all files (12 are weight and two moments). `extra MB` is what a foreground save took on
top of the resident memory (peak, rank 0). `verify s` and `load s` are hashing and reading back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ZERO, machine, random_engine, shape_overrides, show_machine, show_table, write_json
from switch_cost import batch
from workload import DECAY, row_loss

from progscale.checkpoint.reader import load_optimizer, load_weights, verify_together
from progscale.checkpoint.saver import Saver
from progscale.checkpoint.store import Store
from progscale.cli import quiet_libraries
from progscale.engine.launch import set_up_cpu
from progscale.launcher import read_ranks
from progscale.meters import MemoryMeter
from progscale.optim import build_for
from progscale.schedule import build_stages


def disk_seconds(folder: Path, size: int, name: str) -> float:
    """Writing and syncing `size` bytes from memory."""
    content = memoryview(bytearray(os.urandom(2**20)) * (size // 2**20 + 1))[:size]
    path = folder / name
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one engine kind."""
    engine, parts, method = random_engine(
        kind, options.model, options.precision, **shape_overrides(options.blocks, options.hidden)
    )
    stages = build_stages("progtuning", num_blocks=parts.num_blocks, stages=3, total_steps=3, embeddings="always", options={})
    builds = build_for(stages, parts, method, weight_decay=DECAY)
    engine.begin_stage(builds[0])
    folder = Path(engine.on_main(lambda: tempfile.mkdtemp(prefix="checkpoint-cost-", dir=options.folder)))

    def step(index: int) -> None:
        engine.train_step([batch(index, engine.rank, 1, 8)], engine.world_size, row_loss, 1e-5)

    step(0)
    state = {"parameters": engine.sizes(), "stage": 1, "loss_scale": None}
    shard = options.shard_megabytes * 2**20
    fore = Saver(engine, Store(folder / "fore"), shard_bytes=shard)
    back = Saver(engine, Store(folder / "back"), shard_bytes=shard, background=True)
    memory = MemoryMeter(engine.device)
    memory.reset()
    before = memory.peak()["peak_resident_bytes"]
    saved = fore.save(1, {**state, "step": 1})
    extra = memory.peak()["peak_resident_bytes"] - before
    assert saved is not None
    own = sum(tensor.numel() * tensor.element_size() for part in engine.own_slices() for tensor in part.tensors.values())
    back.reserve()
    result: dict[str, Any] = {"engine": engine.name, "bytes": saved.bytes, "extra_bytes": extra, "own_bytes": own}
    for key in ("blocked", "disk", "background", "hash"):
        result[key] = []
    time.sleep(2.0)  # the buffer of the background save is being made ready
    for index in range(2, options.rounds + 2):
        engine.barrier()
        saved = fore.save(index, {**state, "step": index})
        assert saved is not None
        result["blocked"].append(saved.blocked_seconds)
        engine.barrier()
        result["disk"].append(max(engine.gather_objects(disk_seconds(folder, own, f"disk{engine.rank}"))))
        engine.barrier()
        start = time.perf_counter()
        back.save(index, {**state, "step": index})
        stopped = time.perf_counter() - start
        count = 0
        while not engine.all_true(back.written):
            step(1000 * index + count)
            count += 1
        start = time.perf_counter()
        back.finish()
        result["background"].append(stopped + time.perf_counter() - start)
        step(index)
        start = time.perf_counter()
        engine.digests(list(engine.parameters))
        result["hash"].append(time.perf_counter() - start)
    last = options.rounds + 2
    fore.save(last, {**state, "step": last})  # what is read back must be of the step that the engine is at
    saved_path = Store(folder / "fore").path_of(last)
    start = time.perf_counter()
    checkpoint = verify_together(saved_path)
    result["verify_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    load_optimizer(checkpoint, engine)
    if not engine.partitions_parameters:
        load_weights(checkpoint, engine)
    result["load_seconds"] = time.perf_counter() - start
    result["parameters"] = sum(state["parameters"].values())
    engine.barrier()
    if engine.is_main:
        shutil.rmtree(folder)
    engine.close()
    return result


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ZERO), help="default: plain and zero2, or ddp, zero2 and zero3")
    parser.add_argument("--model", default="bert-base-uncased", help="well-known architecture, with random weights")
    parser.add_argument("--blocks", type=int, help="blocks; default: as published")
    parser.add_argument("--hidden", type=int, help="hidden size; default: as published")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--shard-megabytes", type=int, default=256, help="checkpoint.shard_megabytes")
    parser.add_argument("--precision", choices=["fp32", "bf16", "bf16_params"], default="fp32", help="train.precision")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that is measured")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    quiet_libraries()
    set_up_cpu()
    ranks = read_ranks(os.environ).world_size
    kinds = options.engines or (["plain", "zero2"] if ranks == 1 else ["ddp", "zero2", "zero3"])
    results = [measure(kind, options) for kind in kinds]
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    show_machine()
    print(f"{options.model}, {ranks} ranks, {options.precision}, {options.rounds} rounds, shards of {options.shard_megabytes} MB")
    rows = []
    for result in results:
        over = [blocked - disk for blocked, disk in zip(result["blocked"], result["disk"], strict=True)]
        rows.append(
            [
                result["engine"],
                result["bytes"] / 1e6,
                result["bytes"] / result["parameters"],
                statistics.median(result["blocked"]),
                max(result["blocked"]),
                statistics.median(result["disk"]),
                statistics.median(over),
                statistics.median(result["background"]),
                max(result["background"]),
                statistics.median(result["hash"]),
                result["extra_bytes"] / 1e6,
                result["verify_seconds"],
                result["load_seconds"],
            ]
        )
    header = ["engine", "MB", "bytes/parameter", "blocked s", "worst", "disk s", "over s", "background s", "worst"]
    show_table([*header, "hash s", "extra MB", "verify s", "load s"], rows)
    how = {key: value for key, value in vars(options).items() if key not in ("folder", "output")}
    write_json(options.output, {"machine": machine(), "options": how, "results": results})


if __name__ == "__main__":
    main()
