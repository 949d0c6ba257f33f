"""DeepSpeed configs that differ by stage: what memory frozen parameters free may be spent on an engine that is quicker."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from progscale.config import deepspeed_keys as keys
from progscale.config.deepspeed import check_rest
from progscale.config.read import show
from progscale.errors import Fault

KEY = "engine.by_stage"
_STAGES = re.compile(r"([1-9]\d{0,5})(-([1-9]\d{0,5})?)?")


def stages_of(text: str, last: int) -> range | None:
    """The stages (1-based) that "2", "2-4" or "3-" stands for, of a run with `last` stages; None where it is none of these.

    >>> list(stages_of("2-", 4))
    [2, 3, 4]
    """
    found = _STAGES.fullmatch(text)
    if found is None:
        return None
    first = int(found[1])
    end = first if found[2] is None else last if found[3] is None else int(found[3])
    return range(first, end + 1)


def deepspeed_of(base: Mapping[str, Any] | None, by_stage: Mapping[str, Any] | None, stage: int) -> dict[str, Any] | None:
    """The DeepSpeed config of a stage: `base`, and over it what `by_stage` has for the stage."""
    if base is None:
        return None
    merged = copy.deepcopy(dict(base))
    for text, block in (by_stage or {}).items():
        stages = stages_of(text, stage)
        if stages is not None and stage in stages:
            merged = laid_over(merged, block)
    return merged


def laid_over(base: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `block`, objects key by key."""
    merged = copy.deepcopy(dict(base))
    for key, value in block.items():
        old = merged.get(key)
        merged[key] = laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else copy.deepcopy(value)
    return merged


def stage_faults(base: Mapping[str, Any] | None, by_stage: Mapping[str, Mapping[str, Any]], stages: int) -> list[Fault]:
    """What is wrong with configs that differ by stage.

    Args:
        base: `engine.deepspeed`, right in itself.
        by_stage: `engine.by_stage`.
        stages: of the run.
    """
    if base is None:
        return [Fault(KEY, "needs engine.deepspeed, which it changes for some stages; give it, or remove by_stage")]
    faults: list[Fault] = []
    taken: dict[int, str] = {}
    for text, block in by_stage.items():
        key = f"{KEY}.{text}"
        chosen = stages_of(text, stages)
        if chosen is None or len(chosen) == 0:
            faults.append(Fault(KEY, f'{show(text)} names no stages; write one, e.g. "1", or several, "2-4" or "3-"'))
            continue
        if chosen[-1] > stages:
            faults.append(Fault(key, f"the run has {stages} stages"))
        twice = next((stage for stage in chosen if stage in taken), None)
        if twice is not None:
            faults.append(Fault(key, f'stage {twice} is in "{taken[twice]}" too; each stage may stand once'))
        taken |= dict.fromkeys(chosen, text)
        for name in block:
            if name in keys.TRANSLATED_KEYS:
                faults.append(Fault(f"{key}.{name}", "is one for all stages; remove it"))
        literal = {name: value for name, value in block.items() if name not in keys.TRANSLATED_KEYS}
        merged = laid_over(base, literal)
        known = {fault.key for fault in check_rest(base, lambda path: "")}
        for fault in check_rest(merged, lambda path: ""):
            if fault.key not in known:
                faults.append(Fault(fault.key.replace("engine.deepspeed", key, 1), fault.message))
        faults += _partitioning(key, base, merged)
    return faults


def _partitioning(key: str, base: Mapping[str, Any], merged: Mapping[str, Any]) -> list[Fault]:
    """The parameters are partitioned once, when the model is loaded."""
    before, after = (config.get("zero_optimization") for config in (base, merged))
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return []
    faults = []
    if (before.get("stage") == 3) != (after.get("stage") == 3):
        faults.append(
            Fault(
                f"{key}.zero_optimization.stage",
                f"{show(after.get('stage'))} beside {show(before.get('stage'))} in engine.deepspeed: under ZeRO-3 the parameters "
                f"are partitioned from the first stage to the last, or never; only 1 and 2 can change",
            )
        )
    if before.get("offload_param") != after.get("offload_param"):
        faults.append(Fault(f"{key}.zero_optimization.offload_param", "is one for all stages: it says where the parameters lie"))
    if before.get("zero_hpz_partition_size", 1) != after.get("zero_hpz_partition_size", 1):
        faults.append(
            Fault(f"{key}.zero_optimization.zero_hpz_partition_size", "is one for all stages: it says where the parameters lie")
        )
    return faults
