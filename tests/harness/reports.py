"""Run folders as a run leaves them, without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from progscale.config import dump_config, load_config

STEPS, EPOCHS, BLOCKS = 30, 3, 6
DATA = {"train": {"rows": 100, "content": "aa"}, "validation": {"rows": 20, "content": "bb"}}


def plan_of(schedule: str) -> dict[str, Any]:
    """plan.json of three stages of ten steps."""
    firsts = (0, 0, 0) if schedule == "none" else (0, 2, 4)
    stages = [
        {
            **{"stage": index + 1, "start_step": 10 * index, "end_step": 10 * index + 10, "epochs": 1, "first_block": first},
            **{"live_blocks": {"blocks": list(range(first, BLOCKS))}, "embeddings": True},
            **{"trainable_parameters": 1000 - 100 * first, "updated_parameters": 1000 - 100 * first},
        }
        for index, first in enumerate(firsts)
    ]
    updated = sum(stage["updated_parameters"] for stage in stages)
    return {
        **{"model": "bert-tiny", "method": "full", "schedule": schedule, "num_blocks": {"blocks": BLOCKS}, "epochs": EPOCHS},
        **{"steps_per_epoch": 10, "total_steps": STEPS, "total_parameters": 1000, "updated_parameters": updated},
        **{"baseline_updated_parameters": 3000, "share": updated / 3000, "compute_share": 0.9, "stages": stages},
    }


def stages_of(plan: Mapping[str, Any], seconds: float = 1.0, **changes: Any) -> list[dict[str, Any]]:
    """What the stages measured."""
    return [
        {
            **{key: stage[key] for key in ("stage", "first_block", "start_step", "end_step", "trainable_parameters")},
            **{"embeddings_live": True, "planned_updated_parameters": stage["updated_parameters"]},
            **{"updated_parameters": stage["updated_parameters"], "skipped_steps": 0, "train_seconds": seconds},
            **{"switch_seconds": 0.1, "audit_seconds": 0.01, "samples_per_second": 100 / seconds, "tokens_per_second": 1e3},
            **{"peak_memory_bytes": 10**8, "optimizer_state_bytes": 8000, "frozen_changed": 0, "carried": "shards"},
            **{"engine": "plain", "communicated_bytes": 0, "planned_flops": 2 * 10**12, "flops": 10**12},
            **{"baseline_flops": 2 * 10**12, "counted_share": 1.01},
            **changes,
        }
        for stage in plan["stages"]
    ]


def write_run(
    folder: Path,
    *,
    seed: int = 1,
    schedule: str = "progtuning",
    score: float | None = 0.8,
    seconds: float = 1.0,
    finished: bool = True,
    sets: Sequence[str] = (),
    stage: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A run folder.

    Args:
        folder: to write.
        seed: of the run.
        schedule: its name.
        score: accuracy after the last step.
        seconds: of training, each stage.
        finished: whether it has a summary.
        sets: `key=value` of its config.
        stage: changes to what every stage measured.
        about: changes to what the run says of itself.
        records: further lines of metrics.jsonl.
    """
    folder.mkdir(parents=True)
    config = load_config([], [f"schedule.name={schedule}", f"run.seed={seed}", "run.name=x", *sets])
    plan = plan_of(schedule)
    described = {
        **{"task": "mrpc", "model": "bert-tiny", "method": "full", "schedule": schedule, "embeddings": "always"},
        **{"frozen_mode": "train", "cache": "off", "engine": "plain", "world_size": 1, "primary_metric": "accuracy"},
        **{"higher_is_better": True, "data": DATA, "seed": seed, "precision": "fp32", "device": "a CPU", "cores": 2},
        **{"threads": 2, "python": "3.11", "command": "progscale train", "versions": {"torch": "2.13.0"}},
        **(about or {}),
    }
    stages = stages_of(plan, seconds, **(stage or {}))
    lines: list[Mapping[str, Any]] = [{"kind": "run", **described}]
    for step in range(1, STEPS + 1):
        lines.append({"kind": "step", "step": step, "stage": 1 + (step - 1) // 10, "loss": 1 / step, "grad_norm": 1.0})
        lines[-1] = {**lines[-1], "learning_rate": 1e-4 * step}
        if step % 10 == 0:
            lines.append({"kind": "evaluation", "step": step, "accuracy": 0.5 + step / 100, "f1": 0.4, "loss": 0.6})
            lines.append({"kind": "stage", **stages[step // 10 - 1]})
    lines += records
    (folder / "config.json").write_text(json.dumps({"hash": "h", **dump_config(config)}))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0, **line}) + "\n" for line in lines))
    if finished:
        summary = {
            **described,
            **{"metrics": {"accuracy": score, "f1": 0.4, "loss": 0.6}, "best_metrics": {"accuracy": 0.9, "f1": 0.5, "loss": 0.5}},
            **{"best_step": 20, "updated_parameters": sum(entry["updated_parameters"] for entry in stages)},
            **{"baseline_updated_parameters": 3000, "train_seconds": 3 * seconds, "total_seconds": 3 * seconds + 1},
            **{"switch_seconds": 0.3, "audit_seconds": 0.03, "evaluation_seconds": 0.4, "saving_seconds": 0.1},
            **{"steps": STEPS, "stages": stages},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
