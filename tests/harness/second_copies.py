"""Runs in which a group of ranks keeps a second copy of the parameters, and what shows that it is read. Runs in each rank."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from progscale.cost import Traffic
from progscale.engine.deepspeed import DeepSpeedEngine
from progscale.engine.launch import make_accelerator
from progscale.engine.loading import load_partitioned
from progscale.estimate import rank_state, stage_costs
from progscale.models.family import ModelRequest
from progscale.models.loading import family_of
from progscale.models.lookup import hidden_size
from progscale.plan import make_plan
from tests.harness import cases, costs
from tests.harness.audit import flip_bit
from tests.harness.cases import Outcome, builds_of, deepspeed_of, make_engine, row_loss, share
from tests.tiny import method_for, tiny_model

ENGINE = "zero3+second_copies"


@dataclass
class Counted:
    """A run, and by how many ranks parameters were put together in it: ranks → elements."""

    outcome: Outcome
    gathered: Counter[int] = field(default_factory=Counter)


@contextlib.contextmanager
def gathers() -> Iterator[Counter[int]]:
    """Counts what DeepSpeed gathers for a module, by the ranks that take part."""
    from deepspeed.runtime.zero import partition_parameters

    found: Counter[int] = Counter()
    gather = partition_parameters._dist_allgather_fn

    def counting(mine: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        found[torch.distributed.get_world_size(group)] += whole.numel()
        return gather(mine, whole, group)

    vars(partition_parameters)["_dist_allgather_fn"] = counting
    try:
        yield found
    finally:
        vars(partition_parameters)["_dist_allgather_fn"] = gather


def run(engine: str = ENGINE, **case: Any) -> Counted:
    """`cases.run`, counted."""
    with gathers() as found:
        return Counted(cases.run(engine=engine, **case), found)


@dataclass
class Copies:
    """What the copies of a model were, at one time after the other.

    Attributes:
        bytes: that a rank holds of the weights, partitions and copies, before a step; and what is planned.
        before_step: names of the parameters that have a copy when the step begins.
        after_step: those that are live, after it.
        differ: those whose copy is not what the partitions make up, after a stage switch.
        frozen: in the second stage, with `frozen_copies` after its first step.
        digest: whether the hashes of frozen parameters change by themselves, and by a bit that rank 1 flips in its copy.
    """

    bytes: tuple[int, int] = (0, 0)
    before_step: set[str] = field(default_factory=set)
    after_step: set[str] = field(default_factory=set)
    differ: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)
    frozen_copies: set[str] = field(default_factory=set)
    digest: tuple[bool, bool] = (False, False)


def look() -> Copies:
    """Two steps in the first two of three stages."""
    module = tiny_model("bert", blocks=3).train()
    made = make_engine(module, ENGINE)
    assert isinstance(made, DeepSpeedEngine)
    parts, builds = builds_of(module, "progtuning", "first_stage", 3, 6, {})
    found = Copies()
    config = costs.Config(engine=costs.Engine(deepspeed=deepspeed_of(ENGINE)))
    total = sum(info.numel for info in parts.parameters.values())
    planned = rank_state(config, total, total, 0, made.world_size, 8).state.weights

    def step(at: int) -> None:
        made.train_step(share(at, 8, 101, made.rank, made.world_size, 1), 8, row_loss, 1e-3)

    def copied() -> set[str]:
        return {name for name in made.parameters if made.second_copy(name) is not None}

    made.begin_stage(builds[0])
    apply = made._apply

    def look_and_apply(rate: float, norm: float) -> bool:
        found.before_step = copied()
        copies = [made.second_copy(name) for name in sorted(found.before_step)]
        held = costs.weight_bytes(made) + sum(copy.numel() * copy.element_size() for copy in copies if copy is not None)
        found.bytes = (held, planned)
        return apply(rate, norm)

    vars(made)["_apply"] = look_and_apply
    step(0)
    found.after_step = copied()
    vars(made)["_apply"] = apply
    made.begin_stage(builds[1])
    found.differ = {name for name, bits in made.digests(list(made.parameters)).items() if "differs" in bits}
    step(1)
    found.frozen = set(made.parameters) - set(builds[1].live)
    found.after_step |= copied() - found.frozen
    found.frozen_copies = copied() & found.frozen
    names = sorted(found.frozen)
    before = made.digests(names)
    alone = made.digests(names) != before
    victim = made.second_copy(names[0])
    assert victim is not None
    if made.rank == 1:
        flip_bit(victim)
    found.digest = (alone, made.any_true(made.digests(names) != before))
    made.close()
    return found


def counted_and_planned() -> list[tuple[Counter[int], Traffic]]:
    """What is gathered in the second step of each of three stages, by ranks, and what is planned."""
    rows, micro = 8, 1
    # What is fetched in advance is not let go in between, and such a small model would be fetched whole.
    engine = "zero3+copies_without_prefetch"
    module = tiny_model("bert", blocks=3).train()
    made = make_engine(module, engine)
    trained = method_for("bert", "full")
    parts, builds = builds_of(module, "progtuning", "first_stage", 3, 6, {}, trained)
    plan = make_plan(parts, [build.stage for build in builds], trained, 2, width=hidden_size(module))
    planned = stage_costs(plan, costs.config_of(engine, rows, micro, "fp32"), made.world_size, 8)
    found = []
    for build, cost in zip(builds, planned, strict=True):
        made.begin_stage(build)
        made.train_step(share(0, rows, 101, made.rank, made.world_size, micro), rows, row_loss, 1e-3)
        with gathers() as counted:
            made.train_step(share(1, rows, 101, made.rank, made.world_size, micro), rows, row_loss, 1e-3)
        found.append((counted, cost.traffic))
    made.close()
    return found


def loaded(folder: str) -> list[tuple[list[float], set[int]]]:
    """Losses of a model of two blocks read from `folder`, and the ranks that gathered: twice with copies, then without."""
    found = []
    for engine in (ENGINE, ENGINE, "zero3+bare"):
        cases.reset_accelerate()
        deepspeed = deepspeed_of(engine)
        assert deepspeed is not None
        make_accelerator(deepspeed=deepspeed)
        request = ModelRequest(folder, head="sequence_classification")
        with gathers() as gathered:
            module = load_partitioned(request, family_of(tiny_model("bert", blocks=2)), deepspeed, torch.float32).train()
            made = make_engine(module, engine)
            made.begin_stage(builds_of(module, "none", "always", 1, 3, {})[1][0])
            batches = [share(step, 8, 101, made.rank, made.world_size, 1) for step in range(3)]
            losses = [made.train_step(batch, 8, row_loss, 1e-3).loss for batch in batches]
            made.close()
        found.append((losses, set(gathered)))
    return found


def evaluated_then_loaded() -> tuple[float, float, float]:
    """The loss of a model, of the same with other weights put in its partitions, and of those weights in a new model."""
    losses = []
    for seed in (0, 1):
        module = tiny_model("bert", blocks=2, seed=seed).train()
        made = make_engine(module, ENGINE)
        _, builds = builds_of(module, "none", "always", 2, 4, {})
        made.begin_stage(builds[0])
        losses.append(loss_of(made))
        if seed == 0:
            first = made
        else:
            for name in made.parameters:
                first.held(name)[1].copy_(made.held(name)[1])
            first.begin_stage(builds[1], force=True)
            losses.append(loss_of(first))
            first.close()
            made.close()
    old, other, given = losses
    return old, given, other


def loss_of(made: Any) -> float:
    """Of one batch on all ranks, without a step."""
    micro = share(0, 8, 101, made.rank, made.world_size, 8)[0]
    with made.evaluating():
        return float(row_loss(made.forward(micro.inputs), made.to_device(micro.labels)).sum())
