"""From a config to a session; all that can be wrong with the input shows here, before time is spent."""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from progscale.blocks import Partition, partition
from progscale.cache import check_cache, make_feed, nodes_of
from progscale.checkpoint.saver import Saver
from progscale.checkpoint.store import Store
from progscale.compiling import Compiler, check_backend
from progscale.config import Config, micro_batch_size
from progscale.data import TrainLoader, pad_values
from progscale.engine import ranks
from progscale.engine.base import Engine, EngineSettings
from progscale.engine.launch import create_engine, set_up_cpu
from progscale.engine.loading import load_module, untied, whole_for_peft
from progscale.errors import ConfigError, ModelError
from progscale.export import BASE, describe
from progscale.folder import check_unfinished, open_folder, restore_replaced, resume_line, unfinished
from progscale.inputs import NO_PERMISSIONS, Inputs, Permissions, find_inputs
from progscale.joining import check_disk, check_same_input, join_ranks, show_network
from progscale.layers import seeded
from progscale.learning_rate import LearningRate
from progscale.meters import MemoryMeter
from progscale.methods import Method, Subject, make_method
from progscale.models.family import Family
from progscale.models.loading import check_attention, check_weights, missing_weights
from progscale.models.lookup import hidden_size
from progscale.models.saving import save_whole
from progscale.models.tokenizers import set_pad_token
from progscale.names import method_faults, with_options
from progscale.optim import build_for
from progscale.optimizers import OPTIMIZERS, Optimizer, Request
from progscale.plan import NOMINAL_STEPS, Plan, check_shared_blocks, make_plan, render_plan, schedule_options
from progscale.resume import FOLDER as CHECKPOINTS
from progscale.resume import Resumed, derive_stage, find_checkpoint, identity_of
from progscale.schedule import Stage, build_stages
from progscale.session import Session
from progscale.signals import Signals, mark_begun
from progscale.tasks.base import Tokenized
from progscale.trackers import RunConsole, RunFolder
from progscale.tracking import Tracking, tracker_faults

# The dtype of the parameters themselves, where it is not float32; autocast needs none.
PARAMETER_DTYPES = {"bf16_params": torch.bfloat16, "fp16": torch.float16}


