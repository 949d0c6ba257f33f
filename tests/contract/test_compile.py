"""Compiled blocks: what a stage trains is trained, what it freezes stays, and no graph outlives its stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from progscale.compiling import Compiler, check_backend
from progscale.config import load_config
from progscale.engine.counting import StepCounter
from progscale.errors import ConfigError, UserError
from tests.contract.test_cache import same
from tests.contract.test_contracts import (
    STAGES,
    ZERO_GRADIENTS,
    frozen_means_frozen,
    one_and_two_processes_agree,
    reference,
    train,
)
from tests.harness import prefixes
from tests.harness.cases import builds_of, make_engine, row_loss, share
from tests.harness.worker import TwoRanks
from tests.tiny import tiny_model

MORE = ("zero1", "zero2", "zero2-offload")
CASE: dict[str, Any] = {"family": "bert", "schedule": "progtuning", "embeddings": "first_stage", "method": "full"}


SMALL = {"stages": 2, "steps": 4, "blocks": 2}


@pytest.mark.parametrize("engine", ["plain", "ddp", *(pytest.param(name, marks=pytest.mark.product) for name in MORE)])
def test_every_engine(two_ranks: TwoRanks, engine: str) -> None:
    case = CASE | SMALL
    outcome = train(None if engine == "plain" else two_ranks, engine, **case, compiled=True)
    check(outcome, reference(**case), 2)
    assert outcome.graph_breaks == 0


# Tracing takes half a minute and more.
@pytest.mark.product
@pytest.mark.parametrize(
    "other",
    [
        {"schedule": "growing"},  # a block that was frozen, and had a graph without a gradient of its weights, is trained
        {"schedule": "custom"},
        *({"method": method, "embeddings": "never"} for method in ("lora", "qlora", "bitfit")),
        *({"family": family} for family in ("modernbert", "gpt2", "t5", "longformer")),
    ],
    ids=str,
)
def test_schedules_methods_and_families(other: dict[str, Any]) -> None:
    case = {**CASE, **other}
    check(train(None, "plain", **case, compiled=True), reference(**case), STAGES, ZERO_GRADIENTS.get(case["family"]))


@pytest.mark.product
def test_with_a_cache() -> None:
    """The prefix runs as it is, and what is above it compiled; dropout is on there."""
    same(prefixes.run(compiled=True), prefixes.run(), bits=False)


@pytest.mark.product
def test_machine_code_of_every_stage() -> None:
    """With the compiler that users have, and without dropout, of which it draws its own: the losses are those without it."""
    losses = {}
    for backend in ("inductor", None):
        module = tiny_model("bert", blocks=2).train()
        engine = make_engine(module, "plain")
        parts, builds = builds_of(module, "progtuning", "always", 2, 6, {})
        compiler = Compiler(engine, prefixes.family_of(module), backend) if backend else None
        found = []
        for build in builds:
            engine.begin_stage(build)
            if compiler is not None:
                compiler.begin_stage(0)
            frozen = [name for name in parts.parameters if name not in build.live]
            bits = engine.digests(frozen)
            for step in range(build.stage.start_step, build.stage.end_step):
                found.append(engine.train_step(share(step, 8, 101, 0, 1, 4), 8, row_loss, 1e-3).loss)
            assert engine.digests(frozen) == bits
            assert engine.updated_volume() > 0
        if compiler is not None:
            compiler.close()
        engine.close()
        losses[backend] = found
    assert losses["inductor"] == pytest.approx(losses[None], abs=1e-5)
    assert losses[None][-1] != pytest.approx(losses[None][0], abs=1e-4), "nothing was learned that could differ"


def test_a_stage_begins_without_graphs() -> None:
    """Though it trains what the one before did, and its weights have the same shapes."""
    module = tiny_model("bert", blocks=1).train()
    engine = make_engine(module, "plain")
    _, builds = builds_of(module, "none", "always", 2, 4, {})
    compiler = Compiler(engine, prefixes.family_of(module), "aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    for build in builds:
        engine.begin_stage(build)
        compiler.begin_stage(0)
        for new in (True, False):
            graphs.clear()
            engine.train_step(share(0, 4, 101, 0, 1, 4), 4, row_loss, 1e-3)
            assert bool(graphs["unique_graphs"]) == new
    compiler.close()
    graphs.clear()
    engine.train_step(share(0, 4, 101, 0, 1, 4), 4, row_loss, 1e-3)
    assert not graphs, "it is compiled still"
    engine.close()


def test_counting_what_is_sent_compiles_all_the_same() -> None:
    module = tiny_model("bert", blocks=1).train()
    engine = make_engine(module, "plain")
    _, builds = builds_of(module, "none", "always", 1, 2, {})
    compiler = Compiler(engine, prefixes.family_of(module), "aot_eager")
    engine.begin_stage(builds[0])
    compiler.begin_stage(0)
    torch._dynamo.utils.counters.clear()
    with StepCounter():
        engine.train_step(share(0, 4, 101, 0, 1, 4), 4, row_loss, 1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    compiler.close()
    engine.close()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"engine": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, r"train\.compile: \"inductor\".* under ZeRO-3"),
        ({"train": {"gradient_checkpointing": True}}, r"train\.compile: .* beside train\.gradient_checkpointing = true"),
    ],
)
def test_what_cannot_be_compiled_is_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([layer, {"train": {"compile": "inductor"}}])


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    check_backend("inductor", torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
        with pytest.raises(UserError, match=r"train\.compile: 'inductor' on a CPU needs Python's headers"):
            check_backend("inductor", torch.device("cpu"))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    check_backend("off", torch.device("cpu"))
    with pytest.raises(UserError, match=r"train\.compile: 'inductor' needs a C\+\+ compiler"):
        check_backend("inductor", torch.device("cpu"))


def check(outcome: Any, expected: Any, stages: int, zero_gradients: str | None = None) -> None:
    frozen_means_frozen(outcome, zero_gradients, stages)
    one_and_two_processes_agree(outcome, expected)
    assert len(outcome.graphs) == stages
    assert all(outcome.graphs), f"a stage ran without graphs of its own: {outcome.graphs}"
