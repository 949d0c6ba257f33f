"""Every method with and without stages on a real pretrained encoder: score, updated parameters, seconds, memory.

    python benchmarks/methods.py --seeds 1 2 3              all cells that are not in --results yet
    python benchmarks/methods.py --report-only              the table alone
    python benchmarks/methods.py --tasks mrpc --seeds 1 --max-train-examples 64 --max-eval-examples 64      a smoke run

A cell is (task, seed, method, schedule): the documented `accelerate launch` command on two CPU ranks, bf16 autocast, each method
under the ZeRO stage and with the learning rate of `SETTINGS`, `--epochs` epochs with a stage each. Each finished cell is a line
of --results, and a later call with the same settings leaves it out: stop and go on at will.

How to read it: scores are those after the last step, in percent, mean over seeds; `difference` is progtuning − none, paired by
seed, with the standard error of the mean difference. Updated parameters in millions, planned and measured by the optimizer's own
step counters. Memory is the highest resident size above the start of the run of any rank and stage, and of the last stage.
Seconds are training steps only, and mean something on a quiet machine alone.
"""

from __future__ import annotations

import argparse
import json
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

SCHEDULES = ("none", "progtuning")
METRICS = {"mrpc": "accuracy", "cola": "matthews_correlation"}
# Method → engine and learning rate. Not tuned for this encoder: rates lie in the range that the method's own paper tries, but for
# BitFit, whose highest (1e-3) does not get beyond the commoner class in three epochs of MRPC.
SETTINGS: dict[str, tuple[str, float]] = {
    "full": ("zero2", 5e-5),
    "adapter": ("zero3", 1e-3),
    "bitfit": ("zero1", 4e-3),
    "lora": ("zero2", 1e-3),
    "qlora": ("zero2", 1e-3),
}
FOLDER = REPOSITORY / "runs" / "methods"
FREE = ("max_train_examples", "max_eval_examples", "epochs")