def prepare(
    config: Config,
    permissions: Permissions = NO_PERMISSIONS,
    *,
    dry_run: bool = False,
    resume: str = "never",
    signals: Signals | None = None,
) -> Session | Plan:
    """Everything a run needs, in the order in which mistakes are cheapest to find.

    The data and the model's config first, then method and schedule on a model without weights, then the plan of the tokenised
    data, the checkpoint to go on from, the weights, the run's folder and the engine. With `dry_run` it stops at the plan. Every
    rank must call it.

    Args:
        config: of the run.
        permissions: of the command line.
        dry_run: stop at the plan.
        resume: "never", "auto", "must", or the path of a checkpoint or of a run's folder.
        signals: of this process; by default the run cannot be told to stop.

    Raises:
        UserError: config, data, schedule, model or checkpoint do not fit. The run folder has not been touched, unless it is the
            engine that does not take the model.
        FinishedError: the run to go on with has ended already.
    """
    faults = [*method_faults(config), *tracker_faults(config)]
    if faults:
        raise ConfigError(faults)
    config = with_options(config)
    set_up_cpu(config.run.threads)
    found = find_inputs(config, permissions)
    task, family = found.task, found.family
    method = method_of(config, found)
    parts = partition_of(found, method)
    nominal_plan(config, family, parts, method)
    accelerator, network = join_ranks(config, {"--resume": resume, "--dry-run": dry_run, **asdict(permissions)})
    console = RunConsole(accelerator.is_main_process)
    notice = optimizer_of(config).check(torch.device(accelerator.device))
    if notice is not None:
        console.show(notice)
    nodes = nodes_of(accelerator)
    if not dry_run:
        check_disk(config, sum(info.numel for info in parts.parameters.values()), int(accelerator.num_processes))
    if network is not None:
        show_network(network, console, on_gpu=torch.device(accelerator.device).type == "cuda")
    run_folder = Path(config.run.output_dir) / config.run_name
    if resume in ("auto", "must") and not dry_run:
        ranks.on_main(lambda: check_unfinished(config, run_folder))
    if not dry_run:
        check_attention(found.request, found.skeleton)
        check_backend(config.train.compile, torch.device(accelerator.device))
        check_weights(found.request, family)
    drawn = missing_weights(found.request, family, found.skeleton, local_only=dry_run)
    if drawn:
        method = method_of(config, found, drawn)
        parts = partition_of(found, method)
    splits = task.tokenize(found.tokenizer, config.train.max_length)
    model_config = getattr(found.skeleton, "config", None)
    if family.check_rows is not None:
        family.check_rows(found.request, model_config, splits)
    padding = pad_values(found.tokenizer, model_config)
    min_tokens = 1 if family.min_tokens is None else family.min_tokens(model_config)
    loader = make_loader(config, splits["train"], padding, accelerator, min_tokens)
    if config.frozen_mode == "eval":
        # With a cache and without one: it may come and go.
        loader.nodes = nodes.count
    total_steps = total_steps_of(config, loader.steps_per_epoch)
    stages = stages_of(config, family, parts, total_steps)
    model = "demo encoder" if config.model.name is None else found.request.name
    plan = make_plan(
        parts,
        stages,
        method,
        loader.steps_per_epoch,
        model=model,
        schedule=config.schedule_label,
        width=hidden_size(found.skeleton),
        checkpointing=config.train.gradient_checkpointing,
    )
    check_cache(config, plan)
    world_size = int(accelerator.num_processes)
    console.show(
        f"{model} ({family.name}) on {task.name}: {len(splits['train'])} training rows, "
        f"{total_steps} steps of {config.train.global_batch_size} rows on {world_size} "
        f"{'process' if world_size == 1 else 'processes'} ({torch.device(accelerator.device).type}), {config.train.precision}"
    )
    if family.infer is not None:
        console.show(f"model family '{family.name}': {family.infer(found.skeleton)}")
    console.show(render_plan(plan))
    if dry_run:
        return plan

    identity = identity_of(config, parts, stages, splits, steps_per_epoch=loader.steps_per_epoch)
    check_same_input(identity)
    resumed = None
    if resume != "never":
        ranks.on_main(lambda: restore_replaced(run_folder))
        resumed = find_checkpoint(resume, run_folder, identity, console.show)
        if resumed is not None:
            derive_stage(stages, resumed.checkpoint)
        console.show(resume_line(resumed, run_folder, total_steps))
    store = Store(run_folder / CHECKPOINTS, config.checkpoint.keep)
    memory = MemoryMeter(torch.device(accelerator.device))
    module = load_base(config, found)
    folder = ranks.on_main(lambda: open_folder(config, plan, run_folder, resumed, store))
    if folder is not None and (resumed is None or resumed.in_place):
        # What goes on from a checkpoint of another run has nothing of its own before its first.
        mark_begun()
    try:
        if folder is not None and network is not None:
            folder.record("network", **network.to_json())
        if folder is not None and folder.moved is not None:
            console.show(f"the run that lay in {folder.path} is now in {folder.moved}{unfinished(folder.moved)}")
        # A run that goes on in its folder has them there, and another machine may draw others.
        kept = resumed is not None and resumed.in_place
        if found.request.random_weights and not method.saves_whole and not kept:
            ranks.on_main(lambda: save_base(module, found.tokenizer, base_folder(config)))
        engine = make_engine(config, module, method, accelerator, parts)
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    # What is here now stays to the end. Without this each switch would scan it all in search of the old engine's cycles.
    gc.collect()
    gc.freeze()
    feed = make_feed(config, engine, family, parts, splits, nodes, identity, console.show)
    decay, decay_all = config.optimizer.weight_decay, config.optimizer.decay_bias_and_norm
    return Session(
        config=config,
        task=task,
        tokenizer=found.tokenizer,
        padding=padding,
        splits=splits,
        loader=loader,
        partition=parts,
        method=method,
        builds=build_for(stages, parts, method, weight_decay=decay, decay_bias_and_norm=decay_all),
        plan=plan,
        learning_rate=learning_rate_of(config, stages, total_steps),
        engine=engine,
        memory=memory,
        console=console,
        folder=folder,
        total_steps=total_steps,
        steps_per_epoch=loader.steps_per_epoch,
        saver=Saver(
            engine,
            store,
            shard_bytes=config.checkpoint.shard_megabytes * 2**20,
            background=config.checkpoint.background,
        ),
        identity=identity,
        about=describe(method, found.request, found.tokenizer),
        resumed=resumed,
        signals=signals or Signals(),
        feed=feed,
        nodes=nodes,
        tracking=start_tracking(config, folder, resumed),
        compiler=None if config.train.compile == "off" else Compiler(engine, family, config.train.compile),
    )


