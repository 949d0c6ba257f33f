"""State on the move: from one kind of engine into another, through twenty stages, and what is left of an engine."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from progscale.engine.base import Engine
from progscale.engine.filling import dequantize
from progscale.engine.moving import redistribute
from progscale.engine.state import MASTER, Shard, Slice, slices_of
from progscale.learning_rate import LearningRate
from progscale.optim import StageBuild
from progscale.optimizers import Optimizer
from tests.harness.cases import builds_of, make_engine, masters, row_loss, share
from tests.harness.sending import gathered
from tests.tiny import tiny_model


@dataclass
class Moved:
    """What a run that changed its engine showed on this rank."""

    losses: list[float] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    steps_before: dict[str, int] = field(default_factory=dict)
    steps_after: dict[str, int] = field(default_factory=dict)
    largest_moment_of_thawed: float = 0.0
    thawed: list[str] = field(default_factory=list)
    requantized: int = 0
    moments_before: dict[str, torch.Tensor] = field(default_factory=dict)
    moments_after: dict[str, torch.Tensor] = field(default_factory=dict)


def values_of(part: Slice, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of a slice; 8-bit codes as the values that they mean, which no cut of the range changes."""
    found = {key: value.detach().cpu().clone() for key, value in part.tensors.items()}
    return found | {key: dequantize(found[key], scales, optimizer.blockwise[key]) for key, scales in part.scales.items()}


def moments_of(shards: Sequence[Shard], engine: Engine) -> dict[str, torch.Tensor]:
    """Whole moments in full precision, from all ranks' shards: "parameter moment" → values."""
    own = [(part.name, part.start, values_of(part, shards[0].optimizer)) for part in slices_of(shards)]
    whole: dict[str, dict[int, torch.Tensor]] = {}
    for ranks in gathered(engine, own):
        for name, start, tensors in ranks:
            for key, values in tensors.items():
                if key != MASTER:
                    whole.setdefault(f"{name} {key}", {})[start] = values
    return {key: torch.cat([values for _, values in sorted(parts.items())]) for key, parts in whole.items()}


def take_steps(engine: Engine, build: StageBuild, rows: int, micro: int, vocabulary: int, curve: LearningRate) -> list[float]:
    """The losses of a stage's steps."""
    losses = []
    for step in range(build.stage.start_step, build.stage.end_step):
        batches = share(step, rows, vocabulary, engine.rank, engine.world_size, micro)
        losses.append(engine.train_step(batches, rows, row_loss, curve(step)).loss)
    return losses


def steps_by_name(engine: Engine) -> dict[str, int]:
    """How many steps the optimizer has taken on each parameter, from all ranks' shards."""
    own = {piece.name: shard.step for shard in engine.shards() for piece in shard.pieces}
    merged: dict[str, int] = {}
    for part in engine.gather_objects(own):
        for name, step in part.items():
            assert merged.setdefault(name, step) == step, f"ranks disagree about the step of {name}"
    return merged


