"""What a config names, found and checked: task, model without weights, tokenizer. No weight is read, and no other rank needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from progscale.config import Config
from progscale.errors import ConfigError, Fault, ModelError
from progscale.models.family import Family, ModelRequest
from progscale.models.loading import build_meta, find_family
from progscale.models.tokenizers import (
    check_tokenizer,
    drop_token_types,
    ensure_padding,
    load_tokenizer,
    max_tokens,
)
from progscale.names import metric_faults
from progscale.tasks.base import TASKS, Task
from progscale.tasks.demo import DEMO_MODEL, demo_tokenizer


@dataclass(frozen=True)
class Permissions:
    """What only the command line may allow, never a config file."""

    allow_pickle: bool = False
    trust_remote_code: bool = False


NO_PERMISSIONS = Permissions()


@dataclass(frozen=True)
class Inputs:
    """What a config names, found and checked; no weight is loaded yet, and no other rank is needed for it."""

    task: Task
    request: ModelRequest
    family: Family
    skeleton: torch.nn.Module
    tokenizer: Any


def find_inputs(config: Config, permissions: Permissions) -> Inputs:
    """Task, model without weights and tokenizer.

    Raises:
        UserError: one of them is missing, or they do not go together.
    """
    check_metric(config, permissions)
    if config.model.name is None and config.task.name != "demo":
        raise ConfigError(Fault("model.name", f"missing; task '{config.task.name}' brings no model of its own"))
    task: Task = TASKS.get(config.task.name)(config.task, seed=config.run.seed)
    task.check()
    request = model_request(config, task, permissions)
    family = find_family(request, config.model.family)
    skeleton = build_meta(request, family)
    tokenizer = demo_tokenizer() if config.model.name is None else tokenizer_of(config, family, permissions)
    model_config = getattr(skeleton, "config", None)
    drop_token_types(tokenizer, model_config)
    ensure_padding(tokenizer)
    check_tokenizer(tokenizer, model_config, config.train.max_length, family)
    if family.check is not None:
        family.check(request, model_config, tokenizer, config.train)
    if config.train.gradient_checkpointing:
        check_checkpointing(skeleton)
    check_generation(config, task, model_config, family)
    return Inputs(task, request, family, skeleton, tokenizer)


def check_generation(config: Config, task: Task, model_config: Any, family: Family) -> None:
    """Refuses a model that cannot read or write what the task asks of it.

    Raises:
        ModelError: its decoder has no start token.
        ConfigError: a decoder has no room for what it is to write after the longest prompt.
    """
    if task.head == "seq2seq_lm" and getattr(model_config, "decoder_start_token_id", None) is None:
        raise ModelError(
            "the model's config has no decoder_start_token_id, with which its decoder begins; set it with model.overrides "
            "(T5 has 0)"
        )
    if task.head != "causal_lm" or not getattr(task, "generates", False):
        return
    limit, more = max_tokens(model_config, family), cast(Any, task).max_new_tokens
    if limit is not None and config.train.max_length + more > limit:
        raise ConfigError(
            Fault(
                "task.max_new_tokens",
                f"{more} beside train.max_length {config.train.max_length} are more than the {limit} tokens that this model "
                "takes; lower one of them",
            )
        )


def check_metric(config: Config, permissions: Permissions) -> None:
    """Refuses a metric that runs code, unless the command line allows it.

    Raises:
        ConfigError: it does not.
    """
    faults = metric_faults(config, trust_remote_code=permissions.trust_remote_code)
    if faults:
        raise ConfigError(faults)


def model_request(config: Config, task: Task, permissions: Permissions) -> ModelRequest:
    """What model the config and the task ask for; the demo brings its own tiny architecture."""
    demo = config.model.name is None
    overrides: dict[str, Any] = {**(DEMO_MODEL if demo else {}), **config.model.overrides}
    return ModelRequest(
        name="bert-base-uncased" if demo else str(config.model.name),
        head=task.head,
        num_labels=task.num_labels,
        label_names=task.label_names,
        problem_type=task.problem_type,
        overrides=overrides,
        random_weights=demo or config.model.random_weights,
        revision=config.model.revision,
        allow_pickle=permissions.allow_pickle,
        trust_remote_code=permissions.trust_remote_code,
        attention=None if config.model.attention == "auto" else config.model.attention,
    )


def tokenizer_of(config: Config, family: Family, permissions: Permissions) -> Any:
    """The tokenizer that the config names, or the model's own."""
    own = config.model.tokenizer is None
    return load_tokenizer(
        str(config.model.name if own else config.model.tokenizer),
        revision=config.model.revision if own else None,
        trust_remote_code=permissions.trust_remote_code,
        family=family if own else None,
    )


def check_checkpointing(module: Any) -> None:
    """Refuses gradient checkpointing for a model that cannot do it.

    Raises:
        ModelError: it has no `gradient_checkpointing_enable`, or says itself (as transformers' MPNet does) that it has no use.
    """
    own = type(module).__name__
    if not hasattr(module, "gradient_checkpointing_enable"):
        raise ModelError(f"train.gradient_checkpointing: {own} has no gradient_checkpointing_enable; set it to false")
    if not getattr(module, "supports_gradient_checkpointing", True):
        raise ModelError(f"train.gradient_checkpointing: {own} does not support it; set it to false")
