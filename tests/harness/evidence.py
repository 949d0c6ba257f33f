"""What a finished run leaves as proof of what it computed: two runs that computed the same have equal evidence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.harness.programs import records, summary_of

# What may differ between two runs that computed the same.
MEASURED = (
    "seconds",
    "_per_second",
    "memory_bytes",
    "resident_bytes",
    "reserved_bytes",
    "communicated_bytes",
    "time",
    "command",
    "counted_share",
)


def without_measurements(value: Any) -> Any:
    """The value without seconds, memory and what is computed from them."""
    if isinstance(value, dict):
        return {key: without_measurements(inner) for key, inner in value.items() if not key.endswith(MEASURED)}
    if isinstance(value, list):
        return [without_measurements(inner) for inner in value]
    return value


def evidence(folder: Path) -> dict[str, Any]:
    """Every logged loss, gradient norm and score; the summary; hashes of the final weights and of the optimizer's state."""
    kinds = ("step", "evaluation", "stage", "nonfinite")
    last = checkpoints(folder)[-1]
    return {
        "summary": without_measurements(summary_of(folder)),
        **{kind: without_measurements(records(folder, kind)) for kind in kinds},
        "model": digests(folder / "model"),
        "last checkpoint": (last.name, digests(last)),
    }


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of a run folder, the earliest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the safetensors files in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, as the checkpoint says itself."""
    return int(json.loads((checkpoint / "state.json").read_text())["step"])


def all_finite(checkpoint: Path) -> bool:
    """Whether every tensor of a checkpoint or of an exported model is finite."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files
    return all(bool(torch.isfinite(tensor).all()) for path in files for tensor in load_file(path).values())


def leftovers(folder: Path) -> list[str]:
    """What lies in the folder of a finished run and should not: halves of files, staged checkpoints, old models."""
    expected = {
        "config.json",
        "plan.json",
        "metrics.jsonl",
        "metrics.discarded.jsonl",
        "summary.json",
        "report.html",
        "model",
        "checkpoints",
        ".lock",
    }
    found = [entry.name for entry in folder.iterdir() if entry.name not in expected]
    found += [entry.name for entry in (folder / "checkpoints").iterdir() if not entry.name.startswith(("step-", "latest.json"))]
    return sorted(found)
