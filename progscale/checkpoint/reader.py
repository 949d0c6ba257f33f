"""A checkpoint that lies in a folder: is it whole, what does it say, and its tensors into a model and an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from progscale.checkpoint.manifest import STATE, Manifest, check_hash, check_sizes, parse_json, read_manifest, read_small
from progscale.checkpoint.shards import WEIGHT, Stored, check_scales, index_shard, open_shard
from progscale.engine import ranks
from progscale.engine.base import Engine
from progscale.engine.filling import Filling
from progscale.errors import RejectedError

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest and state were read and hashed; `verify` does the rest.

    Attributes:
        state: the content of state.json.
    """

    path: Path
    manifest: Manifest
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(info.bytes for info in self.manifest.files.values())

    @property
    def shard_names(self) -> list[str]:
        """The safetensors files."""
        return [name for name in self.manifest.files if name != STATE]


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads manifest and state, and checks that every file is there with the right size; no tensor is read.

    Raises:
        RejectedError: something is missing or damaged, with the file's name.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    check_hash(path, STATE, manifest.files[STATE])
    state = parse_json(path, STATE, read_small(path, STATE))
    if not isinstance(state, dict) or state.get("step") != manifest.step or not isinstance(state.get("parameters"), dict):
        raise RejectedError(path, f"{STATE} does not belong to its manifest")
    return Checkpoint(path, manifest, state)


def verify(checkpoint: Checkpoint, share: Sequence[str] | None = None) -> None:
    """Hashes the files, looks at the scales of 8-bit codes, and checks that the ranges make up every parameter exactly once.

    Args:
        checkpoint: opened.
        share: read these files only (a rank's share); the ranges are always checked.

    Raises:
        RejectedError: naming the file or the parameter.
    """
    for name in checkpoint.shard_names if share is None else share:
        check_hash(checkpoint.path, name, checkpoint.manifest.files[name])
        check_scales(checkpoint.path, name)
    check_cover(checkpoint, index(checkpoint))


def verify_together(path: Path) -> Checkpoint:
    """Opens and verifies a checkpoint, the files shared among the ranks. A collective.

    Raises:
        RejectedError: on all ranks, when any of them found something.
    """

    def open_and_verify() -> Checkpoint:
        checkpoint = open_checkpoint(path)
        verify(checkpoint, checkpoint.shard_names[ranks.rank() :: ranks.world_size()])
        return checkpoint

    return _on_all(path, open_and_verify)


def _on_all(path: Path, action: Callable[[], T]) -> T:
    """What `action` gives on this rank; when it finds something on any, every rank raises it. A collective."""

    def reading() -> T:
        try:
            return action()
        except (OSError, SafetensorError) as error:  # a node lost the file system, or somebody deletes what is read
            raise RejectedError(path, f"it cannot be read ({error})") from error

    return ranks.on_all(reading)


def index(checkpoint: Checkpoint) -> list[Stored]:
    """All stored ranges, from the headers of the files.

    Raises:
        RejectedError: a header is damaged.
    """
    return [stored for name in checkpoint.shard_names for stored in index_shard(checkpoint.path, name)]


def check_cover(checkpoint: Checkpoint, stored: Iterable[Stored]) -> None:
    """Refuses a checkpoint that has an element of a parameter twice or not at all, or optimizer state for a part of one.

    Raises:
        RejectedError: naming the parameter.
    """
    ranges: dict[str, dict[str, list[tuple[int, int]]]] = {}
    scalars: dict[str, Mapping[str, float]] = {}
    for part in stored:
        for kind in part.keys:
            ranges.setdefault(part.name, {}).setdefault(kind, []).append((part.start, part.end))
        if scalars.setdefault(part.name, part.scalars) != part.scalars:
            raise RejectedError(checkpoint.path, f"{part.name} has several step counts")
    # What has no elements is in no file.
    wanted: Mapping[str, Any] = {name: numel for name, numel in checkpoint.state["parameters"].items() if numel != 0}
    for name in (*wanted, *(name for name in ranges if name not in wanted)):
        numel, kinds = wanted.get(name), ranges.get(name, {})
        if not isinstance(numel, int) or WEIGHT not in kinds:
            raise RejectedError(checkpoint.path, f"{name} is {'missing' if name in wanted else 'no parameter of its model'}")
        for kind, found in kinds.items():
            end = 0
            for start, stop in sorted(found):
                end = stop if start == end else -1  # which no start is
            if end != numel:
                raise RejectedError(checkpoint.path, f"{kind} of {name} has not each of its {numel} elements once")


def check_fits(checkpoint: Checkpoint, engine: Engine) -> None:
    """Refuses a checkpoint that lacks a parameter or buffer of the model, or has one that the model has not.

    Raises:
        RejectedError: naming the first; another release of a library may give a model other buffers.
    """
    theirs, ours = checkpoint.state["parameters"], engine.sizes()
    for name in sorted({*theirs, *ours}):
        if theirs.get(name, 0) != ours.get(name, 0):
            raise RejectedError(
                checkpoint.path, f"{name} has {theirs.get(name, 0)} elements, and in this run's model {ours.get(name, 0)}"
            )


def load_weights(checkpoint: Checkpoint, engine: Engine) -> None:
    """Gives the model on this rank the stored weights, cast to its own dtype; to be called before the first stage begins.

    A collective.

    Raises:
        RejectedError: on all ranks, when one of them cannot read it.
    """
    _on_all(checkpoint.path, lambda: _load_weights(checkpoint, engine))


def _load_weights(checkpoint: Checkpoint, engine: Engine) -> None:
    for file, part in _walk(checkpoint):
        start, held = engine.held(part.name)
        first, last = max(start, part.start), min(start + held.numel(), part.end)
        if first < last:
            piece = part.cut(file, first, last, [WEIGHT])
            held[first - start : last - start].copy_(next(iter(piece.tensors.values())))


def load_optimizer(checkpoint: Checkpoint, engine: Engine) -> int:
    """Gives the optimizer of the engine's stage the stored masters, moments and step counts, on this rank.

    What froze in this stage is left aside, and what thawed in it has no state: just as at a switch. A collective.

    Returns:
        Values of moments in 8 bits that were quantised anew, over all ranks: 0 where every block holds the elements that it held
        when it was saved, as under the same engine on as many ranks.

    Raises:
        RejectedError: on all ranks, when one of them cannot read it.
    """
    return engine.over_partitions(_on_all(checkpoint.path, lambda: _load_optimizer(checkpoint, engine)))


def _load_optimizer(checkpoint: Checkpoint, engine: Engine) -> int:
    filling = Filling(engine.shards())
    for file, part in _walk(checkpoint):
        for first, last in filling.wanted(part.name, part.start, part.end):
            try:
                filling.write(part.cut(file, first, last))
            except ValueError as error:
                raise RejectedError(checkpoint.path, f"{part.path.name}: {error}") from error
    return filling.finish()


def _walk(checkpoint: Checkpoint) -> Iterator[tuple[Any, Stored]]:
    """Every stored range with its open file; one file is open at a time."""
    for name in checkpoint.shard_names:
        stored = index_shard(checkpoint.path, name)
        with open_shard(checkpoint.path / name) as file:
            for part in stored:
                yield file, part