def everywhere(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole weights, on every rank."""
    own = {name: value.clone() for name, value in engine.full_parameters() if value is not None}
    return dict(gathered(engine, own)[0])


def carry(
    first: str,
    second: str,
    schedule: str,
    steps: int = 6,
    rows: int = 8,
    micro: int = 4,
    blocks: int = 4,
    family: str = "bert",
    width: int = 16,
    optimizer: str = "adamw",
) -> Moved:
    """Trains the first of two stages with engine `first`, carries the state into `second`, and trains the other stage."""
    sized = {} if width == 16 else {"hidden_size": width}
    module = tiny_model(family, blocks=blocks, **sized).train()
    _, builds = builds_of(module, schedule, "always", 2, steps, {})
    curve = LearningRate(1e-3, "linear", steps, warmup_steps=1, final_fraction=0.1)
    vocabulary = module.config.vocab_size
    moved = Moved()

    old = make_engine(module, first, optimizer=optimizer)
    old.begin_stage(builds[0])
    moved.losses += take_steps(old, builds[0], rows, micro, vocabulary, curve)
    moved.steps_before = steps_by_name(old)
    shards, weights = old.shards(), everywhere(old)
    moved.moments_before = moments_of(shards, old)
    old.close()

    other = tiny_model(family, blocks=blocks, seed=1, hidden_size=width).train()
    other.load_state_dict(weights)
    new = make_engine(other, second, optimizer=optimizer)
    new.begin_stage(builds[1])
    moved.requantized = redistribute(shards, new.shards(), device=new.device, distributed=True).requantized
    moved.steps_after = steps_by_name(new)
    moved.moments_after = moments_of(new.shards(), new)
    moved.thawed = sorted(builds[1].live - builds[0].live)
    for shard in new.shards():
        if any(piece.name in moved.thawed for piece in shard.pieces):
            sizes = [float(value.abs().max()) for value in shard.state.values() if torch.is_tensor(value)]
            moved.largest_moment_of_thawed = max([moved.largest_moment_of_thawed, *sizes])
    moved.losses += take_steps(new, builds[1], rows, micro, vocabulary, curve)
    moved.parameters = everywhere(new)
    new.close()
    return moved


@dataclass
class Leftovers:
    """What twenty stages left on this rank: while the last one lives, and after it is closed."""

    alive: dict[str, int]
    alive_after: dict[str, int]
    hooks_before: dict[str, int]
    hooks_after: dict[str, int]
    attributes_before: list[str]
    attributes_after: list[str]
    losses: list[float]
    held_bytes: list[int]


def alive_objects() -> dict[str, int]:
    """Live objects of DeepSpeed, by kind; each of them holds a whole engine, or the buffers of one."""
    gc.collect()
    from bitsandbytes.optim.optimizer import Optimizer8bit
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    found = gc.get_objects()
    # isinstance would wake torch's lazy modules.
    kinds = {
        "engine": DeepSpeedEngine,
        "optimizer": ZeROOptimizer,
        "torch optimizer": (torch.optim.AdamW, Optimizer8bit),
        "coordinator": PartitionedParameterCoordinator,
    }
    counts = {name: sum(issubclass(type(thing), kind) for thing in found) for name, kind in kinds.items()}
    return {**counts, "module stack": len(parameter_offload.FWD_MODULE_STACK)}


def hooks_of(module: torch.nn.Module) -> dict[str, int]:
    """How many hooks of each kind the modules and parameters hold."""
    counts: Counter[str] = Counter()
    for thing in (*module.modules(), *module.parameters()):
        for key, value in vars(thing).items():
            if key.endswith("_hooks") and value:
                counts[key] += len(value)
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if isinstance(thing, torch.Tensor) and getattr(thing, key, None):
                counts[key] += len(getattr(thing, key))
    return dict(counts)


def attributes_of(module: torch.nn.Module) -> list[str]:
    """Names of the attributes that somebody hung on parameters, without those that make a parameter a ZeRO-3 partition."""
    names = {key for parameter in module.parameters() for key in vars(parameter)}
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        import deepspeed

        fresh = torch.nn.Linear(2, 2)
        deepspeed.zero.Init(module=fresh, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})
        names -= set(vars(fresh.weight))
    return sorted(names)


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes that this rank's weights keep alive: a view counts as the whole buffer that it looks into."""
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    return sum({held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in tensors}.values())


def many_stages(engine: str, count: int = 20, optimizer: str = "adamw") -> Leftovers:
    """Begins `count` stages that shrink and grow again, one step in each."""
    module = tiny_model("bert", blocks=4).train()
    hooks, attributes = hooks_of(module), attributes_of(module)
    made = make_engine(module, engine, optimizer=optimizer)
    _, builds = builds_of(module, "progtuning", "first_stage", 4, 4, {})
    losses, held = [], []
    for index in range(count):
        build = builds[index % len(builds)]
        made.begin_stage(build, force=True)
        batches = share(index, 8, module.config.vocab_size, made.rank, made.world_size, 2)
        losses.append(made.train_step(batches, 8, row_loss, 1e-3).loss)
        held.append(held_bytes(module))
    alive = alive_objects()
    made.close()
    return Leftovers(alive, alive_objects(), hooks, hooks_of(module), attributes, attributes_of(module), losses, held)


@dataclass
class Regime:
    """A run in some precision: the masters at its end, and the optimizer's bytes at the end of each stage."""

    losses: list[float]
    carried: list[str]
    masters: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    state_bytes: list[int]
    live_elements: list[int]
    live_tensors: list[int]


def regime(engine: str, precision: str, schedule: str, force: bool = False, steps: int = 6, blocks: int = 4) -> Regime:
    """Three stages of two steps; with `force` every boundary rebuilds the engine."""
    module = tiny_model("bert", blocks=blocks).train()
    made = make_engine(module, engine, precision=precision)
    parts, builds = builds_of(module, schedule, "always", 3, steps, {})
    found = Regime([], [], {}, {}, [], [], [])
    for build in builds:
        found.carried.append(made.begin_stage(build, force=force).carried)
        found.losses += take_steps(made, build, 8, 4, module.config.vocab_size, LearningRate(1e-3, "constant", steps))
        found.state_bytes.append(made.optimizer_state_bytes())
        found.live_elements.append(parts.count(build.live))
        found.live_tensors.append(len(build.live))
    found.masters, found.parameters = masters(made), everywhere(made)
    made.close()
    return found
