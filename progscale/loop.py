"""The run, as one page: stages, steps, evaluation, records."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from progscale.engine.base import StepResult
from progscale.errors import NonFiniteError
from progscale.export import export_model
from progscale.meters import Audit, StageMeter, StageRecord
from progscale.session import Session
from progscale.tasks.base import Task, Tokenized, evaluate_task
from progscale.trackers import score_line, stage_table


def train(session: Session) -> dict[str, Any]:
    """Runs all stages and returns what `summary.json` holds.

    Raises:
        NonFiniteError: a loss or gradient was not finite and `train.nonfinite` does not skip it (any more).
        AuditError: a frozen tensor changed its bits.
    """
    s, config, engine = session, session.config, session.engine
    progress = Progress()
    s.console.begin(s.total_steps)
    for build in s.builds:
        audit = Audit(engine, build)
        switch = engine.begin_stage(build)
        meter = StageMeter(engine, build, s.sizes, s.memory, audit)
        meter.start()
        for step, batch in s.batches(build.stage):
            seed_step(config.run.seed, step, engine.rank)
            rate = s.learning_rate(step)
            result = engine.train_step(batch.micro_batches, batch.size, s.task.loss, rate)
            check_finite(s, progress, result, step, batch)
            meter.step(batch.size, batch.tokens, result.applied)
            s.log_step(step, build.stage.index, result, rate)
            if s.evaluation_due(step, build.stage):
                meter.stop()
                evaluate(s, progress, step + 1)
                meter.start()
        record = meter.finish(
            steps_per_epoch=s.steps_per_epoch,
            first_block=s.first_block(build.stage),
            switch_seconds=switch.seconds,
            carried=switch.carried,
        )
        progress.stages.append(record)
        s.log("stage", **record.to_json())
    s.console.end()
    if config.train.save_model == "last":
        export_model(engine, s.tokenizer, s.model_path)
    return finish(s, progress)


class Progress:
    """What the run has shown so far."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.stages: list[StageRecord] = []
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.evaluation_seconds = 0.0
        self.skipped_in_a_row = 0


def evaluate(s: Session, progress: Progress, step: int) -> None:
    """Scores every evaluation split after `step` optimizer steps, each row once over all ranks; exports the best model."""
    start = time.perf_counter()
    metrics: dict[str, float] = {}
    for name, split in s.evaluation_splits.items():
        predictions: dict[int, Any] = {}
        loss = torch.zeros((), dtype=torch.float64)
        with s.engine.evaluating():
            for micro in s.evaluation_batches(split):
                outputs = s.engine.forward(micro.inputs)
                if not micro.weight:
                    continue  # a filler: this rank ran out of rows, but must take part in the forward pass
                if micro.labels:
                    loss += s.task.loss(outputs, s.engine.to_device(micro.labels)).sum().double().cpu()
                rows = micro.rows.tolist()
                predictions.update(zip(rows, s.task.predict(outputs, rows, split), strict=True))
        everyone = s.engine.gather_objects((predictions, float(loss)))
        scores = s.engine.on_main(functools.partial(score, s.task, split, name, everyone))
        metrics |= scores
        s.console.show(score_line(f"step {step} {name}", scores))
    progress.evaluation_seconds += time.perf_counter() - start
    progress.metrics = metrics
    s.log("evaluation", step=step, **metrics)
    if s.is_better(metrics, progress.best):
        progress.best, progress.best_step = metrics, step
        if s.config.train.save_model == "best":
            export_model(s.engine, s.tokenizer, s.model_path)


def score(task: Task, split: Tokenized, name: str, everyone: list[tuple[dict[int, Any], float]]) -> dict[str, float]:
    """Metrics and mean loss of a split, from (predictions, summed loss) of every rank."""
    scores = evaluate_task(task, split, name, merge([predictions for predictions, _ in everyone]))
    if split.labels:
        scores |= {f"loss{name.removeprefix('validation')}": sum(loss for _, loss in everyone) / len(split)}
    return scores


def merge(parts: list[dict[int, Any]]) -> dict[int, Any]:
    """All ranks' predictions; a row that two ranks scored would count twice."""
    merged = {row: prediction for part in parts for row, prediction in part.items()}
    assert len(merged) == sum(map(len, parts)), "a row was evaluated on two ranks"
    return merged


def check_finite(s: Session, progress: Progress, result: StepResult, step: int, batch: Any) -> None:
    """Acts on a loss or gradient that is not finite; the weights have not been touched."""
    if result.fault is None:
        progress.skipped_in_a_row = 0
        return
    progress.skipped_in_a_row += 1
    allowed = s.skip_limit
    where = f" on rank {', '.join(map(str, result.ranks))}" if result.ranks else ""
    what = f"step {step}: the {result.fault} is not finite{where}"
    s.log("nonfinite", step=step, fault=result.fault, ranks=list(result.ranks), rows=batch.rows.tolist())
    if progress.skipped_in_a_row > allowed:
        s.console.end()
        again = f" ({progress.skipped_in_a_row} steps in a row)" if allowed else ""
        raise NonFiniteError(
            f"{what}{again}; the weights are those of the step before. Rows of the batch: {batch.rows.tolist()[:16]}… "
            "Try a smaller optimizer.lr, another train.precision, or --set train.nonfinite=skip:3"
        )
    s.console.show(f"{what}; the step is skipped")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds dropout from (seed, step, rank), so that no step's masks hang on how the run got there."""
    # The odd constants keep neighbouring steps and ranks from sharing a seed.
    torch.manual_seed((seed * 1_000_003 + step * 1_009 + rank * 9_176_263) % 2**63)


def finish(s: Session, progress: Progress) -> dict[str, Any]:
    """The summary, written and shown."""
    stages = [record.to_json() for record in progress.stages]
    summary = {
        "task": s.task.name,
        "schedule": s.config.schedule.name,
        "engine": s.engine.name,
        "world_size": s.engine.world_size,
        "metrics": progress.metrics,
        "best_metrics": progress.best,
        "best_step": progress.best_step,
        "updated_parameters": sum(record.updated_parameters for record in progress.stages),
        "planned_updated_parameters": s.plan.to_json()["updated_parameters"],
        "baseline_updated_parameters": s.plan.to_json()["baseline_updated_parameters"],
        "train_seconds": sum(record.train_seconds for record in progress.stages),
        "switch_seconds": sum(record.switch_seconds for record in progress.stages),
        "audit_seconds": sum(record.audit_seconds for record in progress.stages),
        "evaluation_seconds": progress.evaluation_seconds,
        "total_seconds": time.perf_counter() - progress.started,
        "steps": s.total_steps,
        "stages": stages,
        **s.environment,
    }
    s.log("summary", metrics=progress.metrics)
    s.write_summary(summary)
    s.console.show(stage_table(stages))
    return summary
