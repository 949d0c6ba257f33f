"""Runs side by side: which of them may be compared, what each way of training scores and costs, and what the difference is worth.

Runs of one model on one task make a group. In it, runs that differ by the seed alone are an arm. Two arms are compared by the
seeds that both have: the mean of the differences with its 95 % confidence interval, and Student's paired t-test. Over all tests
of a comparison p is adjusted after Holm (1979), for who tests often finds something.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from progscale.config import is_decisive
from progscale.errors import ReportError, nearest
from progscale.report.quantities import is_error
from progscale.report.record import RunRecord
from progscale.report.significance import holm, paired_test

Which = Literal["last", "best"]
# An arm's name begins with these; the others are named where they differ.
NAMED = ("method.name", "schedule.name")
# In which an arm and its reference differ by what the one has and the other has not.
OF_THE_SCHEDULE = frozenset(
    f"schedule.{key}"
    for key in ("name", "stages", "embeddings", "first_blocks", "starts", "block_weights", "frozen_mode", "options")
) | {"cache.storage", "cache.dtype"}
# Free to change in a run that goes on, but not for nothing.
COSTLY = ("train.micro_batch_size", "train.gradient_checkpointing", "train.compile", "train.fused_optimizer", "model.attention")
# What seconds and bytes hang on, whatever is trained.
MACHINE = ("device", "cores", "threads")


@dataclass(frozen=True)
class Cost:
    """What a run took.

    Attributes:
        train_seconds: of training steps alone.
        total_seconds: with evaluation, saving and switches.
        updated_parameters: measured, summed over epochs.
        baseline_updated_parameters: what the same method updates without stages.
        flops: operations as run; None where an earlier version did not count them.
        baseline_flops: of the same method without stages, on the same rows.
        peak_memory_bytes: of the stage that needs most.
        last_peak_memory_bytes: of the last stage.
        energy_joules: of all GPUs; None where they do not tell.
    """

    train_seconds: float
    total_seconds: float
    updated_parameters: float
    baseline_updated_parameters: float
    flops: float | None
    baseline_flops: float | None
    peak_memory_bytes: float
    last_peak_memory_bytes: float
    energy_joules: float | None


@dataclass(frozen=True)
class Difference:
    """An arm beside the one that it is measured against, over the seeds that both have.

    Attributes:
        reference: name of that arm.
        seeds: that both have.
        mean: of arm − reference.
        low: lower end of the mean's 95 % confidence interval; None with one seed.
        high: upper end.
        p: two-sided, of the paired t-test; None with one seed.
        p_holm: adjusted over all tests of the comparison.
        time_ratio: geometric mean of the training seconds' ratios; None where the machines differ.
    """

    reference: str
    seeds: tuple[int, ...]
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    time_ratio: float | None


@dataclass(frozen=True)
class Arm:
    """One way of training, over its seeds.

    Attributes:
        name: method, schedule, and what else is not the same in all arms of that name.
        runs: by seed.
        scores: of the primary metric, by seed.
        costs: by seed.
        against: None for an arm that others are measured against.
        same_machine: whether all of its runs, and those of its reference, had the same.
    """

    name: str
    runs: Mapping[int, RunRecord]
    scores: Mapping[int, float]
    costs: Mapping[int, Cost]
    against: Difference | None = None
    same_machine: bool = True

    @property
    def mean(self) -> float:
        """Of the scores."""
        return statistics.fmean(self.scores.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the scores over seeds (n - 1); None for one."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None

    def cost(self, name: str) -> float | None:
        """Mean of a `Cost`'s entry over the seeds; None where a run has none."""
        values = [getattr(cost, name) for cost in self.costs.values()]
        return None if None in values else statistics.fmean(values)


