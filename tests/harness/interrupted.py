"""A run of twelve steps in four stages over two epochs that tests interrupt, and what it computes when nobody does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness.evidence import checkpoints, evidence, leftovers, step_of
from tests.harness.forks import Ended, Forks
from tests.harness.programs import config_file, records, settings

STEPS = 12
# Optimizer steps at which a stage ends and the next begins.
BOUNDARIES = (3, 6, 9)
# 190 rows in batches of 32: the sixth batch of an epoch is short. 51 rows for evaluation are 4 batches.
TWELVE: dict[str, Any] = {
    "task__max_train_examples": 190,
    "train__epochs": 2,
    "train__eval_batch_size": 16,
    "schedule__stages": 4,
    "model__overrides": {"hidden_size": 32, "intermediate_size": 64, "hidden_dropout_prob": 0.1},
    # One rank of two gets one of two cores; so must a run in one process, to compute the same bits here and there.
    "run__threads": 1,
}


def twelve(folder: Path, engine: str = "plain", **changes: Any) -> list[str]:
    """Arguments of `progscale train` for the run, in `folder`/a.

    Args:
        folder: run.output_dir.
        engine: plain, or the name of a shipped config.
        changes: `train__epochs` stands for train.epochs.
    """
    layers = [] if engine == "plain" else config_file(engine)
    return [*layers, *settings(run__output_dir=str(folder), **{**TWELVE, **changes})]


def ranks_of(engine: str) -> int:
    """Processes that the tests give an engine."""
    return 1 if engine == "plain" else 2


class Runs:
    """Runs the twelve steps, in forks.

    Args:
        forks: runs them.
        folder: for those that nobody interrupts; each is made once.
    """

    def __init__(self, forks: Forks, folder: Path) -> None:
        self.forks = forks
        self._folder = folder
        self._whole: dict[str, Any] = {}

    def whole(self, engine: str = "plain", **changes: Any) -> dict[str, Any]:
        """Evidence of the uninterrupted run."""
        # When and how a run is saved must not show in what it computes.
        changes = {key: value for key, value in changes.items() if not key.startswith("checkpoint__")}
        key = json.dumps([engine, changes], sort_keys=True)
        if key not in self._whole:
            folder = self._folder / str(len(self._whole))
            ended = self.train(folder, engine, **changes)
            assert [rank.code for rank in ended] == [0] * len(ended), ended[0].err
            self._whole[key] = evidence(folder / "a")
        return dict(self._whole[key])

    def train(
        self, folder: Path, engine: str = "plain", *, resume: str = "auto", plugins: Sequence[str] = (), **options: Any
    ) -> list[Ended]:
        """`progscale train` until it ends, how ever it does.

        Args:
            folder: run.output_dir; the run is `a` in it.
            engine: decides the number of ranks.
            resume: as --resume.
            plugins: modules.
            options: of Forks.run, and changes of the config.
        """
        known = ("fault", "kill_line", "slow_save_seconds", "environment", "seconds", "ranks")
        of_forks = {key: options.pop(key) for key in known if key in options}
        arguments = ["train", *twelve(folder, engine, **options), "--resume", resume]
        arguments += [word for plugin in plugins for word in ("--plugin", plugin)]
        return self.forks.run(arguments, **{"ranks": ranks_of(engine), **of_forks})

    def finish(self, folder: Path, engine: str = "plain", **options: Any) -> None:
        """Resumes an interrupted run and sees that it computed what the uninterrupted one did, to the bit."""
        with goes_on(folder):
            ended = self.train(folder, engine, **options)
        assert [rank.code for rank in ended] == [0] * len(ended), ended[0].err
        changes = {key: value for key, value in options.items() if "__" in key}
        same(evidence(folder / "a"), self.whole(engine, **changes))
        left = leftovers(folder / "a")
        assert not left, f"left behind: {left}"


@contextmanager
def goes_on(folder: Path) -> Iterator[None]:
    """What runs within goes on from the newest checkpoint of folder/a: begun anew, it would compute the same."""
    run = folder / "a"
    saved = [step_of(path) for path in checkpoints(run)]
    has_ended, aside = (run / "summary.json").exists(), sorted(folder.glob("a.*"))
    yield
    if saved and not has_ended:
        assert sorted(folder.glob("a.*")) == aside, "it began anew"
        # One that was being replaced when the run was killed comes back, and is newer still.
        assert records(run, "resume")[-1]["step"] >= max(saved)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Two pieces of evidence are equal; says first which part of them is not."""
    assert [key for key in wanted if found[key] != wanted[key]] == []
    assert found == wanted
