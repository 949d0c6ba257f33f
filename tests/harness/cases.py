"""A training run on a tiny random encoder, small enough for hundreds of cases. Runs in a rank or in the test process."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from progscale.blocks import partition
from progscale.compiling import Compiler
from progscale.engine import mapped
from progscale.engine.base import Engine, EngineSettings
from progscale.engine.deepspeed import DeepSpeedEngine
from progscale.engine.launch import create_engine, make_accelerator, set_up_cpu
from progscale.engine.local import LocalEngine
from progscale.engine.state import slices_of
from progscale.layers import seeded
from progscale.learning_rate import LearningRate
from progscale.methods import Method, Subject, make_method
from progscale.models.loading import family_of
from progscale.optim import StageBuild, build_for
from progscale.optimizers import OPTIMIZERS, Request
from progscale.schedule import build_stages
from progscale.setup import enable_checkpointing
from tests.harness.sending import gathered
from tests.tiny import tiny_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def shipped_engine(name: str) -> dict[str, Any]:
    """The DeepSpeed JSON of a config that users get; its "auto" thresholds keep small parameters whole under ZeRO-3 only."""
    content: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))["engine"]["deepspeed"]
    return content


ZERO_ENGINES = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
ENGINES: dict[str, dict[str, Any] | None] = {"plain": None, "ddp": None} | {name: shipped_engine(name) for name in ZERO_ENGINES}
# Nothing stays whole between two uses, so that every forward and backward pass reads the copies.
BARE = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
SECOND_COPIES = {"zero_hpz_partition_size": 2, **BARE}
# Frozen partitions in files, also those of tensors as small as these.
mapped.SMALLEST = 1
FILES = {"device": "nvme", "nvme_path": tempfile.gettempdir()}
# What users change most in a DeepSpeed JSON: engine, a plus, and what is different.
VARIANTS: dict[str, dict[str, Any]] = {
    "zero1-offload": {"offload_optimizer": {"device": "cpu"}},
    "zero1+round_robin": {"round_robin_gradients": True},
    "zero1+aligned": {"parameter_alignment": True},
    "zero2+overlap": {"overlap_comm": True},
    "zero2+scattered": {"contiguous_gradients": False},
    "zero2+all_reduce": {"reduce_scatter": False},
    "zero2+small_buckets": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
    "zero2-offload+round_robin": {"round_robin_gradients": True},
    "zero3+forgetful": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
    "zero3+overlap": {"overlap_comm": True},
    "zero3+sub_groups": {"sub_group_size": 5000, "stage3_param_persistence_threshold": 0},
    "zero3+bare": BARE,
    # Of two ranks both are in one group.
    "zero3+second_copies": SECOND_COPIES,
    "zero3+copies_without_prefetch": {**SECOND_COPIES, "stage3_prefetch_bucket_size": 0},
    "zero3-offload+second_copies": SECOND_COPIES,
    "zero3+files": {"offload_param": FILES, **BARE},
    "zero3-offload+files": {"offload_param": FILES},
    "zero3-offload+files_and_copies": {"offload_param": FILES, **SECOND_COPIES},
    "zero3+all_persistent": {"stage3_param_persistence_threshold": 10**9},
    "zero3-offload+optimizer_only": {"offload_param": {"device": "none"}},
}


def deepspeed_of(engine: str) -> dict[str, Any] | None:
    """The DeepSpeed JSON of a key of ENGINES or VARIANTS."""
    if engine in ENGINES:
        return ENGINES[engine]
    known = engine.partition("+")[0]
    content = copy.deepcopy(ENGINES[known if known in ENGINES else known.removesuffix("-offload")])
    assert content is not None
    content["zero_optimization"] |= VARIANTS.get(engine, {})
    if engine.endswith("+fp32_gradients"):
        content["data_types"] = {"grad_accum_dtype": "fp32"}
    return content


@dataclass
class Micro:
    """A micro-batch of random tokens."""

    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    weight: float = 1.0


@dataclass
class Outcome:
    """What a run showed on this rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    stage_of_step: list[int] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    padding: int = 0
    updated: list[int] = field(default_factory=list)
    planned: list[int] = field(default_factory=list)
    frozen_changed: list[list[str]] = field(default_factory=list)
    live_unmoved: list[list[str]] = field(default_factory=list)
    frozen_with_gradient: list[list[str]] = field(default_factory=list)
    state_names: list[list[str]] = field(default_factory=list)
    live_names: list[list[str]] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    graph_breaks: int = 0
    carried: list[str] = field(default_factory=list)
    engines: list[str] = field(default_factory=list)
    faults: list[tuple[str | None, tuple[int, ...]]] = field(default_factory=list)