@dataclass(frozen=True)
class Group:
    """The runs of one model on one task."""

    model: str
    task: str
    metric: str
    higher_is_better: bool
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All groups, and what a reader must know beside the figures."""

    groups: tuple[Group, ...]
    which: Which
    notes: tuple[str, ...] = field(default=())


def compare(
    runs: Sequence[RunRecord],
    *,
    which: Which = "last",
    reference: str | None = None,
    metric: str | None = None,
    labels: Mapping[Path, tuple[str, str]] | None = None,
    strict: bool = True,
) -> Comparison:
    """Sets runs side by side.

    Args:
        runs: finished ones, at least two.
        which: scores after the last step, or those of the best evaluation.
        reference: what the name of the arm begins with that others are measured against; by default the same method without
            stages (schedule none), else the first arm.
        metric: that is compared; by default the one that decides in these runs.
        labels: model and task by the run's folder, where the caller knows better than the runs what belongs together; an empty
            text leaves it to the run.
        strict: refuse all where some cannot be compared; else these are left out, and a note says why.

    Raises:
        ReportError: they cannot be compared; the message has every reason.
    """
    if len(runs) < 2:
        raise ReportError(f"compare: {len(runs)} run; at least two are needed")
    left_out: list[str] = []

    def refuse(faults: Sequence[str]) -> None:
        if faults and strict:
            raise ReportError(reasons(faults))
        left_out.extend(f"Left out: {fault}." for fault in faults)

    by_run = {run.path: faults_of(run, metric, which) for run in runs}
    refuse([fault for faults in by_run.values() for fault in faults])
    by_task: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        if not by_run[run.path]:
            model, task = (labels or {}).get(run.path, ("", ""))
            key = (model or model_of(run), task or str(run.about["task"]))
            by_task.setdefault(key, []).append(run)
    by_group = {key: [*mismatches(members, metric), *same_runs(members)] for key, members in by_task.items()}
    refuse([fault for faults in by_group.values() for fault in faults])
    groups = [make_group(*key, members, which, metric) for key, members in by_task.items() if not by_group[key]]
    if not groups:
        raise ReportError(reasons([note.removeprefix("Left out: ") for note in left_out]))
    check_reference(groups, reference)
    compared = with_holm([with_differences(group, reference) for group in groups])
    return Comparison(tuple(compared), which, (*left_out, *notes_of(compared)))


def check_reference(groups: Sequence[Group], reference: str | None) -> None:
    """Refuses a name that no arm has, or several.

    Raises:
        ReportError: naming the arms.
    """
    if reference is None:
        return
    names = dict.fromkeys(arm.name for group in groups for arm in group.arms)
    if not any(fitting(group.arms, reference) for group in groups):
        raise ReportError(f"--reference '{reference}': no arm's name begins so; {'; '.join(names)}{nearest(reference, names)}")
    for group in groups:
        several = fitting(group.arms, reference)
        if len(several) > 1:
            fit = "; ".join(arm.name for arm in several)
            raise ReportError(f"--reference '{reference}' fits several arms of {group.task}: {fit}; give one whole")


def fitting(arms: Sequence[Arm], reference: str) -> list[Arm]:
    """Arms that a reference names: the one of that name, or all whose names begin so."""
    exact = [arm for arm in arms if arm.name == reference]
    return exact or [arm for arm in arms if arm.name.startswith(reference)]


def reasons(faults: Sequence[str]) -> str:
    """All of them in one message."""
    most = 10
    more = f"\n  … and {len(faults) - most} more" if len(faults) > most else ""
    return "these runs cannot be compared:\n" + "\n".join(f"  {fault}" for fault in faults[:most]) + more


def faults_of(run: RunRecord, metric: str | None, which: Which) -> list[str]:
    """What a run alone lacks to be compared."""
    if run.summary is None:
        return [
            f"{run.path}: it has not ended ({run.step} of {run.total_steps} steps); go on with --resume auto, or leave it out"
        ]
    missing = [key for key in ("primary_metric", "data", "model") if key not in run.summary]
    if missing:
        return [f"{run.path}: its summary.json does not say {', '.join(missing)}; it is of an earlier version, run it again"]
    changed = sum(stage["frozen_changed"] for stage in run.stages)
    if changed:
        return [f"{run.path}: {changed} frozen tensors changed, so it is not the run that its config describes"]
    wanted = metric or str(run.primary_metric)
    scores = run.metrics(which)
    if wanted not in scores:
        return [f"{run.path}: it has no '{wanted}', only {', '.join(scores)}{nearest(wanted, scores)}"]
    if scores[wanted] is None:
        return [f"{run.path}: its {wanted} is not a finite number"]
    return []


def model_of(run: RunRecord) -> str:
    """The model's name: the last part of a folder's, for a folder may lie elsewhere on another machine."""
    model = run.config.get("model", {})
    name = str(run.about["model"])
    parts = Path(name).parts
    is_folder = name.startswith((".", "/", "~")) or len(parts) > 2
    # Many a model lies in a folder "model" or "checkpoint-500".
    short = "/".join(parts[-2:]) if is_folder else name
    extra = [key for key in ("random_weights", "overrides", "revision") if model.get(key)]
    return short + (f" ({', '.join(f'{key}={json.dumps(model[key])}' for key in extra)})" if extra else "")


def mismatches(runs: Sequence[RunRecord], metric: str | None) -> list[str]:
    """What keeps runs of one model and task from being compared."""
    first, found = runs[0], []
    for run in runs[1:]:
        if metric is None and run.primary_metric != first.primary_metric:
            found.append(
                f"{first.path} is judged by {first.primary_metric}, {run.path} by {run.primary_metric}: choose one with --metric"
            )
    by_seed: dict[int, RunRecord] = {}
    for run in runs:
        other = by_seed.setdefault(seed_of(run), run)
        mine, theirs = run.about["data"], other.about["data"]
        if set(mine) != set(theirs):
            found.append(f"{other.path} has the splits {', '.join(theirs)}, {run.path} has {', '.join(mine)}")
        for split in mine.keys() & theirs.keys():
            if mine[split] != theirs[split]:
                verb = "trained" if split == "train" else "evaluated"
                sizes = f"{theirs[split]['rows']} and {mine[split]['rows']} rows"
                same = " of other content or tokens" if theirs[split]["rows"] == mine[split]["rows"] else ""
                found.append(f"{other.path} and {run.path} were {verb} on different data ({split}: {sizes}{same})")
    # The seed may decide which rows are set aside for evaluation; how many it never does.
    for run in runs[1:]:
        for split in run.about["data"].keys() & first.about["data"].keys():
            rows = [one.about["data"][split]["rows"] for one in (first, run)]
            if rows[0] != rows[1] and seed_of(run) != seed_of(first):
                found.append(f"{first.path} and {run.path} have {rows[0]} and {rows[1]} rows of the split {split}")
    return found


def seed_of(run: RunRecord) -> int:
    """Of the run."""
    return int(run.about["seed"])


def same_runs(runs: Sequence[RunRecord]) -> list[str]:
    """Runs that differ in nothing, the seed included."""
    seen: dict[tuple[str, int], RunRecord] = {}
    found = []
    for run, name in zip(runs, arm_names(runs)[0], strict=True):
        other = seen.setdefault((name, seed_of(run)), run)
        if other is not run:
            found.append(f"{other.path} and {run.path} are the same run (seed {seed_of(run)}): give one of them")
    return found


def make_group(model: str, task: str, runs: Sequence[RunRecord], which: Which, metric: str | None) -> Group:
    """Runs of one model and task, by what differs between them."""
    names, differing = arm_names(runs)
    arms: dict[str, dict[int, RunRecord]] = {}
    for run, name in zip(runs, names, strict=True):
        arms.setdefault(name, {})[seed_of(run)] = run
    wanted = metric or str(runs[0].primary_metric)
    return Group(
        model,
        task,
        wanted,
        bool(runs[0].about["higher_is_better"]) if wanted == runs[0].primary_metric else not is_error(wanted),
        tuple(
            Arm(
                name,
                dict(sorted(seeds.items())),
                {seed: float(run.metrics(which)[wanted]) for seed, run in sorted(seeds.items())},
                {seed: cost_of(run) for seed, run in sorted(seeds.items())},
            )
            for name, seeds in arms.items()
        ),
        (differing,) if differing else (),
    )


def arm_names(runs: Sequence[RunRecord]) -> tuple[list[str], str]:
    """A name for each run's arm, and what else differs between arms of different names."""
    values = [decisive(run) for run in runs]
    base = [", ".join(str(entry.get(key)) for key in NAMED) for entry in values]
    names = []
    for entry, start in zip(values, base, strict=True):
        alike = [other for other, of in zip(values, base, strict=True) if of == start]
        names.append(", ".join([start, *(f"{short(key)}={shown(entry.get(key))}" for key in sorted(differences(alike)))]))
    rest = differences(values) - set(NAMED)
    elsewhere = {key for key in rest if not any(f"{short(key)}=" in name for name in names)}
    parts = []
    for key in sorted(elsewhere):
        by_name = dict.fromkeys(f"{shown(entry.get(key))} ({name})" for entry, name in zip(values, names, strict=True))
        parts.append(f"{key}: {', '.join(by_name)}")
    return names, f"The arms differ in more than their names say. {'; '.join(parts)}." if parts else ""


