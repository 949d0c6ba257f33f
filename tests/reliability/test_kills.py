"""Killed anywhere, once or twice, a run that is started again with --resume auto computes what it would have, to the bit."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.evidence import evidence, leftovers
from tests.harness.interrupted import BOUNDARIES, STEPS, Runs, goes_on, same, twelve
from tests.harness.launches import Launch
from tests.harness.programs import records

KILLED = -9
# What decides the bits that a run computes; how it is saved is drawn for each case.
KINDS: dict[str, dict[str, Any]] = {
    "progtuning": {},
    "bf16": {
        "train__precision": "bf16",
        "train__micro_batch_size": 16,
        "train__num_workers": 2,
        "train__evaluate": "stage",
        "train__save_model": "last",
    },
    "growing": {
        "schedule__name": "growing",
        "schedule__embeddings": "first_stage",
        "train__group_by_length": False,
        "optimizer__warmup_fraction": 0.25,
    },
}
# Point → the numbers at which it can be met in the first process of a run.
POINTS = {
    "step": range(STEPS + 1),  # the last is never reached: that run ends by itself
    "midstep": range(STEPS),
    "loader": range(1, STEPS + 1),
    "evaluation": range(1, 9),
    "save": range(1, 7),
    "switch": range(1, 5),
}


@dataclass(frozen=True)
class Case:
    """A run that is killed.

    Attributes:
        kind: a key of KINDS.
        saving: `checkpoint.…` settings.
        faults: of each process that is killed; the next one resumes.
    """

    kind: str
    saving: dict[str, Any]
    faults: tuple[str, ...]

    @staticmethod
    def drawn(seed: int, kinds: list[str]) -> Case:
        """A random case, the same for the same seed."""
        rng = random.Random(seed)
        saving = {"checkpoint__every_steps": rng.choice([None, 1, 2, 5]), "checkpoint__background": rng.random() < 0.5}
        faults = []
        for _ in range(rng.choice([1, 1, 2])):
            # Half of them at a step, the rest anywhere else.
            point = rng.choice(["step", "step", "step", "step", "midstep", "loader", "evaluation", "save", "switch"])
            faults.append(f"kill@{point}={rng.choice(POINTS[point])}")
        return Case(rng.choice(kinds), saving, tuple(faults))


def kill_and_finish(runs: Runs, folder: Path, case: Case, engine: str = "plain") -> None:
    """Runs the case's processes one after the other; the last one ends, and has computed what nobody interrupted."""
    settings = {**KINDS[case.kind], **case.saving}
    for fault in case.faults:
        with goes_on(folder):
            ended = runs.train(folder, engine, fault=fault, **settings)
        codes = {rank.code for rank in ended}
        if codes == {0}:
            assert "injected on rank" not in ended[0].err
            print("over before it could be killed")
            return same(evidence(folder / "a"), runs.whole(engine, **settings))
        # Of several ranks the slower ones may see that a peer is gone before they are killed themselves; where the loader has
        # processes of its own, one of them is killed, and the rank ends by an error.
        assert codes <= {KILLED, 1} and "injected on rank" in ended[0].err + ended[-1].err, ended[0].err
    runs.finish(folder, engine, **settings)


@pytest.mark.parametrize(
    "case",
    [
        Case("progtuning", {"checkpoint__every_steps": 2, "checkpoint__background": True}, ("kill@step=5", "kill@step=9")),
        Case("progtuning", {}, (f"kill@step={BOUNDARIES[1]}",)),
        Case("progtuning", {}, ("kill@evaluation=2",)),
    ],
    ids=lambda case: "+".join(case.faults),
)
def test_killed_and_resumed(runs: Runs, tmp_path: Path, case: Case) -> None:
    kill_and_finish(runs, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["in_place", "background"])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_killed_around_a_stage_boundary(runs: Runs, tmp_path: Path, boundary: int, offset: int, background: bool) -> None:
    kill_and_finish(
        runs, tmp_path, Case("progtuning", {"checkpoint__background": background}, (f"kill@step={boundary + offset}",))
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_killed_anywhere(runs: Runs, tmp_path: Path, seed: int) -> None:
    case = Case.drawn(seed, list(KINDS))
    print(f"seed {seed}: {case}")
    kill_and_finish(runs, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 9))