def start_tracking(config: Config, folder: RunFolder | None, resumed: Resumed | None) -> Tracking | None:
    """The run's trackers, on the main process."""
    if folder is None or not config.trackers.names:
        return None
    return Tracking(config, folder.path, resumed.checkpoint.step if resumed is not None and resumed.in_place else 0)


def make_loader(config: Config, split: Tokenized, padding: dict[str, int], accelerator: Any, min_tokens: int = 1) -> TrainLoader:
    """This rank's share of the training batches, each padded to `min_tokens` at least."""
    world_size, on_gpu = int(accelerator.num_processes), torch.device(accelerator.device).type == "cuda"
    return TrainLoader(
        split,
        padding,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=micro_batch_size(config, world_size),
        max_tokens=config.train.max_tokens_per_micro_batch,
        seed=config.run.seed,
        world_size=world_size,
        rank=int(accelerator.process_index),
        group_by_length=config.train.group_by_length,
        num_workers=config.train.num_workers,
        pin_memory=on_gpu,
        multiple_of=8 if on_gpu else 1,  # tensor cores; on a CPU it is padding and nothing else
        min_tokens=min_tokens,
    )


def method_of(config: Config, found: Inputs, drawn: frozenset[str] = frozenset()) -> Method[Any]:
    """The config's method, applied to its model; `drawn` from `missing_weights`."""
    # Random weights lie nowhere: an adapter would have no base model to be loaded on, so they are written beside it.
    base = str(base_folder(config)) if found.request.random_weights else found.request.name
    request = found.request
    subject = Subject(found.family, request.head, base, precision=config.train.precision, drawn=drawn, revision=request.revision)
    return make_method(config.method.name, subject, config.method.options)


def partition_of(found: Inputs, method: Method[Any]) -> Partition:
    """The parts of the model as the method prepares it, which stays as it was.

    Raises:
        ModelError: the method does not fit the model.
    """
    with torch.device("meta"):
        return partition(method.prepare(copy.deepcopy(found.skeleton)), found.family)


def nominal_plan(config: Config, family: Family, parts: Partition, method: Method[Any]) -> Plan:
    """The plan for a number of steps that fits every schedule: which blocks are live does not depend on it.

    Raises:
        ScheduleError: the schedule does not fit the model, or the method trains nothing in a stage.
    """
    steps = max(NOMINAL_STEPS * config.stages, (config.schedule.starts or [0])[-1] + 1)
    stages = stages_of(config, family, parts, steps)
    return make_plan(parts, stages, method, steps, schedule=config.schedule.name)


def base_folder(config: Config) -> Path:
    """Where the random weights of a run's base model are kept."""
    return Path(config.run.output_dir).expanduser().absolute() / config.run_name / BASE


def load_base(config: Config, found: Inputs) -> torch.nn.Module:
    """The model with its weights, before the method has prepared it. A collective.

    Raises:
        ModelError: the weights cannot be loaded, or do not fit.
    """
    # Every rank needs the same weights, also those of a new head.
    torch.manual_seed(config.run.seed)
    dtype = PARAMETER_DTYPES.get(config.train.precision, torch.float32)
    module = load_module(found.request, found.family, config.engine.deepspeed, dtype=dtype)
    set_pad_token(module, found.tokenizer.pad_token_id)
    return module


