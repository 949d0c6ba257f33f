"""Runs whose frozen partitions lie in files. Runs in each rank."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from progscale.checkpoint.saver import Saver
from progscale.checkpoint.store import Store
from progscale.engine.deepspeed import DeepSpeedEngine
from progscale.engine.launch import make_accelerator
from progscale.engine.loading import load_partitioned
from progscale.engine.mapped import is_mapped
from progscale.estimate import rank_state
from progscale.models.family import ModelRequest
from progscale.models.loading import family_of
from tests.harness import cases, costs
from tests.harness.audit import flip_bit
from tests.harness.cases import builds_of, deepspeed_of, make_engine, row_loss, share
from tests.tiny import tiny_model

ENGINE = "zero3-offload+files"


@dataclass
class Where:
    """Where a rank's partitions lay after the steps of a stage.

    Attributes:
        frozen: names of the stage's frozen parameters.
        mapped: names of those in files.
        bytes: in files, and how many are planned.
        mappings: of files without a name that the process has.
    """

    frozen: set[str]
    mapped: set[str]
    bytes: tuple[int, int]
    mappings: int


def mappings() -> int:
    """Files without a name that this process has mapped."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(".partition (deleted)" in line for line in lines)


def in_files(made: DeepSpeedEngine) -> set[str]:
    """Names of the parameters whose partitions lie in files."""
    return {name for name in made.parameters if is_mapped(made._held(name))}


def look(schedule: str, embeddings: str, options: dict[str, Any], engine: str = ENGINE) -> tuple[list[Where], int]:
    """Three stages, one step each; and the mappings that are left when model and engine are gone."""
    module = tiny_model("bert", blocks=3).train()
    made = make_engine(module, engine)
    assert isinstance(made, DeepSpeedEngine)
    parts, builds = builds_of(module, schedule, embeddings, 3, 3, options)
    config = costs.Config(engine=costs.Engine(deepspeed=deepspeed_of(engine)))
    numels = {name: info.numel for name, info in parts.parameters.items()}
    found = []
    for step, build in enumerate(builds):
        made.begin_stage(build)
        made.train_step(share(step, 8, 101, made.rank, made.world_size, 1), 8, row_loss, 1e-3)
        live = sum(numels[name] for name in build.live)
        held = [made._held(name) for name in sorted(in_files(made))]
        size = sum(tensor.numel() * tensor.element_size() for tensor in held)
        planned = rank_state(config, sum(numels.values()), live, 0, made.world_size, 8).disk
        found.append(Where(set(numels) - set(build.live), in_files(made), (size, planned), mappings()))
    made.close()
    del made, module, held
    return found, mappings()


def copied_for_a_save(folder: str) -> tuple[int, int]:
    """Bytes of the buffer of a background save in the last of three stages, and of what it saves."""
    module = tiny_model("bert", blocks=3).train()
    made = make_engine(module, ENGINE)
    builds = builds_of(module, "progtuning", "first_stage", 3, 3, {})[1]
    for step in (0, 2):
        made.begin_stage(builds[step])
        made.train_step(share(step, 8, 101, made.rank, made.world_size, 1), 8, row_loss, 1e-3)
    saver = Saver(made, Store(Path(folder)), shard_bytes=2**20, background=True)
    tensors = [tensor for part in made.own_slices() for tensor in part.all_tensors()]
    saver.save(3, {"step": 3, "parameters": made.sizes()})
    saver.finish()
    found = saver._copy.numel(), sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    made.close()
    return found


def loaded(folder: str, engine: str) -> tuple[list[float], set[str], list[str], bool]:
    """Losses of a model read from `folder`; what lay in files when it was read; names; whether a bit in a file is seen."""
    cases.reset_accelerate()
    deepspeed = deepspeed_of(engine)
    assert deepspeed is not None
    make_accelerator(deepspeed=deepspeed)
    request = ModelRequest(folder, head="sequence_classification")
    module = load_partitioned(request, family_of(tiny_model("bert", blocks=2)), deepspeed, torch.float32).train()
    made = make_engine(module, engine)
    assert isinstance(made, DeepSpeedEngine)
    mapped = in_files(made)
    builds = builds_of(module, "progtuning", "first_stage", 2, 4, {})[1]
    losses = []
    for build in builds:
        made.begin_stage(build)
        for step in range(build.stage.start_step, build.stage.end_step):
            losses.append(made.train_step(share(step, 8, 101, made.rank, made.world_size, 1), 8, row_loss, 1e-3).loss)
    frozen = sorted(set(made.parameters) - set(builds[-1].live))
    before = made.digests(frozen)
    flip_bit(made._held(frozen[0]))
    seen = made.digests(frozen) != before
    names = sorted(made.parameters)
    made.close()
    return losses, mapped, names, seen