def test_killed_in_an_evaluation(runs: Runs, tmp_path: Path, batch: int) -> None:
    """The first four batches are those after the first epoch."""
    kill_and_finish(runs, tmp_path, Case("progtuning", {"checkpoint__background": batch % 2 == 0}, (f"kill@evaluation={batch}",)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("seed", [100, 101])
def test_two_ranks_killed_anywhere(runs: Runs, tmp_path: Path, engine: str, seed: int) -> None:
    case = Case.drawn(seed, ["progtuning"])
    print(f"seed {seed}: {case}")
    kill_and_finish(runs, tmp_path, case, engine)


# -- while the model is exported ------------------------------------------------------------------------------------

# Two models are exported: the second, which is better, replaces the first.
BETTER_AND_BETTER: dict[str, Any] = {"run__seed": 1, "task__max_eval_examples": 200}
EXPORT = "progscale.export:_write"


def killed_in_the_export(runs: Runs, folder: Path, line: int) -> bool:
    """Whether there was such a line; if so the run was resumed, and its model and scores are the uninterrupted run's."""
    (ended,) = runs.train(folder, kill_line=(EXPORT, line), **BETTER_AND_BETTER)
    assert ended.code in (0, KILLED), ended.err
    if ended.code == 0:
        return False
    runs.finish(folder, **BETTER_AND_BETTER)
    return True


def test_killed_while_a_model_is_exported(runs: Runs, tmp_path: Path) -> None:
    assert killed_in_the_export(runs, tmp_path, 12)


@pytest.mark.slow
def test_killed_at_every_line_of_two_exports(runs: Runs, tmp_path: Path) -> None:
    assert runs.whole(**BETTER_AND_BETTER)["summary"]["best_step"] == STEPS
    failed: dict[int, str] = {}
    for line in itertools.count(1):
        try:
            if not killed_in_the_export(runs, tmp_path / str(line), line):
                break
        except AssertionError as error:
            failed[line] = str(error)
    print(f"{line - 1} lines")
    assert line > 25
    assert failed == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "line"),
    # The third file that a run folder writes by these four lines is summary.json.
    [
        ("progscale.export:export_model", 1),
        ("progscale.loop:finish", 1),
        *(("progscale.trackers:RunFolder.write", number) for number in range(9, 13)),
    ],
)
def test_killed_at_the_very_end(runs: Runs, tmp_path: Path, function: str, line: int) -> None:
    """All steps are done; what is left is to export, and to sum up."""
    settings = {"train__save_model": "last"}
    (ended,) = runs.train(tmp_path, kill_line=(function, line), **settings)
    assert ended.code == KILLED, ended.err
    runs.finish(tmp_path, **settings)


# -- under the launcher ---------------------------------------------------------------------------------------------


def relaunch_and_compare(runs: Runs, folder: Path, cache: Path, engine: str) -> None:
    """The run goes on under the launcher, to the bits of one that was never killed."""
    resumed = [*twelve(folder, engine), "--resume", "auto"]
    with goes_on(folder), Launch(folder, resumed, ranks=2, cache=cache) as launch:
        finished = launch.finish()
    assert finished.code == 0, finished.err
    same(evidence(folder / "a"), runs.whole(engine))
    assert leftovers(folder / "a") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "fault"),
    [("zero2", "kill@step=2"), ("zero2", "kill@midstep=8"), ("zero3", "kill@step=6"), ("zero3", "kill@save=3")],
)
def test_a_launch_killed_with_all_its_ranks(runs: Runs, tmp_path: Path, cache: Path, engine: str, fault: str) -> None:
    with Launch(tmp_path, [*twelve(tmp_path, engine), "--resume", "auto"], ranks=2, cache=cache, fault=fault) as launch:
        finished = launch.finish()
    assert finished.code == 1
    assert finished.err.count("injected on rank") >= 1
    assert not (tmp_path / "a" / "summary.json").exists()
    relaunch_and_compare(runs, tmp_path, cache, engine)


def one_rank_killed(folder: Path, cache: Path, engine: str, fault: str, rank: int) -> None:
    """The others wait for it in a collective, and the launcher for the others, 600 s long: the survivor must end itself."""
    with Launch(folder, twelve(folder, engine), ranks=2, cache=cache, fault=f"{fault},rank={rank}") as launch:
        launch.wait_until(lambda: "injected on rank" in launch.err)
        finished = launch.finish(60)
    assert finished.left == (), f"still there after {finished.seconds:.0f} s\n{finished.err}"
    assert finished.code == 1
    assert finished.exits == {1 - rank: 1}
    assert f"progscale: [rank {1 - rank}] the run ends: rank {rank} is gone" in finished.err
    assert records(folder / "a", "step"), "it was to be killed while training"
    assert not (folder / "a" / "PREEMPTED").exists(), "nobody told the run to stop"


def test_one_rank_killed(runs: Runs, tmp_path: Path, cache: Path) -> None:
    one_rank_killed(tmp_path, cache, "ddp", "kill@step=7", 1)
    runs.finish(tmp_path, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "fault", "rank"),
    [
        ("zero2", "kill@step=5", 0),
        ("zero3", "kill@step=5", 1),
        ("ddp", "kill@collective=40", 0),
        ("zero2", "kill@collective=200", 1),
    ],
)
def test_one_rank_killed_at_a_step_or_in_a_collective(
    runs: Runs, tmp_path: Path, cache: Path, engine: str, fault: str, rank: int
) -> None:
    one_rank_killed(tmp_path, cache, engine, fault, rank)
    runs.finish(tmp_path, engine)
