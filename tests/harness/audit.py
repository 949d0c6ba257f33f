"""A stage with its meters, and a bit that somebody flips in a frozen tensor."""

from __future__ import annotations

from typing import Any

import torch

from progscale.engine.base import Engine
from progscale.errors import AuditError
from progscale.meters import Audit, MemoryMeter, StageMeter
from progscale.optim import StageBuild
from tests.harness.cases import builds_of, make_engine, row_loss, share
from tests.tiny import tiny_model

ROWS, MICRO, STEPS_PER_EPOCH = 8, 4, 2


def audited_stage(engine: str, flip_on: int | None, in_switch: bool = False) -> dict[str, Any]:
    """Trains the second of two stages, and flips the lowest bit of one element of a frozen tensor on rank `flip_on`.

    Args:
        in_switch: the bit flips while the second stage is being built, else after its last step.
    """
    module = tiny_model("bert", blocks=2).train()
    made = make_engine(module, engine)
    parts, builds = builds_of(module, "progtuning", "first_stage", 2, 4, {})
    train(made, builds[0], module.config.vocab_size)
    frozen = [name for name in parts.parameters if name not in builds[1].live]
    victim = frozen[len(frozen) // 2]

    def flip() -> None:
        # What this rank keeps under ZeRO-3 is its partition; the whole tensor comes and goes.
        parameter = made.parameters[victim]
        if flip_on == made.rank:
            flip_bit(parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data)

    audit = Audit(made, builds[1])
    if in_switch:
        build = made._build

        def build_carelessly(stage: StageBuild) -> None:
            build(stage)
            flip()

        vars(made)["_build"] = build_carelessly
    made.begin_stage(builds[1])
    sizes = {name: info.numel for name, info in parts.parameters.items()}
    meter = StageMeter(made, builds[1], sizes, MemoryMeter(torch.device("cpu")), audit)
    meter.start()
    train(made, builds[1], module.config.vocab_size, meter)
    if not in_switch:
        flip()
    changed, record, error = audit.changed(), None, None
    try:
        record = meter.finish(steps_per_epoch=STEPS_PER_EPOCH, first_block=1, switch_seconds=0.0, carried="shards").to_json()
    except AuditError as caught:
        error = str(caught)
    made.close()
    return {"victim": victim, "changed": changed, "record": record, "error": error}


def train(engine: Engine, build: Any, vocabulary: int, meter: StageMeter | None = None) -> None:
    """The steps of a stage, counted by its meter."""
    if meter is None:
        engine.begin_stage(build)
    for step in range(build.stage.start_step, build.stage.end_step):
        batches = share(step, ROWS, vocabulary, engine.rank, engine.world_size, MICRO)
        result = engine.train_step(batches, ROWS, row_loss, 1e-3)
        if meter is not None:
            meter.step(ROWS, ROWS * 12, result.applied)


def flip_bit(tensor: torch.Tensor) -> None:
    """The lowest bit of the tensor's first element: the smallest change there is."""
    tensor.view(-1)[:1].view(torch.uint8)[0] ^= 1
