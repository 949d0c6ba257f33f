"""The run, as one page: stages, steps, evaluation, records."""

from __future__ import annotations

import functools
import random
import time
from typing import Any, cast

import numpy as np
import torch

from progscale.data import MicroBatch
from progscale.engine.base import StepResult
from progscale.errors import NonFiniteError, PreemptedError
from progscale.meters import Audit, StageMeter
from progscale.progress import Progress
from progscale.schedule import Stage
from progscale.session import Session
from progscale.tasks.base import GeneratingTask, Task, Tokenized, evaluate_task
from progscale.trackers import score_line, stage_table


def train(session: Session) -> dict[str, Any]:
    """Runs all stages and returns what `summary.json` holds.

    Raises:
        NonFiniteError: a loss or gradient was not finite and `train.nonfinite` does not skip it (any more).
        AuditError: a frozen tensor changed its bits.
        PreemptedError: the run was told to stop, and is saved.
        CheckpointError: a checkpoint could not be written.
    """
    s, config, engine = session, session.config, session.engine
    progress = Progress.of(s)
    s.console.begin(s.total_steps, progress.step)
    s.log("run", **s.description)
    for build in s.builds_from(progress.stage):
        audit = Audit(engine, build)
        switch = s.begin_stage(build, progress.step)
        meter = StageMeter(engine, build, s.sizes, s.memory, audit, s.operations(build.stage))
        progress.begin(build.stage, switch, meter)
        meter.start()
        between_steps(s, progress, meter, build.stage)
        for step, batch in s.batches(build.stage, progress.step):
            s.sign(f"step {step}")
            seed_step(config.run.seed, step, engine.rank)
            s.feed.at(s.repeats(step))
            rate = s.learning_rate(step)
            result = engine.train_step(batch.micro_batches, batch.weight, s.task.loss, rate, s.notice, s.feed.around)
            s.heed(result.notices)
            check_finite(s, progress, result, step, batch)
            meter.step(batch.size, batch.tokens, result.applied, batch.shapes, s.feed.take_skipped())
            s.log_step(step, build.stage.index, result, rate)
            progress.step, progress.evaluation_due = step + 1, s.evaluation_due(step, build.stage)
            between_steps(s, progress, meter, build.stage)
        record = meter.finish(
            steps_per_epoch=s.steps_per_epoch,
            first_block=s.first_block(build.stage),
            switch_seconds=progress.switch_seconds,
            carried=progress.carried,
            micro_batch_size=s.loader.micro_batch_size,
            frozen_prefix=s.depth_of(build.stage),
            cache=s.cache_counts(),
        )
        progress.stages.append(record)
        s.log("stage", **record.to_json())
    s.finish_saving()
    s.console.end()
    s.sign("exporting")
    if config.train.save_model == "last":
        s.export(progress.step, progress.metrics)
    return finish(s, progress)


def between_steps(s: Session, progress: Progress, meter: StageMeter, stage: Stage) -> None:
    """Evaluates, saves and stops, where that is due. With the last step of a stage done, the stage is still the one at work.

    Raises:
        PreemptedError: the run was told to stop; a checkpoint of this step is on the disk.
    """
    save = s.save_due(progress.step, stage) and progress.step > progress.saved_step
    if not (progress.evaluation_due or save or s.stopping or s.publish_due):
        return
    meter.stop()
    if progress.evaluation_due and not s.stopping:
        progress.evaluation_due = not evaluate(s, progress, progress.step)
    if save or s.stopping:
        meter.audit.check(stage.index)
        content = {"progress": progress.to_json(), "meter": meter.to_json(), "unlogged": s.unlogged, "cache": s.cache_counts()}
        progress.saving_seconds += s.save(progress.step, stage, content)
        progress.saved_step = progress.step
    s.publish()
    if s.stopping:
        s.log("stopped", step=progress.step)
        raise PreemptedError(
            f"told to stop: saved after step {progress.step} of {s.total_steps}; --resume auto goes on from there"
        )
    meter.start()


