"""The schema as a table for the help, a config's fingerprint, and its batch sizes for a world size."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from progscale.config.kinds import type_text
from progscale.config.layers import dump_config
from progscale.config.schema import SECTIONS, Config
from progscale.errors import ConfigError, Fault

# Rows a rank runs at once where nothing says how many.
MICRO_BATCH_CAP = 32


class Option(NamedTuple):
    """One option: dotted key, accepted values, default, and one line about it."""

    key: str
    type: str
    default: Any
    description: str


def describe_schema() -> list[Option]:
    """Every option of a config, in the order of the schema."""
    found = []
    for name, field in Config.model_fields.items():
        section = SECTIONS.get(name)
        fields = {name: field} if section is None else {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
        for key, inner in fields.items():
            default = inner.get_default(call_default_factory=True)
            found.append(Option(key, type_text(inner), default, inner.description or ""))
    return found


def config_hash(config: Config) -> str:
    """SHA-256 of what makes it this run: all but its name, output folder and description, when it is saved, and who is told."""
    values = dump_config(config)
    del values["description"], values["run"]["name"], values["run"]["output_dir"], values["checkpoint"], values["trackers"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# What may differ when a run goes on: where things lie, how the work is shared out, and what is written when. Where the
# data and a local model come from is free too; their content is compared.
FREE_KEYS = frozenset(
    {
        *("description", "run.name", "run.output_dir", "run.threads"),
        *("model.name", "model.tokenizer"),
        *("task.path", "task.hub", "task.train_file", "task.validation_file"),
        *(
            "train.memory_gigabytes",
            "train.micro_batch_size",
            "train.gradient_accumulation_steps",
            "train.max_tokens_per_micro_batch",
        ),
        *("train.eval_batch_size", "train.gradient_checkpointing", "train.num_workers", "train.logging_steps"),
        *("train.evaluate", "train.save_model", "train.nonfinite", "train.fused_optimizer", "train.compile", "model.attention"),
        *("cache.storage", "cache.budget_gigabytes", "cache.path"),
    }
)
FREE_SECTIONS = frozenset({"engine", "checkpoint", "trackers"})


def is_decisive(section: str, key: str) -> bool:
    """Whether an option decides what a run computes, whatever the machine and the world size."""
    return section not in FREE_SECTIONS and f"{section}.{key}" not in FREE_KEYS


def decisive_values(config: Config) -> dict[str, Any]:
    """Dotted key → value of every option that decides what a run computes, whatever the machine and the world size."""
    found = {}
    for name, values in dump_config(config).items():
        if isinstance(values, dict):
            found.update({f"{name}.{key}": value for key, value in values.items() if is_decisive(name, key)})
    # What a null stands for hangs on the cache, which may come and go.
    found["schedule.frozen_mode"] = config.frozen_mode
    return found


def micro_batch_size(config: Config, world_size: int) -> int:
    """Rows a rank runs at once, at most, when `world_size` ranks share the global batch.

    Raises:
        ConfigError: the global batch cannot be shared equally, or not in the asked number of micro-batches.
    """
    train = config.train
    rows = train.global_batch_size
    if rows % world_size:
        below, above = rows // world_size * world_size, (rows // world_size + 1) * world_size
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            Fault("train.global_batch_size", f"{rows} rows cannot be shared equally by {world_size} processes; use {near}")
        )
    share = rows // world_size
    steps = train.gradient_accumulation_steps
    # "auto" begins like nothing, and is found anew in each stage.
    micro = None if train.micro_batch_size == "auto" else train.micro_batch_size
    if steps is not None and ((micro is None and share % steps) or (micro is not None and micro * steps != share)):
        product = f"{steps} micro-batches" + (f" of {micro} rows" if micro is not None else "")
        raise ConfigError(
            Fault(
                "train.gradient_accumulation_steps",
                f"{rows} rows (train.global_batch_size) on {world_size} processes are {share} each, not {product}; "
                f"change one of them, or set gradient_accumulation_steps to null",
            )
        )
    if steps is not None:
        return share // steps
    return min(share, MICRO_BATCH_CAP if micro is None else micro)
