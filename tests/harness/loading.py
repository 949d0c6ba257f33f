"""Loads a checkpoint under ZeRO-3 in a rank, for the tests of partitioned loading."""

from __future__ import annotations

from typing import Any

import torch

from progscale.engine.launch import make_accelerator, set_up_cpu
from progscale.engine.loading import load_module, whole_for_peft
from progscale.layers import seeded
from progscale.learning_rate import LearningRate
from progscale.methods import Subject, make_method
from progscale.models import HeadKind, ModelRequest, find_family
from tests.harness.cases import ENGINES, builds_of, make_engine, reset_accelerate
from tests.harness.moves import everywhere, take_steps


def load(
    path: str,
    seed: int,
    dtype: str = "float32",
    head: HeadKind = "sequence_classification",
    family: str | None = None,
    **request: Any,
) -> dict[str, Any]:
    """Gathered parameters, each rank's share of elements, and the logits of one batch through the gathered model."""
    import deepspeed

    set_up_cpu(1)
    reset_accelerate()
    make_accelerator(deepspeed=ENGINES["zero3"])
    wanted = ModelRequest(path, head=head, **request)
    torch.manual_seed(seed)
    module = load_module(wanted, find_family(wanted, family), ENGINES["zero3"], dtype=getattr(torch, dtype))
    # What is loaded whole is partitioned when an engine begins.
    held = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in module.parameters())
    whole = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    found = {"parameters": whole, "buffers": buffers, "held": held, "training": module.training}
    return {**found, "generation": getattr(module, "generation_config", None)}


def train(
    path: str, checkpointing: bool = False, method: str = "full", method_options: dict[str, Any] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of two stages of a checkpoint that was loaded in partitions."""
    set_up_cpu(1)
    reset_accelerate()
    make_accelerator(deepspeed=ENGINES["zero3"])
    wanted = ModelRequest(path, head="sequence_classification")
    module: Any = load_module(wanted, find_family(wanted), ENGINES["zero3"])
    trained = make_method(method, Subject(find_family(wanted)), method_options)
    with seeded(0), whole_for_peft(ENGINES["zero3"]):
        module = trained.prepare(module)
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    made = make_engine(module, "zero3")
    _, builds = builds_of(module, "progtuning", "first_stage", 2, 4, {}, trained)
    curve, losses = LearningRate(1e-3, "linear", 4, warmup_steps=1, final_fraction=0.1), []
    for build in builds:
        made.begin_stage(build)
        losses += take_steps(made, build, 8, 4, module.config.vocab_size, curve)
    weights = everywhere(made)
    made.close()
    return losses, weights
