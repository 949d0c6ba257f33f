"""What every engine does around its steps and switches."""

from __future__ import annotations

import weakref

import pytest

from progscale.errors import UserError
from progscale.learning_rate import LearningRate
from progscale.optim import StageBuild
from progscale.optimizers import AdamW
from tests.harness.cases import builds_of, make_engine, run
from tests.harness.moves import take_steps
from tests.tiny import tiny_model


def test_what_an_optimizer_does_not_name_is_found_at_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the end of the first stage."""
    monkeypatch.setattr(AdamW, "moments", ("exp_avg",))
    with pytest.raises(UserError, match="keeps a state 'exp_avg_sq' that is in none of its `moments`"):
        run(engine="plain", stages=1, steps=1, blocks=2)


def test_state_of_what_freezes_is_gone_before_the_next_stage_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_model("bert", blocks=2)
    engine = make_engine(module, "plain")
    _, builds = builds_of(module, "progtuning", "first_stage", 2, 2, {})
    engine.begin_stage(builds[0])
    take_steps(engine, builds[0], 8, 2, int(module.config.vocab_size), LearningRate(1e-3, "constant", 2))
    old = {piece.name: weakref.ref(shard.state["exp_avg"]) for shard in engine.shards() for piece in shard.pieces}
    alive: set[str] = set()
    build = engine._build

    def watched(following: StageBuild) -> None:
        alive.update(name for name, moment in old.items() if moment() is not None)
        build(following)

    monkeypatch.setattr(engine, "_build", watched)
    engine.begin_stage(builds[1])
    assert alive == builds[1].live < set(old)
