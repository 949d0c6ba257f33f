"""What a rank hands to collectives and what its host puts on the wire: a program for accelerate launch, on hosts of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from progscale.cost import Traffic
from progscale.engine.launch import choose_interface
from progscale.estimate import stage_costs
from progscale.models.lookup import hidden_size
from progscale.plan import make_plan
from tests.harness.cases import builds_of, make_engine, row_loss, share
from tests.harness.costs import config_of
from tests.tiny import method_for, tiny_model

# Large enough for what the ranks tell each other beside it to be small; a row for each rank of 2, 3 or 4 in both micro-batches.
HIDDEN, BLOCKS, ROWS, MICRO, STEPS = 256, 4, 24, 2, 4


def sent(interface: str) -> int:
    """Bytes that this host's interface has sent."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def main(engine: str, interface: str, folder: str) -> None:
    """Takes some steps; each rank writes what was planned, counted and sent in one of them."""
    choose_interface()
    method = method_for("bert", "full")
    module = method.prepare(tiny_model("bert", blocks=BLOCKS, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN)).train()
    made = make_engine(module, engine, counts=True)
    parts, builds = builds_of(module, "none", "always", 1, 2 + STEPS, {}, method)
    plan = make_plan(parts, [build.stage for build in builds], method, 2 + STEPS, width=hidden_size(module))
    (cost,) = stage_costs(plan, config_of(engine, ROWS, MICRO), made.world_size, 8.0, activations_too=False)
    made.begin_stage(builds[0])

    def step(number: int) -> None:
        made.train_step(share(number, ROWS, 101, made.rank, made.world_size, MICRO), ROWS, row_loss, 1e-3)

    for number in range(2):  # the first ones set connections up, and find out in which order things are used
        step(number)
    made.barrier()
    before = sent(interface)
    for number in range(2, 2 + STEPS):
        step(number)
    made.barrier()
    wire = (sent(interface) - before) / STEPS
    planned = cost.traffic
    # Gloo reduces everywhere what is to be scattered, and each rank keeps its part; NCCL does not.
    by_gloo = Traffic(all_reduce=planned.all_reduce + planned.reduce_scatter, all_gather=planned.all_gather)
    ring = by_gloo.wire(made.world_size)
    found = {"planned": planned.total, "counted": made.traffic, "wire": wire, "ring": ring}
    (Path(folder) / f"wire-{made.rank}.json").write_text(json.dumps(found))
    made.barrier()
    made.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
