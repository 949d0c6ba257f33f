"""Scores of progressive fine-tuning on a real pretrained encoder, against no stages and against transformers' Trainer.

    python benchmarks/real_encoder.py --seeds 1 2 3              all cells that are not in --results yet
    python benchmarks/real_encoder.py --report-only              the table alone
    python benchmarks/real_encoder.py --tasks mrpc --seeds 1 --max-train-examples 64 --max-eval-examples 64     a smoke run

A cell is (task, seed, variant). `progtuning` and `none` (no stages) are the documented `accelerate launch` command on two CPU
ranks with ZeRO-2; `trainer` is plain_trainer.py in one process with the same config. MRPC, CoLA, STS-B and RTE run for 3 epochs,
SQuAD v1.1 for one epoch with two stages. Each finished cell is a line of --results, and a later call with the same settings
leaves it out: stop and go on at will.

How to read it: scores (accuracy, correlation, F1) are those after the last step, in percent, mean over seeds. `prog − none` is
what progressive training costs, `none − trainer` what progscale differs from the Trainer; both are paired by seed, with the
standard error of the mean difference. `frozen changed` must be 0 and `measured/planned` 1. Seconds are training steps only, and
mean something on a quiet machine alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from common import (
    FOLDERS,
    REPOSITORY,
    add_table_options,
    append_cell,
    config_options,
    fetch_encoder,
    launch_command,
    machine,
    mean_and_error,
    portable,
    read_cells,
    run_cell,
    show_machine,
    show_table,
    write_json,
)

VARIANTS = ("progtuning", "none", "trainer")
# Task → (primary metric, factor that makes it percent).
METRICS = {"mrpc": ("accuracy", 100), "cola": ("matthews_correlation", 100), "stsb": ("spearman", 100), "rte": ("accuracy", 100)}
METRICS |= {"squad-v1": ("f1", 1)}
FOLDER = REPOSITORY / "runs" / "real_encoder"


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    failed = []
    if not options.report_only:
        encoder = options.encoder or fetch_encoder()
        done = {key_of(cell) for cell in read_cells(options.results)}
        # Seeds outermost: a run that is stopped early has all tasks with fewer seeds.
        cells = [(task, seed, variant) for seed in options.seeds for task in options.tasks for variant in options.variants]
        for task, seed, variant in cells:
            key = (task, seed, variant, json.dumps(settings_of(options), sort_keys=True))
            if key in done:
                continue
            if not measure(options, str(encoder), task, seed, variant):
                failed.append((task, seed, variant))
    report(options)
    if failed:
        print(f"failed: {failed}; their output is in {options.work_dir}")
    return bool(failed)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_options(parser, list(FOLDERS), FOLDER)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="train.precision")
    parser.add_argument("--embeddings", choices=["always", "first_stage", "never"], default="always", help="schedule.embeddings")
    parser.add_argument("--threads", type=int, help="CPU threads of each of the two ranks (the Trainer gets twice as many)")
    return parser.parse_args(given)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What makes two cells of the same name different measurements."""
    names = ("lr", "precision", "embeddings", "max_train_examples", "max_eval_examples")
    return {name: getattr(options, name) for name in names}


def key_of(cell: dict[str, Any]) -> tuple[str, int, str, str]:
    return cell["task"], cell["seed"], cell["variant"], json.dumps(cell["settings"], sort_keys=True)


def measure(options: argparse.Namespace, encoder: str, task: str, seed: int, variant: str) -> bool:
    """Runs a cell in a process of its own and appends its line; False when it failed."""
    name = f"{task}-{seed}-{variant}"
    folder = options.work_dir.resolve()
    trainer, squad = variant == "trainer", task == "squad-v1"
    values: dict[str, Any] = {
        "model.name": encoder,
        "task.path": str((options.data / FOLDERS[task]).resolve()),
        "task.max_train_examples": options.max_train_examples,
        "task.max_eval_examples": options.max_eval_examples,
        "optimizer.lr": options.lr,
        "optimizer.warmup_fraction": 0.1,
        "train.precision": options.precision,
        "train.epochs": 1 if squad else None,
        "train.evaluate": "end",
        "train.save_model": "none",
        "schedule.name": "progtuning" if variant == "progtuning" else "none",
        "schedule.stages": 2 if squad and variant == "progtuning" else None,
        "schedule.embeddings": options.embeddings if variant == "progtuning" else None,
        "run.seed": seed,
        "run.threads": options.threads and options.threads * (2 if trainer else 1),
        "run.name": name,
        "run.output_dir": str(folder),
    }
    layers = [f"configs/tasks/{task}.json"]
    if trainer:
        command = [
            sys.executable,
            "benchmarks/plain_trainer.py",
            *config_options(layers, values),
            "--output",
            str(folder / name / "summary.json"),
        ]
    else:
        command = [*launch_command(), *config_options(["configs/zero2.json", *layers], values)]
    result = run_cell(name, folder, command)
    if result is None:
        return False
    stages = result.get("stages", [])
    cell = {
        "task": task,
        "seed": seed,
        "variant": variant,
        "settings": settings_of(options),
        "metrics": result["metrics"],
        "steps": result["steps"],
        "train_seconds": result["train_seconds"],
        "switch_seconds": result.get("switch_seconds"),
        "wall_seconds": result["wall_seconds"],
        "updated_parameters": result.get("updated_parameters"),
        "planned_updated_parameters": result.get("planned_updated_parameters"),
        "baseline_updated_parameters": result.get("baseline_updated_parameters"),
        "frozen_changed": sum(stage["frozen_changed"] for stage in stages) if stages else None,
        "first_blocks": [stage["first_block"] for stage in stages],
        "world_size": result["world_size"],
        "threads": result.get("threads"),
        "machine": machine(),
        "command": portable(command, {"$ENCODER": encoder, "$DATA": options.data.resolve(), "$RUNS": folder}),
    }
    append_cell(options.results, cell)
    metric, _ = METRICS[task]
    print(f"  {metric} {cell['metrics'][metric]:.4f}, {cell['wall_seconds']:.0f} s", flush=True)
    return True