def decisive(run: RunRecord) -> dict[str, Any]:
    """Every option that decides what a run computes, its seed left out; and the engine."""
    found = {
        f"{section}.{key}": value
        for section, values in run.config.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
        if is_of_an_arm(section, key)
    }
    # A null stands for the schedule's own number.
    found["schedule.stages"] = len(run.plan["stages"])
    found["schedule.frozen_mode"] = run.about["frozen_mode"]
    return found | {"cache.storage": run.about["cache"], "engine": run.about["engine"], "world_size": run.about["world_size"]}


def is_of_an_arm(section: str, key: str) -> bool:
    """Whether an option decides what a run computes or what that costs; seed and model have places of their own."""
    if section == "run" or (section == "model" and key != "attention"):
        return False
    return is_decisive(section, key) or f"{section}.{key}" in COSTLY


def differences(entries: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys whose values are not the same everywhere."""
    keys = {key for entry in entries for key in entry}
    return {key for key in keys if len({json.dumps(entry.get(key), sort_keys=True) for entry in entries}) > 1}


def short(key: str) -> str:
    """An option without its section, where its own name says enough."""
    return key if key.endswith((".name", ".options")) else key.partition(".")[2] or key


def shown(value: Any) -> str:
    """A value of a config, short."""
    return value if isinstance(value, str) else json.dumps(value)


def cost_of(run: RunRecord) -> Cost:
    """From a finished run's summary."""
    assert run.summary is not None

    def total(key: str) -> float | None:
        values = [stage[key] for stage in run.stages if stage.get(key) is not None]
        return float(sum(values)) if len(values) == len(run.stages) else None

    peaks = [float(stage["peak_memory_bytes"]) for stage in run.stages]
    return Cost(
        train_seconds=float(run.summary["train_seconds"]),
        total_seconds=float(run.summary["total_seconds"]),
        updated_parameters=float(run.summary["updated_parameters"]),
        baseline_updated_parameters=float(run.summary["baseline_updated_parameters"]),
        flops=total("flops"),
        baseline_flops=total("baseline_flops"),
        peak_memory_bytes=max(peaks),
        last_peak_memory_bytes=peaks[-1],
        energy_joules=total("energy_joules"),
    )


def with_differences(group: Group, reference: str | None) -> Group:
    """Each arm beside the one that it is measured against."""
    arms, notes = [], list(group.notes)
    for arm in group.arms:
        other, reason = reference_of(arm, group.arms, reference)
        if reason:
            notes.append(f"{arm.name}: {reason}.")
        machines = [machine_of(run) for one in filter(None, (arm, other)) for run in one.runs.values()]
        same = all(machine == machines[0] for machine in machines)
        if not same:
            where = " and ".join(dict.fromkeys(machine_text(machine) for machine in machines))
            notes.append(f"{arm.name}: seconds and memory are not set beside the reference's, for they are of {where}.")
        if other is None:
            arms.append(replace(arm, same_machine=same))
            continue
        both = tuple(sorted(arm.scores.keys() & other.scores.keys()))
        if not both:
            notes.append(f"{arm.name} and {other.name} have no seed in common, so there is no difference to test.")
            arms.append(replace(arm, same_machine=same))
            continue
        if len(both) < max(len(arm.scores), len(other.scores)):
            notes.append(f"{arm.name} and {other.name} have {len(both)} seeds in common; the difference is over those alone.")
        arms.append(replace(arm, against=difference(arm, other, both, same), same_machine=same))
    return replace(group, arms=tuple(arms), notes=tuple(dict.fromkeys(notes)))


def reference_of(arm: Arm, arms: Sequence[Arm], wanted: str | None) -> tuple[Arm | None, str]:
    """Which arm another one is measured against, and why none, where none is; none and no reason for a reference itself."""
    if wanted is not None:
        chosen = fitting(arms, wanted)
        if not chosen:
            return None, f"no arm is called {wanted}, so there are no differences"
        return (None, "") if chosen[0] is arm else (chosen[0], "")
    plain = [other for other in arms if values_of(other)["schedule.name"] == "none"]
    if not plain:
        return (None, "") if arms[0] is arm else (arms[0], "")
    if any(other is arm for other in plain):
        return None, ""
    own = [other for other in plain if values_of(other)["method.name"] == values_of(arm)["method.name"]] or plain
    alike = [other for other in own if not differences([values_of(arm), values_of(other)]) - OF_THE_SCHEDULE]
    chosen = alike if len(alike) == 1 else own
    if len(chosen) == 1:
        return chosen[0], ""
    names = "; ".join(other.name for other in chosen)
    return None, f"several arms without stages could be its reference ({names}): choose one with --reference"


def values_of(arm: Arm) -> dict[str, Any]:
    """Of the options of an arm, the same in all of its runs."""
    return decisive(next(iter(arm.runs.values())))


def machine_of(run: RunRecord) -> dict[str, Any]:
    """What its seconds and bytes hang on."""
    return {key: run.about.get(key) for key in MACHINE}


def machine_text(machine: Mapping[str, Any]) -> str:
    """As a note has it."""
    return f"{machine['device']} ({machine['cores']} cores, {machine['threads']} threads)"


def difference(arm: Arm, other: Arm, seeds: tuple[int, ...], same_machine: bool) -> Difference:
    """Paired by seed."""
    values = [arm.scores[seed] - other.scores[seed] for seed in seeds]
    mean, low, high, p = statistics.fmean(values), None, None, None
    if len(values) > 1:
        low, high, p = paired_test(values)
    ratios = [arm.costs[seed].train_seconds / max(1e-9, other.costs[seed].train_seconds) for seed in seeds]
    ratio = math.exp(statistics.fmean(map(math.log, ratios))) if same_machine and all(value > 0 for value in ratios) else None
    return Difference(other.name, seeds, mean, low, high, p, None, ratio)


def with_holm(groups: Sequence[Group]) -> list[Group]:
    """Adjusts p over all tests of the comparison."""
    tests = [arm.against.p for group in groups for arm in group.arms if arm.against is not None and arm.against.p is not None]
    adjusted = holm(tests)
    found = []
    for group in groups:
        arms = []
        for arm in group.arms:
            against = arm.against
            if against is not None and against.p is not None:
                against = replace(against, p_holm=adjusted[against.p])
            arms.append(replace(arm, against=against))
        found.append(replace(group, arms=tuple(arms)))
    return found


def notes_of(groups: Sequence[Group]) -> list[str]:
    """What holds for the whole comparison."""
    found = []
    seeds = [len(arm.scores) for group in groups for arm in group.arms]
    if min(seeds) == 1:
        found.append("Arms with one seed have no standard deviation and no test: their differences may be chance.")
    elif min(seeds) < 5:
        found.append(f"With {min(seeds)} seeds only large differences can be told from chance.")
    tests = sum(arm.against is not None and arm.against.p is not None for group in groups for arm in group.arms)
    if tests > 1:
        found.append(f"p is of {tests} paired t-tests, and also adjusted for their number (Holm).")
    return found
