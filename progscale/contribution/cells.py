"""The runs that tell what blocks contribute: one block each, and for comparison none and all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progscale.config import Config, dump_config, load_config
from progscale.errors import ConfigError, Fault, UserError
from progscale.names import name_faults, with_options
from progscale.suite import Cell, Suite
from progscale.suite.grid import Compare

NONE, ALL = "none", "all"


@dataclass(frozen=True)
class Target:
    """What a run trains beside embeddings and head.

    Attributes:
        name: "block-03", "encoder-03", "none", "all".
        stack: of the block; None for none and all.
        block: 0-based in its stack; None for none and all.
    """

    name: str
    stack: str | None = None
    block: int | None = None


def targets_of(num_blocks: Mapping[str, int], chosen: Sequence[int] | None = None) -> list[Target]:
    """None, every block from low to high, and all.

    Args:
        num_blocks: blocks of each stack.
        chosen: blocks, counted through all stacks; by default all of them.

    Raises:
        UserError: a chosen block is none.
    """
    several = len(num_blocks) > 1
    blocks = [
        Target(f"{stack if several else 'block'}-{block:02d}", stack, block)
        for stack, count in num_blocks.items()
        for block in range(count)
    ]
    for number in chosen or ():
        if not 0 <= number < len(blocks):
            raise UserError(
                f"--blocks: {number} is not a block; the model has {len(blocks)}, so 0 to {len(blocks) - 1} are allowed"
            )
    kept = blocks if chosen is None else [blocks[number] for number in sorted(set(chosen))]
    return [Target(NONE), *kept, Target(ALL)]


def schedule_of(target: Target, num_blocks: Mapping[str, int]) -> dict[str, Any]:
    """The schedule section of a target's runs."""
    if target.name == ALL:
        return {"name": "none", "stages": 1}
    live: dict[str, list[int]] = {stack: [] for stack in num_blocks}
    if target.stack is not None and target.block is not None:
        live[target.stack] = [target.block]
    blocks: Any = live if len(live) > 1 else next(iter(live.values()))
    return {"name": "only", "stages": 1, "options": {"blocks": blocks}}


def cells_for(
    config: Config, targets: Sequence[Target], seeds: Sequence[int], num_blocks: Mapping[str, int], folder: Path
) -> Suite:
    """The runs as a suite.

    Args:
        config: of all of them; its schedule's name, stages and options are replaced.
        targets: what they train.
        seeds: of the runs.
        num_blocks: blocks of each stack.
        folder: where they go.

    Raises:
        ConfigError: the config names a schedule of its own.
    """
    given = config.schedule
    if given.name not in ("progtuning", "none") or given.first_blocks or given.block_weights or given.starts:
        raise ConfigError(
            Fault(
                "schedule.name", f"'{given.name}': the contribution of blocks is measured without stages; leave the schedule out"
            )
        )
    cells = []
    for seed in seeds:
        for target in targets:
            name = f"{target.name}-s{seed}"
            values = dump_config(config)
            values["schedule"] = schedule_of(target, num_blocks) | {
                "embeddings": given.embeddings,
                "frozen_mode": given.frozen_mode,
            }
            values["run"] |= {"name": name, "output_dir": str(folder / "runs"), "seed": seed}
            values["train"] |= {"save_model": "none"}
            made = with_options(load_config([values], check=name_faults))
            cells.append(Cell(name, {"target": target.name, "seed": str(seed)}, made, folder / "configs" / f"{name}.json"))
    return Suite("contribution", folder, "", tuple(cells), Compare())


def to_layer(weights: Any) -> str:
    """A config layer that trains by these weights."""
    return json.dumps({"schedule": {"name": "weighted", "block_weights": weights}}, indent=2) + "\n"
