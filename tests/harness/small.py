"""Checkpoints of a few kilobytes, written by the real writer without any engine, and what can be done to their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from progscale.checkpoint.manifest import MANIFEST, STATE, FileInfo, Manifest, canonical
from progscale.checkpoint.shards import shards_of, write_shard
from progscale.checkpoint.store import Store
from progscale.engine.state import MASTER, Slice

# Elements of the parameters of a model with a frozen part and a live one.
PARAMETERS = {"embeddings.weight": 24, "layer.weight": 40, "layer.bias": 5}
SHARD = "rank00000-00000.safetensors"
FILES = (MANIFEST, STATE, SHARD, "rank00000-00001.safetensors", "rank00001-00000.safetensors")


def tensor(name: str, kind: str, step: int) -> torch.Tensor:
    """A whole tensor of a checkpoint; no two are alike."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {kind} {step}".encode()).digest()[:4], "big")
    return torch.rand(PARAMETERS[name], generator=torch.Generator().manual_seed(seed))


def live(name: str, start: int, end: int, step: int) -> Slice:
    """A range of a trained parameter with its moments."""
    whole = {kind: tensor(name, kind, step) for kind in (MASTER, "exp_avg", "exp_avg_sq")}
    return Slice(name, start, end, {kind: value[start:end] for kind, value in whole.items()}, {"step": float(step)})


def frozen(name: str, start: int, end: int, step: int) -> Slice:
    """A range of a frozen one."""
    return Slice(name, start, end, {MASTER: tensor(name, MASTER, step)[start:end]}, {})


def saved_state(step: int) -> dict[str, Any]:
    """What state.json must have; its `run` fits a run that asks for nothing."""
    counts = dict.fromkeys(("rows", "tokens", "skipped_steps", "volume_before"), 0)
    sent = {"communicated_bytes": 5, "communicated_by": "plain, 2"}
    operations = {"flops": 10, "baseline_flops": 20, "counted_share": 1.0, "energy_joules": None}
    seconds = dict.fromkeys(("evaluation_seconds", "saving_seconds", "switch_seconds", "earlier_seconds"), 0.5)
    progress = {"evaluation_due": False, "metrics": {}, "best": {}, "best_step": 0, "stages": [], "skipped_in_a_row": 0}
    return {
        **{"step": step, "stage": 1, "run": {}, "engine": "plain", "world_size": 2, "versions": {}, "loss_scale": None},
        **{"learning_rate": 0.1, "unlogged": [], "metrics_bytes": 0, "parameters": PARAMETERS},
        "progress": {"step": step, "stage": 1, "carried": "none", **progress, **seconds},
        "meter": {**counts, "seconds": 0.0, "audit_seconds": 0.0, "peak": {}, **sent, **operations},
    }


def write_files(folder: Path, slices: Iterable[Slice], rank: int = 0, limit_bytes: int = 10**6) -> dict[str, FileInfo]:
    """A rank's files."""
    files = {}
    for number, shard in enumerate(shards_of(slices, limit_bytes)):
        name = f"rank{rank:05d}-{number:05d}.safetensors"
        files[name] = write_shard(folder / name, shard.tensors, shard.metadata())
    return files


def publish(root: Path, step: int, keep: int = 100, **state: Any) -> Path:
    """A checkpoint of two ranks, the first of which wrote two files."""
    store = Store(root, keep)
    staged = store.begin(step)
    first = [frozen("embeddings.weight", 0, 24, step), live("layer.weight", 0, 22, step)]
    second = [live("layer.weight", 22, 40, step), live("layer.bias", 0, 5, step)]
    files = write_files(staged, first, 0, limit_bytes=300) | write_files(staged, second, 1)
    path = store.publish(staged, step, {**saved_state(step), **state}, files)
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of the files, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_contents(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Makes a folder hold these files and no others."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def seal(folder: Path, step: int, names: Iterable[str] | None = None) -> None:
    """Writes a manifest that fits the files as they are now: what somebody can do who wants to be believed.

    Args:
        folder: of the checkpoint.
        step: that it claims.
        names: to be listed; None: what lies there.
    """
    listed = [path.name for path in folder.iterdir() if path.name != MANIFEST] if names is None else names
    infos = {}
    for name in listed:
        content = (folder / name).read_bytes()
        infos[name] = FileInfo(len(content), hashlib.sha256(content).hexdigest())
    (folder / MANIFEST).write_bytes(Manifest(step, infos).to_bytes())


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes state.json, and the manifest so that it fits."""
    state = json.loads((folder / STATE).read_bytes())
    change(state)
    (folder / STATE).write_bytes(canonical(state))
    seal(folder, int(json.loads((folder / MANIFEST).read_bytes())["step"]))


def safetensors_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header and data as they are given.

    Args:
        header: JSON.
        data: that follows.
        length: of the header that is claimed; None: the true one.
    """
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data