def make_engine(config: Config, module: torch.nn.Module, method: Method[Any], accelerator: Any, parts: Partition) -> Engine:
    """The model as the method prepares it, in the engine that the config asks for. A collective.

    Raises:
        ModelError: the weights make another model than the config.
    """
    train, deepspeed = config.train, config.engine.deepspeed
    # What a method adds is the same whatever was drawn before it, under ZeRO-3 too.
    with seeded(config.run.seed), whole_for_peft(deepspeed):
        module = method.prepare(module)
    check_as_planned(module, parts)
    if train.gradient_checkpointing:
        enable_checkpointing(module)
    module.train()
    settings = EngineSettings(
        precision=train.precision,
        optimizer=optimizer_of(config),
        max_grad_norm=train.max_grad_norm,
        micro_batch_size=micro_batch_size(config, int(accelerator.num_processes)),
    )
    return create_engine(module, settings, accelerator, deepspeed, lambda stage: config.deepspeed_of(stage) or {})


def save_base(module: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes random weights before they are trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    save_whole(module, {name: value.detach() for name, value in module.state_dict().items()}, folder)
    tokenizer.save_pretrained(folder)


def optimizer_of(config: Config) -> Optimizer:
    """The optimizer that the config names.

    Raises:
        RegistryError: there is none of that name.
        ConfigError: an option that it does not have.
    """
    section = config.optimizer
    request = Request((section.betas[0], section.betas[1]), section.eps, config.train.fused_optimizer, section.options)
    return OPTIMIZERS.get(section.name).of(request)


def check_as_planned(module: torch.nn.Module, parts: Partition) -> None:
    """Refuses a model whose parameters are not those that were planned: transformers unties what differs in the weights.

    Raises:
        ModelError: naming the first of them.
    """
    tied = {other: info.name for info in parts.parameters.values() for other in info.tied}
    for name, _ in module.named_parameters():
        if name in tied:
            raise ModelError(untied(name, tied[name]))
        if name not in parts.parameters:
            raise ModelError(f"the model that was loaded has a parameter '{name}', which that of its config has not")


def total_steps_of(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: the epochs', cut by `train.max_steps`."""
    steps = math.ceil(config.train.epochs * steps_per_epoch - 1e-9)
    return min(steps, config.train.max_steps or steps)


def stages_of(config: Config, family: Family, parts: Partition, total_steps: int) -> tuple[Stage, ...]:
    """The stages that the config's schedule gives for this model.

    Raises:
        ScheduleError: they do not fit it.
    """
    check_shared_blocks(family, parts, config.schedule.name, config.stages)
    return build_stages(
        config.schedule.name,
        num_blocks=parts.num_blocks,
        stages=config.stages,
        total_steps=total_steps,
        embeddings=config.schedule.embeddings,
        options=schedule_options(config),
    )


def learning_rate_of(config: Config, stages: tuple[Stage, ...], total_steps: int) -> LearningRate:
    """The run's learning-rate curve."""
    optimizer = config.optimizer
    return LearningRate(
        peak=optimizer.lr,
        curve=optimizer.lr_schedule,
        total_steps=total_steps,
        warmup_steps=optimizer.warmup_steps or 0,
        warmup_fraction=optimizer.warmup_fraction or 0.0,
        final_fraction=optimizer.final_lr_fraction,
        power=optimizer.power,
        restart_each_stage=optimizer.restart_each_stage,
        stages=stages,
    )


def enable_checkpointing(module: Any) -> None:
    """Non-reentrant gradient checkpointing: the reentrant kind would need gradients through the frozen blocks."""
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(module, "disable_input_require_grads"):
        # Transformers makes the embeddings' output require a gradient, for the reentrant kind: every frozen block would be
        # computed again, and the backward pass would run through it.
        module.disable_input_require_grads()