def main(given: Sequence[str] | None = None) -> int:
    options = parse(given)
    failed = []
    if not options.report_only:
        encoder = str(options.encoder or fetch_encoder())
        done = {key_of(cell) for cell in read_cells(options.results)}
        # Seeds outermost: a run that is stopped early has all methods with fewer seeds.
        cells = [
            (task, seed, method, schedule)
            for seed in options.seeds
            for task in options.tasks
            for method in options.methods
            for schedule in options.schedules
        ]
        for cell in cells:
            rate = options.lr or SETTINGS[cell[2]][1]
            if (*cell, rate, json.dumps(settings_of(options))) not in done and not measure(options, encoder, *cell, rate):
                failed.append(cell)
    report(options)
    if failed:
        print(f"failed: {failed}; their output is in {options.work_dir}")
    return bool(failed)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_options(parser, list(METRICS), FOLDER)
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="default: all")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="default: both")
    parser.add_argument("--epochs", type=int, default=3, help="epochs, and stages of progtuning")
    parser.add_argument("--lr", type=float, help="learning rate instead of the method's own")
    return parser.parse_args(given)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What makes two cells of the same name different measurements."""
    return {name: getattr(options, name) for name in FREE}


def key_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    names = ("task", "seed", "method", "schedule", "lr")
    return (*(cell[name] for name in names), json.dumps(cell["settings"]))


def measure(options: argparse.Namespace, encoder: str, task: str, seed: int, method: str, schedule: str, rate: float) -> bool:
    """Runs a cell in a process of its own and appends its line; False when it failed."""
    engine, _ = SETTINGS[method]
    folder = options.work_dir.resolve()
    name = f"{task}-{seed}-{method}-{schedule}-{rate:g}"
    values: dict[str, Any] = {
        "model.name": encoder,
        "task.path": str((options.data / FOLDERS[task]).resolve()),
        "task.max_train_examples": options.max_train_examples,
        "task.max_eval_examples": options.max_eval_examples,
        "method.name": method,
        "optimizer.lr": rate,
        "optimizer.warmup_fraction": 0.1,
        "train.precision": "bf16",
        "train.epochs": options.epochs,
        "train.evaluate": "end",
        "train.save_model": "none",
        "checkpoint.at_epochs": False,
        "checkpoint.at_stages": False,
        "schedule.name": schedule,
        "run.seed": seed,
        "run.name": name,
        "run.output_dir": str(folder),
    }
    layers = [f"configs/{engine}.json", f"configs/tasks/{task}.json"]
    command = [*launch_command(), *config_options(layers, values)]
    result = run_cell(name, folder, command)
    if result is None:
        return False
    stages = result["stages"]
    wanted = ("metrics", "steps", "train_seconds", "wall_seconds", "updated_parameters", "planned_updated_parameters")
    cell = {
        **{"task": task, "seed": seed, "method": method, "schedule": schedule, "lr": rate, "engine": result["engine"]},
        "settings": settings_of(options),
        **{key: result[key] for key in wanted},
        "trainable_parameters": [stage["trainable_parameters"] for stage in stages],
        "peak_memory_bytes": [stage["peak_memory_bytes"] for stage in stages],
        "optimizer_state_bytes": [stage["optimizer_state_bytes"] for stage in stages],
        "frozen_changed": sum(stage["frozen_changed"] for stage in stages),
        "machine": machine(),
        "command": portable(command, {"$ENCODER": encoder, "$DATA": options.data.resolve(), "$RUNS": folder}),
    }
    append_cell(options.results, cell)
    print(f"  {METRICS[task]} {cell['metrics'][METRICS[task]]:.4f}, {cell['wall_seconds']:.0f} s", flush=True)
    return True


def report(options: argparse.Namespace) -> None:
    """The table of all finished cells with these settings."""
    wanted = json.dumps(settings_of(options))
    cells = [cell for cell in read_cells(options.results) if json.dumps(cell["settings"]) == wanted]
    rows, entries = [], []
    for task, metric in METRICS.items():
        for method, (engine, own_rate) in SETTINGS.items():
            rate = options.lr or own_rate
            mine = [c for c in cells if (c["task"], c["method"], c["lr"]) == (task, method, rate)]
            scores = {s: {c["seed"]: 100 * c["metrics"][metric] for c in mine if c["schedule"] == s} for s in SCHEDULES}
            pairs = sorted(scores["none"].keys() & scores["progtuning"].keys())
            mean, error = mean_and_error([scores["progtuning"][seed] - scores["none"][seed] for seed in pairs])
            for schedule in SCHEDULES:
                runs = [c for c in mine if c["schedule"] == schedule]
                if not runs:
                    continue
                entry = {
                    **{"task": task, "method": method, "engine": engine, "lr": rate, "schedule": schedule, "seeds": len(runs)},
                    "score": mean_and_error(list(scores[schedule].values()))[0],
                    "difference": mean if schedule == "progtuning" else None,
                    "difference_error": error if schedule == "progtuning" else None,
                    "planned_millions": runs[0]["planned_updated_parameters"] / 1e6,
                    "measured_millions": sorted({c["updated_parameters"] / 1e6 for c in runs}),
                    "train_seconds": mean_and_error([c["train_seconds"] for c in runs])[0],
                    "peak_megabytes": max(max(c["peak_memory_bytes"]) for c in runs) / 1e6,
                    "last_stage_megabytes": max(c["peak_memory_bytes"][-1] for c in runs) / 1e6,
                    "frozen_changed": sum(c["frozen_changed"] for c in runs),
                }
                entries.append(entry)
                measured = "…".join(f"{value:.4g}" for value in entry["measured_millions"])
                error_text = "" if error is None else f" ± {error:.2f}"
                difference = "–" if entry["difference"] is None else f"{mean:+.2f}{error_text}"
                rows.append(
                    [
                        f"{task} {method} {schedule}",
                        f"{engine} {rate:g}",
                        *(entry["seeds"], f"{entry['score']:.2f}", difference, entry["planned_millions"], measured),
                        *(f"{entry[key]:.0f}" for key in ("train_seconds", "peak_megabytes", "last_stage_megabytes")),
                        entry["frozen_changed"],
                    ]
                )
    show_machine()
    print(f"settings: {settings_of(options)}")
    header = ["cell", "engine, lr", "seeds", "score", "difference", "planned M", "measured M"]
    show_table([*header, "seconds", "peak MB", "last stage MB", "frozen changed"], rows)
    write_json(options.output, {"settings": settings_of(options), "machine": machine(), "rows": entries, "cells": cells})


if __name__ == "__main__":
    sys.exit(main())
