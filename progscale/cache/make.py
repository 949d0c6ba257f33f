"""From a config to the way in which the frozen blocks are run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from progscale.blocks import Partition
from progscale.cache.cache import PrefixCache
from progscale.cache.feed import EvalFeed, Feed
from progscale.cache.ledger import Nodes
from progscale.cache.room import CacheSettings
from progscale.config import Config
from progscale.engine import ranks
from progscale.engine.base import Engine
from progscale.errors import ScheduleError
from progscale.launcher import read_ranks
from progscale.models.family import Family
from progscale.plan import Plan
from progscale.prefix import Prefix
from progscale.resume import fingerprint
from progscale.tasks.base import Tokenized

CACHE_FOLDER = "cache"
DTYPES = {"same": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def nodes_of(accelerator: Any) -> Nodes:
    """Where the ranks are: as many on each node, in the order of ranks, as launchers start them. A collective.

    Where nodes have unequally many, each rank counts as a node of its own.
    """
    world_size = int(accelerator.num_processes)
    local = read_ranks(os.environ).local
    everywhere = set(ranks.gather_objects(local))
    alike = len(everywhere) == 1 and world_size % local == 0
    return Nodes(world_size, local if alike else 1, int(accelerator.process_index))


def check_cache(config: Config, plan: Plan) -> None:
    """Refuses a cache of blocks that are trained again later.

    Raises:
        ScheduleError: naming the stage.
    """
    if config.cache.storage == "off":
        return
    for before, after in pairwise(plan.stages):
        if after.lowest_trained < before.lowest_trained:
            raise ScheduleError(
                f"cache.storage: '{config.cache.storage}', while stage {after.stage} of '{config.schedule.name}' trains blocks "
                f"that were frozen in stage {before.stage}: what was kept of them would be wrong; set it to off"
            )


def make_feed(
    config: Config,
    engine: Engine,
    family: Family,
    parts: Partition,
    splits: Mapping[str, Tokenized],
    nodes: Nodes,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
) -> Feed:
    """How the config wants the frozen blocks to be run.

    Args:
        config: of the run.
        engine: that trains.
        family: of its model.
        parts: of its model.
        splits: training and evaluation data.
        nodes: where the ranks are.
        identity: of the run; with the evaluation data and the versions it decides what the blocks give.
        say: shows a line.
    """
    if config.frozen_mode == "train":
        return Feed()
    prefix = Prefix(engine, family)
    if config.cache.storage == "off":
        return EvalFeed(prefix)
    known = {
        **identity,
        "splits": {name: fingerprint(split) for name, split in splits.items()},
        "versions": [version(package) for package in ("torch", "transformers")],
        "device": engine.device.type,
    }
    folder = Path(config.run.output_dir).expanduser().absolute() / config.run_name
    if config.cache.path is not None:
        # Runs of one name may share a folder of the node's.
        place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        folder = Path(config.cache.path).expanduser().absolute() / f"{config.run_name}-{place}"
    budget = config.cache.budget_gigabytes
    settings = CacheSettings(
        storage=config.cache.storage,
        folder=folder / CACHE_FOLDER,
        identity=hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest(),
        dtype=DTYPES[config.cache.dtype],
        budget_bytes=None if budget is None else int(budget * 1e9),
    )
    return PrefixCache(engine, prefix, parts, splits, nodes, settings, say)