def row_loss(outputs: Any, labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each row."""
    return torch.nn.functional.cross_entropy(outputs.logits.float(), labels["labels"], reduction="none")


def steep_loss(outputs: Any, labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same value, with an infinite gradient."""
    loss = row_loss(outputs, labels)
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


def global_batch(step: int, rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(rows, 12)` and labels `(rows,)` of a step, the same for any world size."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(5, vocabulary, (rows, 12), generator=generator)
    return tokens, tokens[:, 1] % 2


def end_token(config: PreTrainedConfig) -> int | None:
    """What each row must end in: T5's classifier looks for it."""
    return int(config.eos_token_id) if config.is_encoder_decoder else None


def share(step: int, rows: int, vocabulary: int, rank: int, world_size: int, micro: int, end: int | None = None) -> list[Micro]:
    """This rank's micro-batches of a global batch; a rank with fewer rows gets fillers of weight 0."""
    tokens, labels = global_batch(step, rows, vocabulary)
    if end is not None:
        tokens[:, -1] = end
    mine = torch.arange(rank, rows, world_size)
    count = math.ceil(math.ceil(rows / world_size) / micro)
    batches = []
    for index in range(count):
        chosen = mine[index * micro : (index + 1) * micro]
        filler = len(chosen) == 0
        chosen = torch.zeros(1, dtype=torch.long) if filler else chosen
        inputs = {"input_ids": tokens[chosen], "attention_mask": torch.ones_like(tokens[chosen])}
        batches.append(Micro(inputs, {"labels": labels[chosen]}, 0.0 if filler else 1.0))
    return batches


def reset_accelerate() -> None:
    """Lets the next case make its own Accelerator; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def make_engine(
    module: torch.nn.Module, engine: str, by_stage: Sequence[str] = (), *, counts: bool = False, **settings: Any
) -> Engine:
    """An engine of the named kind over `module`, or of one kind for each stage."""
    set_up_cpu(1)
    reset_accelerate()
    if settings.get("precision") == "fp16" and deepspeed_of(engine) is not None and not torch.cuda.is_available():
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed asks for a processor that computes fp16 itself; torch does it on any, slowly.
        vars(get_accelerator())["is_fp16_supported"] = lambda: True
    deepspeed = deepspeed_of(engine)
    accelerator = make_accelerator(deepspeed=deepspeed)
    settings["optimizer"] = OPTIMIZERS.get(settings.pop("optimizer", "adamw")).of(Request())
    kinds = [deepspeed_of(kind) or {} for kind in by_stage]
    of_stage = (lambda stage: kinds[stage - 1]) if kinds else None
    made = create_engine(module, EngineSettings(micro_batch_size=2, **settings), accelerator, deepspeed, of_stage)
    assert made.name == engine.partition("+")[0], (made.name, engine)
    made.counts = counts
    return made


def builds_of(
    module: torch.nn.Module,
    schedule: str,
    embeddings: str,
    stages: int,
    steps: int,
    options: dict[str, Any],
    method: Method[Any] | None = None,
) -> tuple[Any, tuple[StageBuild, ...]]:
    """Partition and stage builds of a tiny run."""
    parts = partition(module, family_of(module))
    method = method or make_method("full", Subject(family_of(module)))
    plan = build_stages(
        schedule, num_blocks=parts.num_blocks, stages=stages, total_steps=steps, embeddings=embeddings, options=options
    )
    return parts, build_for(plan, parts, method, weight_decay=0.01)


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole fp32 weights of the live parameters, put together from all ranks' slices."""
    own = [(s.name, s.start, s.end, s.tensors["master"].detach().cpu().clone()) for s in slices_of(engine.shards())]
    whole: dict[str, torch.Tensor] = {}
    for part in gathered(engine, own):
        for name, start, end, values in part:
            target = whole.setdefault(name, torch.full((numel_of(engine, name),), float("nan")))
            target[start:end] = values
    return whole


def rate_in_use(engine: Engine) -> float:
    """The learning rate that the optimizer itself took in its last step."""
    optimizer = engine._zero() if isinstance(engine, DeepSpeedEngine) else engine.optimizer  # type: ignore[attr-defined]
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    assert len(rates) == 1, rates
    return rates.pop()


def numel_of(engine: Engine, name: str) -> int:
    """Elements of the whole parameter, also when it is partitioned."""
    parameter = engine.parameters[name]
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def run(
    engine: str = "plain",
    family: str = "bert",
    schedule: str = "progtuning",
    embeddings: str = "always",
    method: str = "full",
    stages: int = 3,
    steps: int = 6,
    rows: int = 8,
    micro: int = 2,
    blocks: int = 6,
    force: bool = False,
    width: int = 16,
    precision: str = "fp32",
    checkpointing: bool = False,
    toggle: bool = False,
    curve: str = "linear",
    options: dict[str, Any] | None = None,
    method_options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    poison: Sequence[tuple[int, int]] = (),
    poison_gradient: Sequence[tuple[int, int]] = (),
    optimizer: str = "adamw",
    by_stage: Sequence[str] = (),
    trials: bool = False,
    compiled: bool = False,
    rates: Sequence[float] = (),
) -> Outcome:
    """Trains a tiny model and records what the contract tests ask about.

    Args:
        engine: a key of ENGINES or VARIANTS; "plain" ignores the other ranks.
        toggle: replace every switch by `requires_grad_(False)`, which is wrong under ZeRO.
        config: further entries of the model's config.
        poison: (step, rank) whose loss becomes infinite.
        width: hidden size (of families that call it so).
        trials: of two micro-batches before each stage, as for `train.micro_batch_size: auto`.
        compiled: each block, without a compiler of machine code.
        by_stage: a key of ENGINES or VARIANTS for each stage, beginning with `engine`.
        rates: learning rates of all steps, instead of the curve.
        poison_gradient: (step, rank) whose loss stays finite, and whose gradient becomes infinite.
    """
    module = tiny_model(family, blocks=blocks, **({} if width == 16 else {"hidden_size": width}), **(config or {}))
    trained = make_method(method, Subject(family_of(module), precision=precision), method_options)
    with seeded(0):
        module = trained.prepare(module)
    if checkpointing:
        enable_checkpointing(module)
    module.train()
    made = make_engine(module, engine, by_stage, precision=precision, optimizer=optimizer)
    parts, builds = builds_of(module, schedule, embeddings, stages, steps, dict(options or {}), trained)
    curve_of = LearningRate(1e-3, curve, steps, warmup_steps=1, final_fraction=0.1)  # type: ignore[arg-type]
    vocabulary = int(module.config.vocab_size)
    compiler = Compiler(made, family_of(module), "aot_eager") if compiled else None
    outcome = Outcome()
    for build in builds:
        if toggle and made.build is not None:
            for name, parameter in made.parameters.items():
                parameter.requires_grad_(name in build.live)
        else:
            outcome.carried.append(made.begin_stage(build, force=force).carried)
            outcome.engines.append(made.name)
        if compiler is not None:
            compiler.begin_stage(0)
            torch._dynamo.utils.counters.clear()
        for count in (1, 3) if trials else ():
            tried = share(99, count * made.world_size, vocabulary, made.rank, made.world_size, 8, end_token(module.config))
            assert made.trial(tried[0], row_loss) > 0
        live = sorted(build.live)
        frozen = [name for name in parts.parameters if name not in build.live]
        before, bits, volume = masters(made), made.digests(frozen), made.updated_volume()
        for step in range(build.stage.start_step, build.stage.end_step):
            rate = rates[step] if rates else curve_of(step)
            batches = share(step, rows, vocabulary, made.rank, made.world_size, micro, end_token(module.config))
            infinite = any((step, made.rank) == bad for bad in poison)
            loss = (lambda o, y: row_loss(o, y) * float("inf")) if infinite else row_loss
            loss = steep_loss if (step, made.rank) in poison_gradient else loss
            result = made.train_step(batches, rows, loss, rate)
            outcome.losses.append(result.loss)
            outcome.faults.append((result.fault, result.ranks))
            outcome.grad_norms.append(result.grad_norm)
            outcome.learning_rates.append(rate_in_use(made))
            outcome.stage_of_step.append(build.stage.index)
        after, bits_after = masters(made), made.digests(frozen)
        outcome.updated.append(made.updated_volume() - volume)
        outcome.planned.append(build.stage.steps * sum(parts.parameters[name].numel for name in live))
        changed = made.gather_objects([name for name in frozen if bits[name] != bits_after[name]])
        outcome.frozen_changed.append(sorted({name for names in changed for name in names}))
        outcome.live_unmoved.append([name for name in live if name in before and torch.equal(before[name], after[name])])
        outcome.frozen_with_gradient.append([name for name in frozen if made.parameters[name].grad is not None])
        outcome.padding += sum(shard.tensor.numel() - shard.numel for shard in made.shards())
        names = made.gather_objects([piece.name for shard in made.shards() for piece in shard.pieces])
        outcome.state_names.append(sorted({name for part in names for name in part}))
        outcome.live_names.append(live)
        if compiler is not None:
            counters = torch._dynamo.utils.counters
            outcome.graphs.append(counters["stats"]["unique_graphs"])
            outcome.graph_breaks += sum(counters["graph_break"].values())
            compiler.close()
    outcome.parameters = {name: value.clone() for name, value in made.full_parameters() if value is not None}
    made.close()
    del made
    gc.collect()
    return outcome


def loss_scales(engine: str) -> list[tuple[bool, float]]:
    """(whether the step was applied, loss scale after it) of four fp16 steps, the two in the middle overflowing; last, after a
    switch."""
    module = tiny_model("bert", blocks=4)
    module.train()
    made = make_engine(module, engine, precision="fp16")
    _, builds = builds_of(module, "progtuning", "always", 3, 6, {})
    config: PreTrainedConfig = module.config

    found = []
    made.begin_stage(builds[0])
    for step in range(4):
        batches = share(step, 8, config.vocab_size, made.rank, made.world_size, 2)
        loss = (lambda o, y: row_loss(o, y) * 1e8) if step in (1, 2) else row_loss
        result = made.train_step(batches, 8, loss, 1e-3)
        assert result.fault is None
        found.append((result.applied, scale_of(made)))
    made.begin_stage(builds[1])
    found.append((True, scale_of(made)))
    made.close()
    return found


def scale_of(engine: Any) -> float:
    """The loss scale of an fp16 run."""
    return float(engine._zero().loss_scale if isinstance(engine, DeepSpeedEngine) else engine._scaler.get_scale())


def overflow_at_the_lowest_scale(engine: str) -> tuple[str | None, bool, bool]:
    """(fault, applied, scale still the lowest) of an fp16 step whose gradient overflows when the loss scale can fall no more."""
    module = tiny_model("bert", blocks=2)
    module.train()
    made = make_engine(module, engine, precision="fp16")
    _, builds = builds_of(module, "none", "always", 1, 1, {})
    made.begin_stage(builds[0])
    if isinstance(made, DeepSpeedEngine):
        made._zero().loss_scaler.cur_scale = made._zero().loss_scaler.min_scale
    elif isinstance(made, LocalEngine):
        made._scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    batches = share(0, 8, module.config.vocab_size, made.rank, made.world_size, 2)
    result = made.train_step(batches, 8, steep_loss, 1e-3)
    kept = scale_of(made) == 1.0
    made.close()
    return result.fault, result.applied, kept


def freeze_imports() -> None:
    """Takes what importing left out of garbage collection: each switch collects, and would scan all of it each time."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")
    gc.collect()
    gc.freeze()


freeze_imports()
