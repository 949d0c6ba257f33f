"""The model card of a run: what was trained, how well, in which stages, at what cost, and how to have it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from progscale import __version__
from progscale.report.quantities import percent, quantity, seconds_text, significant
from progscale.report.record import RunRecord
from progscale.report.run_page import LOSSES, first_block_text, is_number, memory_words, total

# Of transformers' heads, as the hub calls what they are for.
PIPELINES = {
    "sequence_classification": "text-classification",
    "question_answering": "question-answering",
    "causal_lm": "text-generation",
    "seq2seq_lm": "summarization",
}
AUTO_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}


def model_card(run: RunRecord, origin: Mapping[str, Any], *, is_adapter: bool) -> str:
    """The card as markdown, with the metadata that the hub reads.

    Args:
        run: finished.
        origin: of the exported model: `step`, `metrics`, `model`.
        is_adapter: PEFT's adapter, and not a whole model.
    """
    from huggingface_hub import EvalResult, ModelCardData

    subject = origin.get("model", {})
    head, pipeline = str(subject.get("head", "")), PIPELINES.get(str(subject.get("head", "")))
    metrics = {key: value for key, value in origin["metrics"].items() if is_number(value)}
    # A local folder is nothing that somebody else could load.
    base = base_model(run)
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        tags=["progscale", f"schedule:{run.about['schedule']}", f"method:{run.about['method']}"],
        base_model=base,
        datasets=[name] if (name := data_set(run)) else None,
        metrics=[run.primary_metric] if run.primary_metric else None,
        pipeline_tag=pipeline,
        model_name=run.name,
        eval_results=[
            EvalResult(
                task_type=pipeline or "other",
                dataset_type=data_set(run) or str(run.about["task"]),
                dataset_name=str(run.about["task"]),
                dataset_split="validation",
                metric_type=key,
                metric_value=value,
            )
            for key, value in metrics.items()
            if not key.startswith(LOSSES)
        ],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run.name}",
        lead(run, base),
        "## Scores",
        score_table(run, metrics, int(origin["step"])),
        "## Stages",
        stage_table(run),
        ledger(run),
        "## How to load it",
        loading(run, head, base, int(subject.get("num_labels", 2)), is_adapter=is_adapter),
        "## How to make it again",
        f"```bash\n{run.about['command']}\n```",
        f"Seed {run.about['seed']}, {run.about['precision']}, {run.about['engine']} on {run.about['world_size']} process(es), "
        f"{run.about['device']}; " + ", ".join(f"{name} {number}" for name, number in run.about["versions"].items()) + ".",
        "<details><summary>Config, every value</summary>\n\n```json\n"
        + json.dumps({key: value for key, value in run.config.items() if key != "hash"}, indent=2)
        + "\n```\n\n</details>",
    ]
    return "\n\n".join(sections) + "\n"


def base_model(run: RunRecord) -> str | None:
    """The hub's name of the model that was trained on; None for a folder of one's own, or random weights."""
    name = run.config["model"].get("name")
    if (
        not name
        or run.config["model"].get("random_weights")
        or Path(name).expanduser().exists()
        or str(name).startswith((".", "/", "~"))
    ):
        return None
    return str(name)


def data_set(run: RunRecord) -> str | None:
    """The hub's name of the data, where that is known."""
    task = run.config["task"]
    from progscale.config.schema import GLUE_TASKS

    return task.get("hub") or ("nyu-mll/glue" if task["name"] in GLUE_TASKS else None)


def lead(run: RunRecord, base: str | None) -> str:
    """What it is, in a sentence."""
    about = run.about
    what = f"[{base}](https://huggingface.co/{base})" if base else str(run.plan["model"]).rsplit("/", 1)[-1]
    stages = len(run.plan["stages"])
    how = (
        f"in {stages} stages that train fewer and fewer blocks"
        if about["schedule"] == "progtuning"
        else f"schedule {about['schedule']}"
    )
    return (
        f"{what}, fine-tuned on {about['task']} with [progscale](https://arxiv.org/abs/2506.21119) {__version__}: method "
        f"{about['method']}, {how}, {float(run.plan['epochs']):g} epochs."
    )


def score_table(run: RunRecord, metrics: Mapping[str, float], step: int) -> str:
    """On the evaluation splits."""
    rows = [[key, significant(value, 4)] for key, value in metrics.items()]
    splits = ", ".join(f"{name} ({part['rows']} rows)" for name, part in run.about["data"].items() if name != "train")
    return f"{table(['metric', 'value'], rows)}\n\nAfter step {step} of {run.total_steps}, on {splits}."


def stage_table(run: RunRecord) -> str:
    """Which blocks, how many parameters, what it took."""
    stacks = run.plan["num_blocks"]
    rows = []
    for planned, stage in zip(run.plan["stages"], run.stages, strict=True):
        picture = " ".join(
            "".join("█" if block in set(planned["live_blocks"][stack]) else "·" for block in range(count))
            for stack, count in stacks.items()
        )
        rows.append(
            [
                str(stage["stage"]),
                f"{stage['start_step']} to {stage['end_step'] - 1}",
                f"`{picture}`",
                first_block_text(stage["first_block"]),
                "trained" if stage["embeddings_live"] else "frozen",
                quantity(stage["trainable_parameters"]),
                quantity(stage["updated_parameters"], digits=4),
                seconds_text(stage["train_seconds"]),
                quantity(stage["peak_memory_bytes"], "B"),
                str(stage["frozen_changed"]),
            ]
        )
    headings = ["stage", "steps", "blocks", "first", "embeddings", "trained", "updated", "time", "peak memory", "frozen changed"]
    return table(headings, rows)


def ledger(run: RunRecord) -> str:
    """Planned, measured, and beside training without stages."""
    assert run.summary is not None
    summary = run.summary
    updated, baseline = summary["updated_parameters"], summary["baseline_updated_parameters"]
    planned = sum(stage["planned_updated_parameters"] for stage in run.stages)
    measured_text, planned_text, baseline_text = (quantity(value, digits=4) for value in (updated, planned, baseline))
    lines = [
        f"- updated parameters: {measured_text} measured, {planned_text} planned, {baseline_text} without stages "
        f"({percent(1 - updated / baseline)} fewer)",
        f"- training: {seconds_text(summary['train_seconds'])} ({seconds_text(summary['total_seconds'])} with all else)",
        f"- peak memory: {quantity(max(stage['peak_memory_bytes'] for stage in run.stages), 'B')} ({memory_words(run)})",
    ]
    flops, plain, joules = total(run, "flops"), total(run, "baseline_flops"), total(run, "energy_joules")
    if flops is not None and plain:
        share = percent(flops / plain)
        lines.append(f"- operations: {quantity(flops, 'FLOP')}, {share} of the same method's without stages, on the same rows")
    if joules is not None:
        lines.append(f"- energy of the GPUs while training: {quantity(joules / 3600, 'Wh')}")
    return "\n".join(lines)


def loading(run: RunRecord, head: str, base: str | None, num_labels: int, *, is_adapter: bool) -> str:
    """Python that loads it."""
    auto = AUTO_CLASSES.get(head, "AutoModel")
    name = json.dumps(run.name)
    if is_adapter:
        text = (
            f"from peft import PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
            f"base = {auto}.from_pretrained({json.dumps(base or 'BASE MODEL')}, num_labels={num_labels})\n"
            f"model = PeftModel.from_pretrained(base, {name})"
        )
    else:
        text = f"from transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained({name})"
    return f"```python\n{text}\ntokenizer = AutoTokenizer.from_pretrained({name})\n```"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
