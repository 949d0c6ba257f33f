"""A rank's part of the state as safetensors files of a bounded size, and back.

A tensor in a file is one flat range of one parameter: its key is `kind/start/parameter`, where kind is "weight" (what
the optimizer steps: fp32 masters under mixed precision; the model's own bits where it is frozen) or the optimizer's own
name ("exp_avg"). Beside 8-bit codes (uint8) stand the float32 scales of the blocks of 256 elements that they lie in:
`scales:PHASE:kind/start/parameter`, where PHASE is how far into its block the range begins. Numbers that the optimizer keeps for
a whole tensor ("step") stand in the file's metadata.
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
from progscale.engine.state import MASTER, Scales, Slice, blocks
from progscale.errors import RejectedError
from progscale.optimizers import BLOCK

WEIGHT = "weight"
SCALARS = "scalars"
SCALES = "scales"


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
        for kind, scales in part.scales.items():
            # A copy: neighbours share the block between them, and safetensors takes no two views of the same memory.
            values = scales.values.detach().cpu().clone()
            self.tensors[f"{SCALES}:{scales.phase}:{kind}/{part.start}/{part.name}"] = values
        self.bytes += slice_bytes(part)
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
    """Bytes of all tensors of a slice, its scales counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in part.all_tensors())


def _cut(part: Slice, limit_bytes: int) -> Iterator[Slice]:
    count = part.end - part.start
    by_element = sum(tensor.element_size() for tensor in part.tensors.values())
    # A range of so many elements touches one block more than fit into it, and two where it begins inside one.
    of_blocks = 4 * len(part.scales)
    width = max(1, (limit_bytes - 2 * of_blocks) * BLOCK // (by_element * BLOCK + of_blocks))
    if slice_bytes(part) <= limit_bytes:
        width = max(1, count)
    for first in range(0, count, width):
        yield part.cut(first, min(count, first + width))


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
        scales: kind → key of its scales and phase, where it is in 8-bit codes.
    """

    path: Path
    name: str
    start: int
    end: int
    keys: Mapping[str, str]
    scalars: Mapping[str, float]
    scales: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def cut(self, file: Any, start: int, end: int, kinds: Iterable[str] | None = None) -> Slice:
        """Elements `start` to `end` of the parameter, read from the open file."""
        tensors = {
            MASTER if kind == WEIGHT else kind: file.get_slice(key)[start - self.start : end - self.start]
            for kind, key in self.keys.items()
            if kinds is None or kind in kinds
        }
        scales = {}
        for kind, (key, phase) in self.scales.items():
            if kind in tensors:
                first = phase + start - self.start
                values = file.get_slice(key)[first // BLOCK : blocks(first + end - start)]
                scales[kind] = Scales(values, first % BLOCK)
        return Slice(self.name, start, end, tensors, self.scalars, scales)


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
            headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            kinds = {key: (header.get_shape(), header.get_dtype()) for key, header in headers.items()}
        return _group(path, kinds, scalars)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise RejectedError(folder, f"{name} is damaged: {type(error).__name__}: {error}") from error


def check_scales(folder: Path, name: str) -> None:
    """Reads the scales of a file's 8-bit codes.

    Raises:
        RejectedError: one is negative or not finite, which no optimizer writes and every later step would spread.
    """
    keys = [(part.name, kind, key) for part in index_shard(folder, name) for kind, (key, _) in part.scales.items()]
    with open_shard(folder / name) as file:
        for parameter, kind, key in keys:
            values = file.get_tensor(key)
            if not bool((values.isfinite() & (values >= 0)).all()):
                raise RejectedError(folder, f"{name} is damaged: a scale of {kind} of {parameter} is negative or not finite")


def _group(path: Path, tensors: Mapping[str, tuple[list[int], str]], scalars: Mapping[str, Mapping[str, float]]) -> list[Stored]:
    keys: dict[tuple[str, int], dict[str, str]] = {}
    scales: dict[tuple[str, int], dict[str, tuple[str, int]]] = {}
    ends: dict[tuple[str, int], int] = {}
    for key, (shape, _) in tensors.items():
        kind, start_text, parameter = key.split("/", 2)
        (numel,) = shape
        place = (parameter, int(start_text))
        if place[1] < 0:
            raise ValueError(f"a range of {parameter} begins at {place[1]}")
        if kind.startswith(f"{SCALES}:"):
            _, phase_text, kind = kind.split(":", 2)
            scales.setdefault(place, {})[kind] = (key, int(phase_text))
        elif ends.setdefault(place, place[1] + numel) != place[1] + numel:
            raise ValueError(f"the ranges of {parameter} do not fit")
        else:
            keys.setdefault(place, {})[kind] = key
    for place, found in scales.items():
        for kind, (key, phase) in found.items():
            codes = keys.get(place, {}).get(kind)
            if codes is None or tensors[codes][1] != "U8":
                raise ValueError(f"scales without codes: {key}")
            if not 0 <= phase < BLOCK or tensors[key] != ([blocks(phase + ends[place] - place[1])], "F32"):
                raise ValueError(f"the scales of {kind} of {place[0]} do not fit its codes")
    for place, kinds in keys.items():
        for kind, key in kinds.items():
            if tensors[key][1] == "U8" and kind != WEIGHT and kind not in scales.get(place, {}):
                raise ValueError(f"codes without scales: {key}")
    return [
        Stored(
            path,
            parameter,
            start,
            ends[parameter, start],
            kinds,
            {key: float(value) for key, value in scalars.get(parameter, {}).items()},
            scales.get((parameter, start), {}),
        )
        for (parameter, start), kinds in keys.items()
    ]
