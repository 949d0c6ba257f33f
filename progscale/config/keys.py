"""Which keys a layer may hold, and whether it is ours or a bare DeepSpeed config."""

from __future__ import annotations

from typing import Any

from progscale.config.deepspeed_keys import TOP_LEVEL_KEYS
from progscale.config.kinds import accepts
from progscale.config.read import INCLUDE, KeyPath, Layer, dotted, show
from progscale.config.schema import SECTIONS, Config
from progscale.errors import Fault, nearest

# What a run's own config.json has beside the config, so that it is a layer as it lies there.
RECORDED = "hash"

# Sections of ours that are blocks of DeepSpeed's too; these keys tell that one is DeepSpeed's.
_DEEPSPEED_BLOCKS = {
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "checkpoint": frozenset({"tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer"}),
}


def as_sections(layer: Layer, faults: list[Fault]) -> tuple[dict[str, Any], str]:
    """A layer's values under our sections, unknown keys taken out and reported.

    A bare DeepSpeed config (at least one of its top-level keys and none of ours) is put under `engine.deepspeed`.

    Returns:
        The tree, and the prefix that the user's own file has before a DeepSpeed key ("" for a bare one).
    """
    if layer.set_path:
        return _known_keys(layer, _checked_set(layer, faults), faults), "engine.deepspeed."
    theirs = [key for key, value in layer.tree.items() if _owner(key, value) == "deepspeed"]
    ours = [key for key, value in layer.tree.items() if _owner(key, value) == "progscale"]
    if theirs and not ours:
        return {"engine": {"deepspeed": layer.tree}}, ""
    tree = dict(layer.tree)
    for key in theirs:
        faults.append(
            Fault(
                key,
                f"a DeepSpeed key beside the progscale section '{ours[0]}' (in {layer.source}); put it under "
                f"engine.deepspeed, or keep the DeepSpeed config in a file of its own",
            )
        )
        del tree[key]
    return _known_keys(layer, tree, faults), "engine.deepspeed."


def _owner(key: str, value: Any) -> str | None:
    if key in _DEEPSPEED_BLOCKS:
        given = set(value) if isinstance(value, dict) else set()
        if _DEEPSPEED_BLOCKS[key] & given:
            return "deepspeed"
        # Without a key that tells, it is whose the rest of the layer is.
        return "progscale" if given & set(SECTIONS[key].model_fields) else None
    if key in Config.model_fields:
        return "progscale"
    return "deepspeed" if key in TOP_LEVEL_KEYS else None


def _known_keys(layer: Layer, tree: dict[str, Any], faults: list[Fault]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, values in tree.items():
        if name == RECORDED and isinstance(values, str) and not layer.set_path:
            continue
        if name not in Config.model_fields:
            faults.append(_unknown((name,), layer.source))
        elif name not in SECTIONS:
            known[name] = values
        elif not isinstance(values, dict):
            example = next(iter(SECTIONS[name].model_fields))
            faults.append(Fault(name, f'{show(values)} (from {layer.source}) must be an object, e.g. {{"{example}": …}}'))
        else:
            known[name] = {}
            for key, value in values.items():
                if key in SECTIONS[name].model_fields:
                    known[name][key] = value
                else:
                    faults.append(_unknown((name, key), layer.source))
    return known


def _unknown(path: KeyPath, source: str) -> Fault:
    key = path[-1]
    allowed = list(Config.model_fields) if len(path) == 1 else list(SECTIONS[path[0]].model_fields)
    homes = [f"{name}.{key}" for name, section in SECTIONS.items() if key in section.model_fields]
    if homes and (len(homes) == 1 or not nearest(key, allowed)):
        hint = f"; '{key}' belongs to {' or '.join(homes)}"
    elif key == INCLUDE:
        hint = "; it stands at the top of a file, outside of the sections"
    elif key in TOP_LEVEL_KEYS:
        hint = "; it is a DeepSpeed key: put it under engine.deepspeed"
    else:
        everything = [*allowed, *((INCLUDE, *TOP_LEVEL_KEYS) if len(path) == 1 else ())]
        hint = nearest(key, everything) or f"; {'sections' if len(path) == 1 else 'keys'}: {', '.join(allowed)}"
    return Fault(dotted(path), f"unknown key (from {source}){hint}")


def _checked_set(layer: Layer, faults: list[Fault]) -> dict[str, Any]:
    """The tree of a `--set`, unless its key reaches into a value that has no keys of its own."""
    written = layer.set_path or ()
    section = SECTIONS.get(written[0])
    if section is None or len(written) < 3 or written[1] not in section.model_fields:
        return layer.tree
    if "object" in accepts(section.model_fields[written[1]]):
        return layer.tree
    key = dotted(written[:2])
    if "list" in accepts(section.model_fields[written[1]]):
        faults.append(Fault(key, f"lists are set whole (from {layer.source}), e.g. --set '{key}=[…]'"))
    else:
        faults.append(Fault(key, f"has no keys of its own (from {layer.source}); write --set {key}=…"))
    return {}
