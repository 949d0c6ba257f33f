"""A stage switch of a large model on two ranks against the same steps in one process.

    python benchmarks/large_switch.py                             BERT-large's shape, random weights, fp32; some 15 GB of memory
    python benchmarks/large_switch.py --blocks 4 --hidden 64      a smoke run

The one-process side (plain PyTorch engine) runs first, in a process of its own, and leaves its parameters in a temporary file;
then ZeRO-2 and ZeRO-3 on two ranks, one after the other. Two stages of progtuning, one switch, two steps before and after it,
dropout off. `plain, split` is the control: one process again, each batch in the halves that the ranks see; it differs from the
reference by the order of summation alone.

How to read it: `parameter gap` is the largest difference of any element of any parameter at the end, `in steps of Adam` the same
over the learning rate (Adam moves an element by at most about that much in a step; where a gradient is nearly 0, rounding alone
decides); `loss gap` the largest of a step. `frozen moved` counts frozen tensors with changed bits and must be 0. Peaks are
resident memory above the start, by rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    REPOSITORY,
    ZERO,
    machine,
    quiet_environment,
    random_encoder,
    shape_overrides,
    show_machine,
    show_table,
    torchrun,
    write_json,
)
from switch_cost import Micro
from workload import row_loss

SPLIT = "plain, split"


def rows_of(step: int, rows: int, length: int, rank: int, world_size: int) -> Micro:
    """This rank's rows of a global batch that is the same at any world size."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(1000, 2000, (rows, length), generator=generator)[rank::world_size]
    return Micro({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, {"labels": tokens[:, 0] % 2})


def run_side(options: argparse.Namespace) -> None:
    """One side: trains, then writes its parameters (the reference) or compares them with the reference's."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from progscale.blocks import partition
    from progscale.cli import quiet_libraries
    from progscale.engine.base import EngineSettings
    from progscale.engine.launch import create_engine, make_accelerator, set_up_cpu
    from progscale.engine.loading import load_module
    from progscale.meters import Audit, MemoryMeter
    from progscale.methods import Subject, make_method
    from progscale.models.loading import find_family
    from progscale.optim import build_for
    from progscale.schedule import build_stages

    quiet_libraries()
    set_up_cpu(options.threads)
    deepspeed = ZERO.get(options.side)
    accelerator = make_accelerator(deepspeed=deepspeed)
    memory = MemoryMeter(torch.device(accelerator.device))
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    request = random_encoder(options.model, **shape_overrides(options.blocks, options.hidden), **off)
    family = find_family(request, None)
    torch.manual_seed(0)
    module = load_module(request, family, deepspeed)
    module.train()
    parts = partition(module, family)
    stages = build_stages(
        "progtuning",
        num_blocks=parts.num_blocks,
        stages=2,
        total_steps=2 * options.steps,
        embeddings=options.embeddings,
        options={},
    )
    builds = build_for(stages, parts, make_method("full", Subject(family)), weight_decay=0.01)
    engine = create_engine(module, EngineSettings(micro_batch_size=options.rows), accelerator, deepspeed)
    losses, changed, switches, carried = [], 0, [], []
    for build in builds:
        audit = Audit(engine, build)
        switch = engine.begin_stage(build)
        audit.start()
        switches.append(switch.seconds)
        carried.append(switch.carried)
        for step in range(build.stage.start_step, build.stage.end_step):
            halves = 2 if options.side == SPLIT else 1
            shares = [(engine.rank + half, engine.world_size * halves) for half in range(halves)]
            micro = [rows_of(step, options.rows, options.length, *share) for share in shares]
            losses.append(engine.train_step(micro, options.rows, row_loss, options.lr).loss)
        changed += len(audit.changed())
    peaks = [entry["peak_memory_bytes"] for entry in engine.gather_objects(memory.peak())]
    result: dict[str, Any] = {"engine": engine.name, "losses": losses, "frozen_changed": changed, "peak_memory_bytes": peaks}
    # The first build switches from nothing.
    result |= {"switch_seconds": switches[1:], "carried": carried[1:]}
    reference = options.folder / "reference.safetensors"
    if options.side == "plain":
        save_file({name: value.contiguous() for name, value in engine.full_parameters() if value is not None}, reference)
        result["parameters"] = sum(parts.parameters[name].numel for name in parts.parameters)
    else:
        gaps: dict[str, float] = {}
        for name, value in engine.full_parameters():
            if value is not None:
                with safe_open(reference, framework="pt") as file:
                    gaps[name] = float((value - file.get_tensor(name)).abs().max())
        if engine.is_main:
            worst = max(gaps, key=gaps.__getitem__)
            result |= {"parameter_gap": gaps[worst], "worst_parameter": worst, "compared": len(gaps)}
    if engine.is_main:
        (options.folder / f"{options.side}.json").write_text(json.dumps(result))
    engine.barrier()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-large-uncased", help="well-known architecture, with random weights")
    parser.add_argument("--blocks", type=int, help="blocks; default: the model's own")
    parser.add_argument("--hidden", type=int, help="hidden size; default: the model's own")
    parser.add_argument("--engines", nargs="+", choices=list(ZERO), default=["zero2", "zero3"], help="two-rank sides")
    parser.add_argument("--embeddings", choices=["always", "first_stage", "never"], default="always", help="schedule.embeddings")
    parser.add_argument("--steps", type=int, default=2, help="steps of each stage")
    parser.add_argument("--rows", type=int, default=4, help="rows of a global batch")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; default: cores / ranks")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.side:
        run_side(options)
        return
    assert "RANK" not in os.environ, "this script starts the ranks itself"
    passed = list(sys.argv[1:] if given is None else given)
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("plain", SPLIT, *options.engines):
            own = [*passed, "--folder", folder, "--side", side]
            if side in ("plain", SPLIT):
                subprocess.run([sys.executable, __file__, *own], cwd=REPOSITORY, env=quiet_environment(), check=True)
            else:
                torchrun(2, __file__, *own)
            sides[side] = json.loads((Path(folder) / f"{side}.json").read_text())
    reference = sides.pop("plain")
    show_machine()
    print(
        f"{options.model}, {reference['parameters'] / 1e6:.0f} M parameters, fp32, lr {options.lr}, seed 0, "
        f"twice {options.steps} steps of {options.rows} × {options.length} tokens; "
        f"one process: losses {[round(loss, 6) for loss in reference['losses']]}, "
        f"switch {reference['switch_seconds'][0]:.2f} s, peak {reference['peak_memory_bytes'][0] / 1e9:.2f} GB"
    )
    rows = []
    for side, found in sides.items():
        found["loss_gap"] = max(abs(a - b) for a, b in zip(found["losses"], reference["losses"], strict=True))
        rows.append(
            [
                side,
                found["parameter_gap"],
                found["parameter_gap"] / options.lr,
                found["loss_gap"],
                found["frozen_changed"],
                found["switch_seconds"][0],
                found["carried"][0],
                " ".join(f"{peak / 1e9:.2f}" for peak in found["peak_memory_bytes"]),
                found["worst_parameter"],
            ]
        )
    header = [
        "engine",
        "parameter gap",
        "in steps of Adam",
        "loss gap",
        "frozen moved",
        "switch s",
        "carried",
        "peak GB by rank",
        "worst",
    ]
    show_table(header, rows)
    write_json(options.output, {"machine": machine(), "reference": reference, "sides": sides})


if __name__ == "__main__":
    main()
