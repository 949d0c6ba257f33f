"""What torch.compile of the blocks gives, and what it takes in each stage.

    python benchmarks/compile_speed.py                          BERT-base shape, bf16, two stages
    python benchmarks/compile_speed.py --model bert-large-uncased --batch 32 --max-length 384

Two engines over the same random weights and the same schedule take turns step by step; one has its blocks compiled. The ratio is
that of the summed times of all steps but the first of each stage, in which torch compiles; `s compiling` is how much longer that
one took than the median of the others.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from common import machine, show_machine, show_table, write_json
from stage_speed import Row, Side
from workload import synthetic

from progscale.cli import quiet_libraries
from progscale.compiling import Compiler
from progscale.engine.launch import set_up_cpu
from progscale.models.loading import family_of


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="a well-known architecture, with random weights")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of both sides")
    parser.add_argument("--stages", type=int, default=2, help="stages of an epoch each")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row at most; 53 in the mean")
    parser.add_argument("--steps-per-epoch", type=int, default=8, help="steps of an epoch")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    options.micro_batch = None
    quiet_libraries()
    threads = set_up_cpu(options.threads)
    split = synthetic(options.batch * options.steps_per_epoch, options.max_length, 30000)
    row = Row(options.stages, options.stages, "first_stage")
    plain, compiled = (Side(options, row, split, "progtuning", cache=False) for _ in range(2))
    compiler = Compiler(compiled.engine, family_of(compiled.engine.module), options.backend)
    starts = {build.stage.start_step for build in compiled.builds}
    number = 0
    for epoch in range(row.epochs):
        for batch in plain.loader.epoch(epoch):
            if number in starts:
                compiler.begin_stage(0)
            for side in (plain, compiled) if number % 2 else (compiled, plain):
                side.step(number, batch)
            number += 1
    stages = []
    for build in compiled.builds:
        first, rest = build.stage.start_step, slice(build.stage.start_step + 1, build.stage.end_step)
        ours, theirs = compiled.seconds[rest], plain.seconds[rest]
        compiling = compiled.seconds[first] - statistics.median(ours)
        stages.append({"stage": build.stage.index, "ratio": sum(ours) / sum(theirs), "compiling_seconds": compiling})
    show_machine()
    print(f"{options.model}, {options.precision}, {options.backend}, {threads} threads, {options.batch} rows a step")
    show_table(["stage", "compiled / not", "s compiling"], [list(stage.values()) for stage in stages])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_json(options.output, {"settings": settings, "machine": machine(), "stages": stages})


if __name__ == "__main__":
    main()
