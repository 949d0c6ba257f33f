"""What a stage switch costs, and whether it leaves anything behind: many switches in a row on every engine.

    torchrun --nproc_per_node 2 benchmarks/switch_cost.py        two ranks: ddp, zero1, zero2, zero3, zero2-offload, zero3-offload
    python benchmarks/switch_cost.py                             one process: plain and the ZeRO kinds

Cycles through the stages of progtuning, so that parts freeze and, at the first stage, thaw again; one training step follows each
switch.

How to read it: `switch s` is the rebuild with the state's move, median and worst; `audit s` the hashing of the frozen tensors
before and after a stage, which is apart. `engines` and `optimizers` are DeepSpeed's objects alive after the last switch, as it
is and after a garbage collection: 1 each, 0 without DeepSpeed. More after a collection is a leak; more before it is memory that
waits for Python to tidy up. `resident MB` after the first cycle and at the end must be about the same, however many switches
there are. All of rank 0.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ZERO, machine, random_engine, shape_overrides, show_machine, show_table, write_json
from workload import DECAY, row_loss

from progscale.cli import quiet_libraries
from progscale.engine.launch import set_up_cpu
from progscale.launcher import read_ranks
from progscale.meters import Audit
from progscale.optim import build_for
from progscale.schedule import build_stages


@dataclass
class Micro:
    """A micro-batch of random tokens."""

    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    weight: float = 1.0


def batch(step: int, rank: int, rows: int, length: int) -> Micro:
    """This rank's rows of a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(1000, 2000, (rows, length), generator=generator)
    return Micro({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, {"labels": tokens[:, 0] % 2})


def resident_bytes() -> int:
    """Memory of this process now; 0 where the kernel does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def live_objects() -> dict[str, int]:
    """DeepSpeed's engines and ZeRO optimizers that are still alive."""
    optimizers = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
    kinds = [type(thing).__name__ for thing in gc.get_objects() if str(type(thing).__module__).startswith("deepspeed.")]
    return {"engines": kinds.count("DeepSpeedEngine"), "optimizers": sum(kinds.count(name) for name in optimizers)}


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """All switches of one engine kind."""
    engine, parts, method = random_engine(
        kind, options.model, options.precision, options.rows, **shape_overrides(options.blocks, options.hidden)
    )
    stages = build_stages(
        "progtuning",
        num_blocks=parts.num_blocks,
        stages=options.stages,
        total_steps=options.stages,
        embeddings="always",
        options={},
    )
    builds = build_for(stages, parts, method, weight_decay=DECAY)
    # As a run does it: each switch collects the old engine, and would scan all that importing left each time.
    gc.collect()
    gc.freeze()
    switch, audit, resident, carried, changed = [], [], [], [], 0
    # The first build switches from nothing, and is not counted.
    for index, build in enumerate(itertools.islice(itertools.cycle(builds), options.switches + 1)):
        engine.barrier()
        watch = Audit(engine, build)
        done = engine.begin_stage(build)
        watch.start()
        engine.train_step(
            [batch(index, engine.rank, options.rows, options.length)], options.rows * engine.world_size, row_loss, 1e-5
        )
        changed += len(watch.changed())
        if index:
            switch.append(done.seconds)
            audit.append(watch.seconds)
            carried.append(done.carried)
        resident.append(resident_bytes())
    result = {
        "engine": engine.name,
        "switches": len(switch),
        "switch_seconds": switch,
        "audit_seconds": audit,
        "carried": carried,
        "frozen_changed": changed,
        "alive": live_objects(),
        "resident_bytes": resident,
    }
    gc.collect()
    result["alive_after_collection"] = live_objects()
    engine.close()
    del engine
    gc.unfreeze()
    gc.collect()
    result["left_after_close"] = live_objects()
    return result


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ZERO), help="default: all that fit the number of ranks")
    parser.add_argument("--model", default="bert-base-uncased", help="well-known architecture, with random weights")
    parser.add_argument("--blocks", type=int, default=6, help="blocks (6: MiniLM's shape)")
    parser.add_argument("--hidden", type=int, default=384, help="hidden size (384: MiniLM's shape)")
    parser.add_argument("--stages", type=int, default=3, help="stages of the cycle")
    parser.add_argument("--switches", type=int, default=20, help="switches in a row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a rank's micro-batch")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="train.precision")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; default: cores / ranks")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    quiet_libraries()
    set_up_cpu(options.threads)
    ranks = read_ranks(os.environ).world_size
    kinds = options.engines or [kind for kind in ZERO if kind != ("plain" if ranks > 1 else "ddp")]
    # One process gets rank variables for ZeRO, after which it cannot do without them.
    results = [measure(kind, options) for kind in sorted(kinds, key=lambda kind: kind != "plain")]
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    show_machine()
    print(
        f"{options.model}, {options.blocks} blocks of {options.hidden}, {ranks} ranks, {options.precision}, "
        f"{options.stages} stages, {options.switches} switches, seed 0"
    )
    rows = [
        [
            result["engine"],
            statistics.median(result["switch_seconds"]),
            max(result["switch_seconds"]),
            statistics.median(result["audit_seconds"]),
            max(result["audit_seconds"]),
            "/".join(f"{result['carried'].count(way)} {way}" for way in sorted(set(result["carried"]))),
            result["frozen_changed"],
            *(f"{result['alive'][what]} → {result['alive_after_collection'][what]}" for what in ("engines", "optimizers")),
            result["left_after_close"]["engines"],
            *(round(result["resident_bytes"][place] / 1e6) for place in (min(options.stages, options.switches), -1)),
        ]
        for result in results
    ]
    header = ["engine", "switch s", "max", "audit s", "max", "carried", "frozen changed", "engines", "optimizers", "after close"]
    show_table([*header, "resident MB", "at the end"], rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_json(options.output, {"settings": settings, "machine": machine(), "ranks": ranks, "results": results})


if __name__ == "__main__":
    main()