def report(options: argparse.Namespace) -> None:
    """The table of all finished cells with these settings."""
    wanted = json.dumps(settings_of(options), sort_keys=True)
    cells = [cell for cell in read_cells(options.results) if json.dumps(cell["settings"], sort_keys=True) == wanted]
    rows, entries = [], []
    for task in FOLDERS:
        metric, factor = METRICS[task]
        mine = [cell for cell in cells if cell["task"] == task]
        if not mine:
            continue
        scores = {
            variant: {cell["seed"]: factor * cell["metrics"][metric] for cell in mine if cell["variant"] == variant}
            for variant in VARIANTS
        }
        seconds = {
            variant: mean_and_error([cell["train_seconds"] for cell in mine if cell["variant"] == variant])[0]
            for variant in VARIANTS
        }
        staged = [cell for cell in mine if cell["variant"] == "progtuning"]
        engine = [cell for cell in mine if cell["variant"] != "trainer"]
        ratio = [cell["updated_parameters"] / cell["planned_updated_parameters"] for cell in engine]
        entry: dict[str, Any] = {
            "task": task,
            "metric": metric,
            "seeds": {variant: sorted(values) for variant, values in scores.items()},
            "scores": scores,
            "mean": {variant: mean_and_error(list(values.values()))[0] for variant, values in scores.items()},
            "progtuning_minus_none": paired(scores["progtuning"], scores["none"]),
            "none_minus_trainer": paired(scores["none"], scores["trainer"]),
            "frozen_changed": sum(cell["frozen_changed"] for cell in engine) if engine else None,
            "measured_by_planned": [min(ratio), max(ratio)] if ratio else None,
            "updated_by_baseline": statistics.fmean(c["updated_parameters"] / c["baseline_updated_parameters"] for c in staged)
            if staged
            else None,
            "train_seconds": seconds,
        }
        entries.append(entry)
        rows.append(
            [
                f"{task} ({metric})",
                "/".join(str(len(values)) for values in scores.values()),
                *(entry["mean"][variant] for variant in VARIANTS),
                plus_minus(entry["progtuning_minus_none"]),
                plus_minus(entry["none_minus_trainer"]),
                entry["frozen_changed"],
                "–" if not ratio else f"{min(ratio):.6g}" if min(ratio) == max(ratio) else f"{min(ratio):.6g}…{max(ratio):.6g}",
                entry["updated_by_baseline"],
                *(seconds[variant] for variant in VARIANTS),
            ]
        )
    show_machine()
    print(f"settings: {settings_of(options)}")
    header = ["task", "seeds", *VARIANTS, "prog − none", "none − trainer", "frozen changed", "measured/planned", "updated/none"]
    show_table([*header, *(f"s {variant}" for variant in VARIANTS)], rows)
    write_json(options.output, {"settings": settings_of(options), "machine": machine(), "tasks": entries, "cells": cells})


def paired(left: dict[int, float], right: dict[int, float]) -> dict[str, Any]:
    """Mean of the differences by seed, and its standard error."""
    differences = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    mean, error = mean_and_error(differences)
    return {"mean": mean, "standard_error": error, "pairs": len(differences)}


def plus_minus(difference: dict[str, Any]) -> str:
    if difference["mean"] is None:
        return "–"
    error = difference["standard_error"]
    return f"{difference['mean']:+.2f}" + (f" ± {error:.2f}" if error is not None else "")


if __name__ == "__main__":
    sys.exit(main())
