"""Layers of JSON files and `--set` options → one checked `Config`, with every fault at once.

Later layers win, key by key; lists are replaced whole; the files that a file includes come right before it. One thing does not
win silently: where one *file* gives an option and another file's DeepSpeed JSON gives it differently, that is a fault which
names both, whatever the order. A `--set` always wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from progscale.config.cross import cross_faults
from progscale.config.deepspeed import PREFIX, check_rest, translate
from progscale.config.faults import from_pydantic
from progscale.config.keys import as_sections
from progscale.config.read import KeyPath, Layer, dotted, read_layers, read_set, show
from progscale.config.schema import Config
from progscale.errors import ConfigError, Fault

# The lowest layer of a run that names neither a model nor a task: what suits the demo's tiny, randomly initialised
# encoder, which has 64 positions and nothing to forget.
DEMO_DEFAULTS: dict[str, dict[str, Any]] = {
    "optimizer": {"lr": 5e-4, "warmup_fraction": 0.1},
    "train": {"max_length": 64},
}


@dataclass(frozen=True)
class _Origin:
    source: str
    kind: str  # "file", "deepspeed" (read out of a DeepSpeed block) or "set"


@dataclass
class _Merged:
    """The layers so far, where each value comes from, and what contradicts."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, _Origin] = field(default_factory=dict)
    conflicts: dict[KeyPath, Fault] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)

    def put(self, path: KeyPath, value: Any, origin: _Origin) -> Fault | None:
        """Sets one leaf; a fault if a `--set` reaches into a list."""
        node = self.tree
        for depth, key in enumerate(path[:-1], start=1):
            inner = node.get(key)
            if isinstance(inner, list) and origin.kind == "set":
                whole = dotted(path[:depth])
                return Fault(whole, f"lists are set whole (from {origin.source}), e.g. --set '{whole}=[…]'")
            if not isinstance(inner, dict):
                inner = node[key] = {}
            node = inner
        old = node.get(path[-1])
        # An empty object adds nothing to one that is there already.
        if not (value == {} and isinstance(old, dict)):
            node[path[-1]] = value
            if isinstance(old, dict):
                self.origins = {known: o for known, o in self.origins.items() if known[: len(path)] != path}
        self.origins[path] = origin
        return None

    def get(self, path: KeyPath) -> Any:
        node: Any = self.tree
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def where(self, path: KeyPath) -> str:
        """` (from my.json)` for a value, or for an object the first of its values; nothing for a default."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return f" (from {self.origins[path[:length]].source})"
        inner = [origin.source for known, origin in self.origins.items() if known[: len(path)] == path]
        return f" (from {inner[0]})" if inner else ""


def load_config(
    paths: Sequence[str | Path | Mapping[str, Any]] | str | Path = (),
    overrides: Sequence[str] = (),
    *,
    check: Callable[[Config], Sequence[Fault]] | None = None,
) -> Config:
    """Builds the config of a run.

    Args:
        paths: JSON files, later ones win, each behind those that it includes; a bare DeepSpeed JSON is a layer too. A mapping
            stands for a file's content.
        overrides: `section.key=value` texts, which win over all files.
        check: finds more faults, to be reported with the others; where a value is wrong it sees the default.

    Raises:
        ConfigError: with every fault of every layer.
    """
    faults: list[Fault] = []
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found = [layer for path in paths for layer in read_layers(path, faults)]
    found += [layer for text in overrides if (layer := read_set(text, faults)) is not None]
    merged = _Merged()
    for layer in found:
        _merge(merged, layer, faults)
    faults.extend(merged.conflicts.values())
    _demo_defaults(merged)
    deepspeed = merged.get(PREFIX)
    if isinstance(deepspeed, dict):
        faults.extend(check_rest(deepspeed, lambda path: merged.where((*PREFIX, *path))))
    config = _build(merged, faults)
    if check is not None:
        faults.extend(check(config))
    if faults:
        raise ConfigError(faults)
    return config


def dump_config(config: Config) -> dict[str, Any]:
    """The config as JSON values, every default written out; loading them gives an equal config."""
    return config.model_dump(mode="json")


def _merge(merged: _Merged, layer: Layer, faults: list[Fault]) -> None:
    tree, prefix = as_sections(layer, faults)
    kind = "set" if layer.set_path else "file"
    engine = tree.get("engine")
    block = engine.get("deepspeed") if isinstance(engine, dict) else None
    if isinstance(block, dict):
        found = translate(block, layer.source, prefix)
        faults.extend(found.faults)
        tree = {**tree, "engine": {**tree["engine"], "deepspeed": found.rest}}
    own = dict(_leaves(tree, ()))
    for path, value in own.items():
        before = merged.origins.get(path)
        if kind == "set":
            merged.conflicts.pop(path, None)
        elif before is not None and before.kind == "deepspeed" and not _same(merged.get(path), value):
            _conflict(merged, path, value, layer.source)
        fault = merged.put(path, value, _Origin(layer.source, kind))
        if fault is not None:
            faults.append(fault)
    if not isinstance(block, dict):
        return
    for path, (value, key) in found.values.items():
        before = merged.origins.get(path)
        if kind == "set":
            merged.conflicts.pop(path, None)
        elif before is not None and before.kind == "file" and not _same(merged.get(path), value):
            _conflict(merged, path, value, f"{key} in {layer.source}")
        merged.put(
            path,
            value,
            _Origin(layer.source if kind == "set" else f"{key} in {layer.source}", "set" if kind == "set" else "deepspeed"),
        )
        if path == ("train", "precision"):
            merged.off.pop(value, None)
    for precision, key in found.off.items():
        merged.off[precision] = f"{key} in {layer.source}"
        if merged.get(("train", "precision")) == precision and merged.origins[("train", "precision")].kind != "file":
            # A later DeepSpeed layer switches off what an earlier one switched on.
            merged.put(("train", "precision"), "fp32", _Origin(merged.off.pop(precision), "deepspeed"))


def _conflict(merged: _Merged, path: KeyPath, value: Any, source: str) -> None:
    before = merged.origins[path]
    merged.conflicts[path] = Fault(
        dotted(path),
        f"{show(merged.get(path))} (from {before.source}) contradicts {show(value)} (from {source}); "
        f"keep one, or choose with --set {dotted(path)}=…",
    )


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _leaves(value: dict[str, Any], path: KeyPath) -> list[tuple[KeyPath, Any]]:
    found: list[tuple[KeyPath, Any]] = []
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found.extend(_leaves(inner, (*path, key)))
        else:
            found.append(((*path, key), inner))
    return found


def _demo_defaults(merged: _Merged) -> None:
    if merged.get(("model", "name")) is not None or merged.get(("task", "name")) not in (None, "demo"):
        return
    for path, value in _leaves(DEMO_DEFAULTS, ()):
        # The user may have chosen the other form of the warm-up.
        if path not in merged.origins and not (path[-1] == "warmup_fraction" and ("optimizer", "warmup_steps") in merged.origins):
            merged.put(path, value, _Origin("the demo's defaults", "file"))


def _build(merged: _Merged, faults: list[Fault]) -> Config:
    """Checks the values; where some are wrong, the others are still checked against each other."""
    bad: set[KeyPath] = set()
    tree = json.loads(json.dumps(merged.tree, default=repr))
    config: Config | None = None
    while config is None:
        try:
            config = Config.model_validate(tree)
        except ValidationError as error:
            for fault, path in from_pydantic(error, merged.where):
                faults.append(fault)
                bad.add(path[:2])
                # Left out, it takes its default, and the next round sees what else is wrong.
                section = tree.get(path[0])
                if len(path) > 1 and isinstance(section, dict):
                    section.pop(path[1], None)
                else:
                    tree.pop(path[0], None)
    bad |= {path for path in merged.conflicts if path}
    bad |= {tuple(fault.key.split("."))[:2] for fault in faults}
    faults.extend(cross_faults(config, merged, bad))
    return config
