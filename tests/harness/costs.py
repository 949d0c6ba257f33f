"""What a rank really holds, and what it really sends. Runs in each rank."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from progscale.config import Config, Engine, Train
from progscale.engine.base import Engine as RunningEngine
from progscale.estimate import StageCost, stage_costs
from progscale.models.lookup import hidden_size
from progscale.plan import make_plan
from tests.harness.cases import builds_of, deepspeed_of, make_engine, row_loss, share
from tests.tiny import method_for, tiny_model

ROWS, MICRO, BLOCKS = 8, 2, 6


@dataclass
class Measured:
    """Bytes on this rank in a stage: as they are, and as planned."""

    weights: int
    gradients: int
    optimizer: int
    communicated: int
    planned: StageCost


def config_of(engine: str, rows: int, micro: int, precision: str = "fp32") -> Config:
    """As a run of these tests would have it."""
    return Config(
        train=Train(global_batch_size=rows, micro_batch_size=micro, max_length=12, precision=precision),  # type: ignore[arg-type]
        engine=Engine(deepspeed=deepspeed_of(engine)),
    )


def run(
    engine: str, method: str = "full", embeddings: str = "first_stage", precision: str = "fp32", rows: int = ROWS
) -> list[Measured]:
    """Takes two steps in each of three stages."""
    trained = method_for("bert", method)
    module = trained.prepare(tiny_model("bert", blocks=BLOCKS, hidden_size=32, intermediate_size=64)).train()
    made = make_engine(module, engine, precision=precision, counts=True)
    parts, builds = builds_of(module, "progtuning", embeddings, 3, 6, {}, trained)
    plan = make_plan(parts, [build.stage for build in builds], trained, 2, width=hidden_size(module))
    config = config_of(engine, rows, MICRO, precision)
    costs = stage_costs(plan, config, made.world_size, made.settings.optimizer.state_bytes_per_element)
    found = []
    for build, cost in zip(builds, costs, strict=True):
        made.begin_stage(build)
        held = [0]

        def look(function: Any, *args: Any, held: list[int] = held) -> Any:
            # Of the micro-batches before, or of all.
            held[0] = max(held[0], gradient_bytes(made))
            return function(*args)

        apply, backward = made._apply, made._backward
        made._apply = functools.partial(look, apply)  # type: ignore[method-assign]
        made._backward = functools.partial(look, backward)  # type: ignore[method-assign]
        for step in range(build.stage.start_step, build.stage.end_step):
            made.train_step(share(step, rows, 101, made.rank, made.world_size, MICRO), rows, row_loss, 1e-3)
        made._apply, made._backward = apply, backward  # type: ignore[method-assign]
        assert made.traffic is not None
        found.append(Measured(weight_bytes(made), held[0], made.optimizer_state_bytes(), made.traffic, cost))
    made.close()
    return found


def weight_bytes(engine: RunningEngine) -> int:
    """Of the parameters, as this rank keeps them between steps."""
    return sum(engine.held(name)[1].numel() * engine.held(name)[1].element_size() for name in engine.parameters)


def gradient_bytes(engine: RunningEngine) -> int:
    """Of the gradients that this rank holds when it steps."""
    own: list[torch.Tensor] = engine._gradients()  # type: ignore[attr-defined]
    whole = [parameter.grad for parameter in engine.parameters.values() if parameter.grad is not None]
    different = {(tensor.data_ptr(), tensor.numel()): tensor for tensor in (*own, *whole)}
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())
