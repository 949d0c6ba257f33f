"""The page of one run: what was frozen when, what it cost, what came out, and whether the ledger holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from progscale.errors import ReportError
from progscale.report import figures
from progscale.report.figures import Figure
from progscale.report.page import Page, Table, Tile, render_page
from progscale.report.quantities import is_error, percent, quantity, seconds_text, significant
from progscale.report.record import RunRecord, read_run

FILE = "report.html"
# What a split's scores are besides those that decide anything.
LOSSES = ("loss", "perplexity")


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Writes the report of a run.

    Args:
        folder: of the run.
        target: file to write; by default report.html in the folder.

    Raises:
        ReportError: the folder is no run's, or damaged.
        OSError: the file cannot be written.
    """
    path = folder / FILE if target is None else target
    write_page(path, render_run(read_run(folder)))
    return path


def write_page(path: Path, content: str) -> None:
    """Writes a file whole or not at all; halves of characters, which names of files may have, as escapes.

    Raises:
        ReportError: the path names no file.
        OSError: the file cannot be written.
    """
    if not path.name or path.is_dir():
        raise ReportError(f"'{path}' is a folder; name a file in it with --output")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(content.rstrip("\n") + "\n", encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render_run(run: RunRecord) -> str:
    """The page of a run, as one HTML file."""
    about, stages = run.about, run.stages
    return render_page(
        Page(
            title=f"{about.get('task', run.config.get('task', {}).get('name', 'run'))}: {run.name}",
            lead=lead(run),
            tiles=tiles(run),
            figures=[figure for figure in all_figures(run) if figure is not None],
            tables=[
                table
                for table in (stage_table(stages), score_table(run), audit_table(run), event_table(run), version_table(run))
                if table.rows
            ],
            folded=[
                ("Config, every value", json.dumps(dict(run.config), indent=2)),
                ("Plan", json.dumps(dict(run.plan), indent=2)),
            ],
        )
    )


def lead(run: RunRecord) -> str:
    """What was run, in a sentence."""
    about, plan = run.about, run.plan
    blocks = " + ".join(str(count) for count in plan["num_blocks"].values())
    parts = [
        f"{plan['model']} ({blocks} blocks), method {plan['method']}, schedule {plan['schedule']}",
        f"{significant(float(plan['epochs']))} epochs in {len(plan['stages'])} stages, {run.total_steps} optimizer steps",
    ]
    if about:
        ranks = about["world_size"]
        parts.append(f"{about['engine']} on {ranks} process{'es' if ranks > 1 else ''}, {about['precision']}, {about['device']}")
    text = "; ".join(parts) + "."
    if not run.finished:
        text += f" Not finished: {run.step} of {run.total_steps} steps are recorded."
    return text


def tiles(run: RunRecord) -> list[Tile]:
    """The few figures that people ask for first."""
    found, plan, summary = [], run.plan, run.summary
    metric = run.primary_metric
    if summary is not None and metric is not None:
        best = summary["best_metrics"].get(metric)
        last = summary["metrics"].get(metric)
        note = f"best {significant(best, 4)} after step {summary['best_step']}" if best is not None else ""
        found.append(Tile(metric, "–" if last is None else significant(last, 4), f"after the last step; {note}"))
    updated = sum(stage["updated_parameters"] for stage in run.stages) if run.stages else None
    if summary is not None:
        saved = 1 - updated / plan["baseline_updated_parameters"] if updated is not None else None
        found.append(
            Tile("updated parameters", quantity(updated, digits=4), f"{percent(saved)} fewer than without stages, measured")
        )
        found.append(
            Tile(
                "training",
                seconds_text(summary["train_seconds"]),
                f"{seconds_text(summary['total_seconds'])} with evaluation, saving and switches",
            )
        )
        flops, baseline = total(run, "flops"), total(run, "baseline_flops")
        if flops is not None and baseline:
            note = f"{percent(flops / baseline)} of the same method's without stages"
            found.append(Tile("operations", quantity(flops, "FLOP"), note))
    else:
        share = 1 - plan["share"]
        found.append(
            Tile("updated parameters", quantity(plan["updated_parameters"], digits=4), f"planned; {percent(share)} fewer")
        )
        found.append(Tile("progress", percent(run.step / run.total_steps, 0), f"{run.step} of {run.total_steps} optimizer steps"))
    if run.stages:
        peak = max(stage["peak_memory_bytes"] for stage in run.stages)
        found.append(Tile("peak memory", quantity(peak, "B"), memory_words(run)))
        changed = sum(stage["frozen_changed"] for stage in run.stages)
        found.append(
            Tile("frozen tensors that changed", str(changed), "bits hashed before and after each stage", good=changed == 0)
        )
    joules = total(run, "energy_joules")
    if joules is not None:
        found.append(Tile("energy", quantity(joules / 3600, "Wh"), "of all GPUs, training steps alone"))
    return found


def total(run: RunRecord, key: str) -> float | None:
    """Over all finished stages; None where one of them does not say."""
    values = [stage.get(key) for stage in run.stages]
    known = [float(value) for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def memory_words(run: RunRecord) -> str:
    """What a peak is a peak of."""
    on_gpu = any("peak_reserved_bytes" in stage for stage in run.stages)
    return "allocated on the GPU that needs most" if on_gpu else "resident above the start, the process that needs most"


def all_figures(run: RunRecord) -> list[Figure | None]:
    """In the order of the page."""
    return [
        freeze_timeline(run),
        loss_curves(run),
        *score_curves(run),
        learning_rate(run),
        gradient_norm(run),
        updated_volume(run),
        operations(run),
        memory(run),
        throughput(run),
        time_parts(run),
        energy(run),
    ]


def stage_marks(run: RunRecord) -> list[tuple[float, str]]:
    """Where stages begin."""
    return [(stage["start_step"], f"stage {stage['stage']}") for stage in run.plan["stages"]]


def freeze_timeline(run: RunRecord) -> Figure:
    """Parts of the model over the steps of the run."""
    stacks = run.plan["num_blocks"]
    rows = ["embeddings"]
    for stack, count in stacks.items():
        rows += [f"{stack} {block}" if len(stacks) > 1 else f"block {block}" for block in range(count)]
    rows.append("head")
    cells = []
    for stage in run.plan["stages"]:
        live = [bool(stage["embeddings"])]
        for stack, count in stacks.items():
            trained = set(stage["live_blocks"][stack])
            live += [block in trained for block in range(count)]
        live.append(True)
        span = {"from": stage["start_step"], "to": stage["end_step"], "stage": stage["stage"]}
        cells += [{"row": row, "trained": state, **span} for row, state in zip(rows, live, strict=True)]
    return figures.timeline(
        "freeze",
        "What is trained when",
        x="optimizer step",
        y="part of the model",
        rows=rows,
        cells=cells,
        marks=stage_marks(run),
        note="Within a trained part the method says which tensors move.",
    )


def loss_curves(run: RunRecord) -> Figure | None:
    """Of training and of the evaluation splits."""
    series: dict[str, list[tuple[float, float]]] = {"training": points(run.of_kind("step"), "loss")}
    for key in evaluation_keys(run):
        if key.startswith("loss"):
            series[f"validation{key.removeprefix('loss')}"] = points(run.evaluations, key)
    if not any(series.values()):
        return None
    per = "target token" if any(key.startswith("perplexity") for key in evaluation_keys(run)) else "row"
    return figures.lines(
        "loss",
        "Loss",
        x="optimizer step",
        y=f"loss (mean for each {per})",
        series=series,
        marks=stage_marks(run),
        dots=[name for name in series if name != "training"],
        note=f"Training: mean over the {run.config.get('train', {}).get('logging_steps', '')} steps between two records.",
    )


def score_curves(run: RunRecord) -> list[Figure]:
    """The primary metric, and what else was scored on the same scale."""
    keys = [key for key in evaluation_keys(run) if not key.startswith(LOSSES)]
    found = {key: points(run.evaluations, key) for key in keys}
    found = {key: values for key, values in found.items() if values}
    # Scores between -1 and 1, and those in percent or counts, need axes of their own.
    small = {key: values for key, values in found.items() if all(abs(y) <= 1 for _, y in values) and not is_error(key)}
    large = {key: values for key, values in found.items() if key not in small}
    result = []
    for name, title, label, series in (
        ("scores", "Scores", "score (1 is perfect)", small),
        ("scores-large", "Scores on other scales", "score (as the task gives it)", large),
    ):
        if series:
            ordered = dict(sorted(series.items(), key=lambda item: item[0] != run.primary_metric))
            result.append(
                figures.lines(
                    name,
                    title,
                    x="optimizer step",
                    y=label,
                    series=ordered,
                    marks=stage_marks(run),
                    dots=list(ordered),
                    note=f"{run.primary_metric} decides which model is best." if run.primary_metric in ordered else "",
                )
            )
    return result


def learning_rate(run: RunRecord) -> Figure | None:
    """As it was used."""
    rates = points(run.of_kind("step"), "learning_rate")
    if not rates:
        return None
    return figures.lines(
        "learning-rate",
        "Learning rate",
        x="optimizer step",
        y="learning rate (1 / step)",
        series={"learning rate": rates},
        marks=stage_marks(run),
        note="A closed form of the step: a stage switch does not move it.",
    )


def gradient_norm(run: RunRecord) -> Figure | None:
    """Before clipping."""
    norms = points(run.of_kind("step"), "grad_norm")
    if not norms:
        return None
    return figures.lines(
        "gradient",
        "Gradient norm",
        x="optimizer step",
        y="L2 norm of the live gradient",
        series={"before clipping": norms},
        marks=stage_marks(run),
    )


def updated_volume(run: RunRecord) -> Figure:
    """Planned beside what the optimizer's own step counters say."""
    planned = run.plan["stages"]
    measured = {stage["stage"]: stage["updated_parameters"] for stage in run.stages}
    baseline = run.plan["baseline_updated_parameters"] / float(run.plan["epochs"])
    return figures.bars(
        "volume",
        "Updated parameters, planned and measured",
        x="stage",
        y="updated parameters (millions)",
        groups=[str(stage["stage"]) for stage in planned],
        series={
            "planned": [stage["updated_parameters"] / 1e6 for stage in planned],
            "measured": [_millions(measured.get(stage["stage"])) for stage in planned],
            "without stages": [baseline * float(stage["epochs"]) / 1e6 for stage in planned],
        },
        note="Parameters times the epochs in which they were trained. Measured: what the optimizer's step counters say.",
    )


def operations(run: RunRecord) -> Figure | None:
    """Planned, as run, and what the same method would have taken for the same rows without stages."""
    stages = [stage for stage in run.stages if stage.get("flops") is not None]
    if not stages:
        return None
    counted = [stage["counted_share"] for stage in stages if stage.get("counted_share") is not None]
    note = "Planned: every row as long as the longest allowed. As run: rows with their padding, without what a cache spared."
    if counted:
        low, high = min(counted), max(counted)
        shown = significant(low, 4) if significant(low, 4) == significant(high, 4) else f"{low:.3f} to {high:.3f}"
        note += f" One step of each stage was counted kernel by kernel by torch: {shown} of what the formula gives."
    return figures.bars(
        "operations",
        "Floating-point operations, planned and as run",
        x="stage",
        y="operations (TFLOP)",
        groups=[str(stage["stage"]) for stage in stages],
        series={
            "planned": [stage["planned_flops"] / 1e12 for stage in stages],
            "as run": [stage["flops"] / 1e12 for stage in stages],
            "without stages, same rows": [stage["baseline_flops"] / 1e12 for stage in stages],
        },
        note=note,
    )


def memory(run: RunRecord) -> Figure | None:
    """Peak, and the optimizer's state."""
    if not run.stages:
        return None
    return figures.bars(
        "memory",
        "Memory by stage",
        x="stage",
        y="memory (MB)",
        groups=[str(stage["stage"]) for stage in run.stages],
        series={
            "peak": [stage["peak_memory_bytes"] / 1e6 for stage in run.stages],
            "optimizer state": [stage["optimizer_state_bytes"] / 1e6 for stage in run.stages],
        },
        note=f"Peak: {memory_words(run)}. Optimizer state: of the process that holds most.",
    )


def throughput(run: RunRecord) -> Figure | None:
    """Of training steps alone."""
    if not run.stages:
        return None
    return figures.bars(
        "throughput",
        "Throughput by stage",
        x="stage",
        y="rows a second (all processes)",
        groups=[str(stage["stage"]) for stage in run.stages],
        series={"rows": [stage["samples_per_second"] for stage in run.stages]},
        note="Training steps alone, evaluation and saving left out; tokens a second stand in the table.",
    )


def time_parts(run: RunRecord) -> Figure | None:
    """Where the run's seconds went."""
    summary = run.summary
    if summary is None:
        return None
    parts = {f"stage {stage['stage']}": float(stage["train_seconds"]) for stage in run.stages}
    rest = {
        "switches": "switch_seconds",
        "audit": "audit_seconds",
        "evaluation": "evaluation_seconds",
        "saving": "saving_seconds",
    }
    parts |= {name: float(summary[key]) for name, key in rest.items()}
    parts["other"] = max(0.0, summary["total_seconds"] - sum(parts.values()))
    return figures.shares(
        "time", "Where the time went", x="seconds", parts=parts, note="Other: exporting, first batches, records."
    )


def energy(run: RunRecord) -> Figure | None:
    """Of the GPUs, where they tell."""
    stages = [stage for stage in run.stages if stage.get("energy_joules") is not None]
    if not stages:
        return None
    return figures.bars(
        "energy",
        "Energy by stage",
        x="stage",
        y="energy (Wh, all GPUs)",
        groups=[str(stage["stage"]) for stage in stages],
        series={"training steps": [stage["energy_joules"] / 3600 for stage in stages]},
        note="The driver's own counter (NVML), while training steps ran.",
    )


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """What each stage did."""
    headings = ["stage", "steps", "first block", "trained", "updated", "planned", "train", "switch", "audit", "rows / s"]
    headings += ["tokens / s", "peak", "optimizer", "sent a step", "FLOP", "engine", "frozen changed"]
    rows = []
    for stage in stages:
        rows.append(
            [
                str(stage["stage"]),
                f"{stage['start_step']} to {stage['end_step'] - 1}",
                first_block_text(stage["first_block"]),
                quantity(stage["trainable_parameters"]),
                quantity(stage["updated_parameters"], digits=4),
                quantity(stage["planned_updated_parameters"], digits=4),
                seconds_text(stage["train_seconds"]),
                f"{stage['switch_seconds']:.2f} s",
                f"{stage['audit_seconds']:.2f} s",
                significant(stage["samples_per_second"]),
                quantity(stage["tokens_per_second"]),
                quantity(stage["peak_memory_bytes"], "B"),
                quantity(stage["optimizer_state_bytes"], "B"),
                quantity(stage.get("communicated_bytes"), "B"),
                quantity(stage.get("flops"), "FLOP"),
                str(stage.get("engine", "")),
                str(stage["frozen_changed"]),
            ]
        )
    return Table("Stages", headings, rows)


def first_block_text(first: Any) -> str:
    """A number, or by stack."""
    return ", ".join(f"{stack} {block}" for stack, block in first.items()) if isinstance(first, Mapping) else str(first)


def score_table(run: RunRecord) -> Table:
    """Every evaluation."""
    keys = evaluation_keys(run)
    rows = [
        [str(record["step"]), *("–" if record.get(key) is None else significant(record[key], 4) for key in keys)]
        for record in run.evaluations
    ]
    return Table("Evaluations", ["after step", *keys], rows)


def audit_table(run: RunRecord) -> Table:
    """What the run checked of itself."""
    rows = []
    for stage in run.stages:
        planned, measured = stage["planned_updated_parameters"], stage["updated_parameters"]
        same = math.isclose(planned, measured, rel_tol=1e-9)
        skipped = stage["skipped_steps"]
        rows.append(
            [
                str(stage["stage"]),
                str(stage["frozen_changed"]),
                "equal" if same else f"{measured / planned:.6f} of it" + (f", {skipped} steps skipped" if skipped else ""),
                {"none": "nothing to carry", "shards": "shard by shard, in place", "slices": "by parameter"}.get(
                    stage["carried"], str(stage["carried"])
                ),
                "–" if stage.get("counted_share") is None else f"{stage['counted_share']:.4f}",
            ]
        )
    headings = ["stage", "frozen tensors changed", "measured beside planned volume", "optimizer state carried", "FLOP counted"]
    return Table("Audit", headings, rows)


def event_table(run: RunRecord) -> Table:
    """What was not plain sailing."""
    words = {
        "resume": lambda r: f"went on from step {r['step']}, saved by {r['saved_by']['engine']} on {r['saved_by']['world_size']}",
        "nonfinite": lambda r: f"step {r['step']}: the {r['fault']} was not finite",
        "checkpoint_failed": lambda r: str(r["message"]),
        "stopped": lambda r: f"told to stop, saved after step {r['step']}",
        "requantized": lambda r: f"stage {r['stage']}: {r['values']} values of 8-bit state quantised anew",
        "tracker_failed": lambda r: str(r["message"]),
    }
    rows = [[str(record["kind"]), words[record["kind"]](record)] for record in run.records if record.get("kind") in words]
    return Table("Events", ["kind", "what"], rows)


def version_table(run: RunRecord) -> Table:
    """Where it ran, and with what."""
    about = run.about
    rows = [
        [label, str(about[key])]
        for label, key in (
            *(("device", "device"), ("processor cores", "cores"), ("threads of a process", "threads"), ("seed", "seed")),
            *(("precision", "precision"), ("python", "python"), ("command", "command")),
        )
        if about.get(key) is not None
    ]
    rows += [[name, str(number)] for name, number in about.get("versions", {}).items()]
    return Table("Machine and versions", ["what", "value"], rows)


def evaluation_keys(run: RunRecord) -> list[str]:
    """Of the scores, in the order of the records."""
    found: dict[str, None] = {}
    for record in run.evaluations:
        found |= {key: None for key, value in record.items() if key not in ("kind", "time", "step") and is_number(value)}
    return list(found)


def points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of records that have a value."""
    return [(record["step"], record[key]) for record in records if is_number(record.get(key))]


def is_number(value: Any) -> bool:
    """No None, which stands for what was not finite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6
