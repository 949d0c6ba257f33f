"""From a config and its ranks to the way in which frozen blocks are run, and how often rows come again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from progscale.cache import Nodes, Repeats, check_cache, nodes_of
from progscale.config import Cache, Config, Schedule, Train
from progscale.engine import ranks
from progscale.errors import ScheduleError
from progscale.launcher import VARIABLES
from progscale.plan import plan_for
from progscale.schedule import Stage
from progscale.session import Session


def nodes(monkeypatch: pytest.MonkeyPatch, world_size: int, rank: int, mine: dict[str, str], others: list[int]) -> Nodes:
    for key in (*VARIABLES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in mine.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(ranks, "gather_objects", lambda thing: [thing, *others])
    accelerator: Any = SimpleNamespace(num_processes=world_size, process_index=rank)
    return nodes_of(accelerator)


def test_nodes_as_launchers_tell_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = nodes(monkeypatch, 4, 2, {"LOCAL_WORLD_SIZE": "2"}, [2, 2, 2])
    assert (torchrun.count, torchrun.own) == (2, 1)
    assert nodes(monkeypatch, 4, 2, {"LOCAL_SIZE": "4"}, [4, 4, 4]).count == 1, "DeepSpeed's launcher"
    assert nodes(monkeypatch, 1, 0, {}, []) == Nodes()


def test_nodes_of_unequal_size_are_one_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 ranks and 2: from the one node it looks like six nodes of one rank, from the other like three of two."""
    for local, rank in (("4", 0), ("2", 5)):
        assert nodes(monkeypatch, 6, rank, {"LOCAL_WORLD_SIZE": local}, [4, 4, 4, 2, 2]) == Nodes(6, 1, rank)


@pytest.mark.parametrize(
    ("schedule", "embeddings", "refused"), [("growing", "never", True), ("progtuning", "first_stage", False)]
)
def test_a_prefix_that_shrinks_is_refused(schedule: str, embeddings: Any, refused: bool) -> None:
    plan = plan_for("bert-base-uncased", schedule=schedule, embeddings=embeddings)
    check_cache(Config(), plan)
    config = Config(schedule=Schedule(name=schedule), cache=Cache(storage="ram"))
    if not refused:
        check_cache(config, plan)
        return
    with pytest.raises(
        ScheduleError, match=r"cache\.storage: 'ram', while stage 2 of 'growing' trains blocks that were frozen in"
    ):
        check_cache(config, plan)


def session(evaluate: str, ends: list[int], steps_per_epoch: int) -> Session:
    """As far as the questions here go: stages that end before these steps."""
    made = object.__new__(Session)
    made.config = Config(train=Train(evaluate=evaluate))  # type: ignore[arg-type]
    stages = [
        Stage(n + 1, start, end, {"blocks": (0,)}, True) for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    made.builds = tuple(SimpleNamespace(stage=stage) for stage in stages)  # type: ignore[assignment]
    made.total_steps, made.steps_per_epoch = ends[-1], steps_per_epoch
    return made


@pytest.mark.parametrize(
    ("evaluate", "step", "training", "evaluation"),
    [
        ("epoch", 0, 2.5, 3),
        ("epoch", 3, 2.5, 3),
        ("epoch", 4, 1.5, 3),  # the evaluation after the first epoch is the next one
        ("epoch", 5, 1.5, 2),
        ("epoch", 13, 0.0, 0),
        ("stage", 0, 2.5, 1),
        ("stage", 7, 1.5, 1),
        ("stage", 8, 0.5, 0),
        ("end", 0, 2.5, 0),
    ],
)
def test_how_often_rows_come_again(evaluate: str, step: int, training: float, evaluation: int) -> None:
    """Three epochs and a half of four steps, in stages of seven."""
    assert session(evaluate, [7, 14], 4).repeats(step) == Repeats(training, evaluation)