def evaluate(s: Session, progress: Progress, step: int) -> bool:
    """Scores every evaluation split after `step` optimizer steps, each row once over all ranks; exports the best model.

    Returns:
        Whether it came to its end; False when the run is to stop.
    """
    start = time.perf_counter()
    metrics: dict[str, float] = {}
    s.feed.at(s.repeats(step))
    for name, split in s.evaluation_splits.items():
        predictions: dict[int, Any] = {}
        loss = torch.zeros((), dtype=torch.float64)
        with s.engine.evaluating():
            for micro in s.evaluation_batches(split):
                s.sign(f"evaluating {name} after step {step}")
                if s.ask_to_stop():
                    return False
                with s.feed.around(micro, name):
                    outputs = s.engine.forward(micro.inputs)
                written = generate(s, micro, split)
                if not micro.weight:
                    continue  # a filler: this rank ran out of rows, but must take part in the forward pass
                if micro.labels:
                    loss += s.task.loss(outputs, s.engine.to_device(micro.labels)).sum().double().cpu()
                rows = micro.rows.tolist()
                seen = outputs if written is None else written
                predictions.update(zip(rows, s.task.predict(seen, rows, split), strict=True))
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
            s.export(step, metrics)
    return True


def generate(s: Session, micro: MicroBatch, split: Tokenized) -> torch.Tensor | None:
    """The token ids that the model writes for a micro-batch, a filler too; None where the task asks for none."""
    options = getattr(s.task, "generation", None)
    if options is None:
        return None
    task = cast(GeneratingTask, s.task)
    return s.engine.generate(task.prompts(micro.inputs, micro.rows.tolist(), split), **options)


def score(task: Task, split: Tokenized, name: str, everyone: list[tuple[dict[int, Any], float]]) -> dict[str, float]:
    """Metrics of a split, and its mean loss, from (predictions, summed loss) of every rank.

    Where the mean is over target tokens there is the perplexity too, e to its power.
    """
    scores = evaluate_task(task, split, name, merge([predictions for predictions, _ in everyone]))
    if split.labels:
        loss, of_split = sum(loss for _, loss in everyone) / split.weight(), name.removeprefix("validation")
        scores |= {f"loss{of_split}": loss}
        if split.targets is not None:
            with np.errstate(over="ignore"):  # a loss above 709 has none that a float could hold
                scores |= {f"perplexity{of_split}": float(np.exp(loss))}
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
    # Left out, the step would be followed by others like it, and what is saved between them would be lost.
    bad = allowed > 0 and not s.engine.state_is_finite()
    if bad or progress.skipped_in_a_row > allowed:
        s.console.end()
        again = f" ({progress.skipped_in_a_row} steps in a row)" if progress.skipped_in_a_row > 1 else ""
        if bad:
            raise NonFiniteError(
                f"{what}{again}, and neither are weights or the optimizer's state: no later step mends that; "
                "--resume auto goes on from the last checkpoint"
            )
        raise NonFiniteError(
            f"{what}{again}; the weights are those of the step before. Rows of the batch: {batch.rows.tolist()[:16]}… "
            "Go on with --resume auto --set train.nonfinite=skip:3, or start anew with a smaller optimizer.lr or another "
            "train.precision"
        )
    s.console.show(f"{what}; the step is skipped")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds every generator from (seed, step, rank), so that no step's dropout hangs on how the run got there."""
    # The odd constants keep neighbouring steps and ranks from sharing a seed.
    mixed = (seed * 1_000_003 + step * 1_009 + rank * 9_176_263) % 2**63
    torch.manual_seed(mixed)
    # A task's own loss may draw from these.
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def finish(s: Session, progress: Progress) -> dict[str, Any]:
    """The summary, written and shown."""
    stages = [record.to_json() for record in progress.stages]
    summary = {
        **s.description,
        "engine": s.engine.name,
        "metrics": progress.metrics,
        "best_metrics": progress.best,
        "best_step": progress.best_step,
        "updated_parameters": sum(record.updated_parameters for record in progress.stages),
        "planned_updated_parameters": s.plan.to_json()["updated_parameters"],
        "skipped_steps": sum(record.skipped_steps for record in progress.stages),
        "baseline_updated_parameters": s.plan.to_json()["baseline_updated_parameters"],
        "train_seconds": sum(record.train_seconds for record in progress.stages),
        "switch_seconds": sum(record.switch_seconds for record in progress.stages),
        "audit_seconds": sum(record.audit_seconds for record in progress.stages),
        "evaluation_seconds": progress.evaluation_seconds,
        "saving_seconds": progress.saving_seconds,
        "total_seconds": progress.seconds,
        "steps": s.total_steps,
        "stages": stages,
    }
    s.log("summary", metrics=progress.metrics)
    s.write_summary(summary)
    s.console.show(stage_table(stages))
    return summary
