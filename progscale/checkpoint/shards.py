"""A rank's part of the state as safetensors files of a bounded size, and back.

A tensor in a file is one flat range of one parameter: its key is `kind/start/parameter`, where kind is "weight" (what
the optimizer steps: fp32 masters under mixed precision; the model's own bits where it is frozen) or the optimizer's own
name ("exp_avg"). Numbers that the optimizer keeps for a whole tensor ("step") stand in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from progscale.checkpoint.manifest import FileInfo
from progscale.engine.state import MASTER, Slice
from progscale.errors import RejectedError

WEIGHT = "weight"
SCALARS = "scalars"


@dataclass
class Shard:
    """What goes into one file: flat CPU tensors by key, and the optimizer's numbers by parameter."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes: int = 0

    def add(self, part: Slice) -> None:
        """Adds a slice, copied to the CPU where it is not there yet."""
        for kind, tensor in part.tensors.items():
            kind = WEIGHT if kind == MASTER else kind
            self.tensors[f"{kind}/{part.start}/{part.name}"] = tensor.detach().cpu()
            self.bytes += tensor.numel() * tensor.element_size()
        if part.scalars:
            self.scalars[part.name] = dict(part.scalars)

    def metadata(self) -> dict[str, str]:
        """Of the safetensors file."""
        return {SCALARS: json.dumps(self.scalars, sort_keys=True)}


def shards_of(slices: Iterable[Slice], limit_bytes: int) -> Iterator[Shard]:
    """Slices packed into shards of at most `limit_bytes` (one element of each kind at least).

    A shard is let go of when the next is asked for: memory beside the state is one shard, and none where the state
    lies on the CPU.
    """
    shard = Shard()
    for whole in slices:
        for part in _cut(whole, limit_bytes):
            size = slice_bytes(part)
            if shard.tensors and shard.bytes + size > limit_bytes:
                yield shard
                shard = Shard()
            shard.add(part)
    if shard.tensors:
        yield shard


def slice_bytes(part: Slice) -> int:
    """Bytes of all tensors of a slice."""
    return sum(tensor.numel() * tensor.element_size() for tensor in part.tensors.values())


def _cut(part: Slice, limit_bytes: int) -> Iterator[Slice]:
    count = part.end - part.start
    by_element = max(1, slice_bytes(part) // max(1, count))
    width = max(1, limit_bytes // by_element)
    for first in range(0, count, width):
        last = min(count, first + width)
        tensors = {kind: tensor[first:last] for kind, tensor in part.tensors.items()}
        yield Slice(part.name, part.start + first, part.start + last, tensors, part.scalars)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileInfo:
    """Writes a file and sees it onto the disk.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        raise system_error(error) from error
    # Written by way of a temporary file that nobody else may read.
    os.chmod(path, 0o666 & ~_umask())
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return FileInfo(os.fstat(file.fileno()).st_size, digest)


def system_error(error: SafetensorError) -> OSError:
    """What the system said: Rust reports it as text alone."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(None, str(error))


@cache
def _umask() -> int:
    """The process's file mode mask; the system tells it only while setting another."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class Stored:
    """A range of a parameter as it lies in a file.

    Attributes:
        keys: kind → key in the file.
        scalars: of the parameter.
    """

    path: Path
    name: str
    start: int
    end: int
    keys: Mapping[str, str]
    scalars: Mapping[str, float]

    def cut(self, file: Any, start: int, end: int, kinds: Iterable[str] | None = None) -> Slice:
        """Elements `start` to `end` of the parameter, read from the open file."""
        tensors = {
            MASTER if kind == WEIGHT else kind: file.get_slice(key)[start - self.start : end - self.start]
            for kind, key in self.keys.items()
            if kinds is None or kind in kinds
        }
        return Slice(self.name, start, end, tensors, self.scalars)


def open_shard(path: Path) -> Any:
    """The file for reading tensor by tensor, a context manager."""
    return safe_open(path, framework="pt")


def index_shard(folder: Path, name: str) -> list[Stored]:
    """The ranges in a file, from its header alone.

    Raises:
        RejectedError: the header is no safetensors header, or not one of ours.
    """
    path = folder / name
    try:
        with open_shard(path) as file:
            scalars = json.loads((file.metadata() or {}).get(SCALARS, "{}"))
            sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no mapping)
        return _group(path, sizes, scalars)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise RejectedError(folder, f"{name} is damaged: {type(error).__name__}: {error}") from error


def _group(path: Path, sizes: Mapping[str, list[int]], scalars: Mapping[str, Mapping[str, float]]) -> list[Stored]:
    groups: dict[tuple[str, int], dict[str, str]] = {}
    ends: dict[tuple[str, int], int] = {}
    for key, shape in sizes.items():
        kind, start_text, parameter = key.split("/", 2)
        (numel,) = shape
        start = int(start_text)
        if start < 0 or ends.setdefault((parameter, start), start + numel) != start + numel:
            raise ValueError(f"the ranges of {parameter} do not fit")
        groups.setdefault((parameter, start), {})[kind] = key
    return [
        Stored(path, parameter, start, ends[parameter, start], keys, {k: float(v) for k, v in scalars.get(parameter, {}).items()})
        for (parameter, start), keys in groups.items()
    ]
