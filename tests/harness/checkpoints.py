"""Runs that are saved at many steps, and go on from any of them in a new model and a new engine. Runs in each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from progscale.checkpoint.reader import load_optimizer, load_weights, verify_together
from progscale.checkpoint.saver import Saver
from progscale.checkpoint.store import Store
from progscale.engine.base import Engine, digest
from progscale.errors import RejectedError
from progscale.layers import seeded
from progscale.learning_rate import LearningRate
from progscale.loop import seed_step
from progscale.optim import StageBuild
from tests.harness.cases import builds_of, make_engine, row_loss, share
from tests.harness.moves import everywhere, moments_of, steps_by_name, values_of
from tests.harness.sending import gathered
from tests.tiny import method_for, tiny_model

STAGES, STEPS, BLOCKS, ROWS, MICRO = 3, 6, 4, 8, 4


@dataclass
class Trained:
    """What a run, or the rest of one, showed on this rank.

    Attributes:
        losses: by step.
        optimizer_steps: that the optimizer has taken on each parameter that is live at the end.
        moved: names of frozen parameters that changed in their stage; must stay empty.
        elements: that this rank stores of the model.
        states: by the step after which it was saved, or loaded: the bits of weights, moments and step counts, as hashes.
        moments: of an optimizer in 8 bits, by the same steps, in full precision.
        requantized: values of moments in 8 bits that were quantised anew when it was loaded.
    """

    losses: dict[int, float] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer_steps: dict[str, int] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    elements: int = 0
    states: dict[int, dict[str, str]] = field(default_factory=dict)
    moments: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    requantized: int = 0


def make(
    engine: str,
    schedule: str,
    options: dict[str, Any],
    seed: int,
    method: str = "full",
    method_options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Engine, tuple[StageBuild, ...]]:
    """A tiny model with dropout in an engine, and the builds of its stages."""
    embeddings = "first_stage" if schedule == "progtuning" else "always"
    dropout, family = settings.pop("dropout", 0.1), settings.pop("family", "bert")
    width = {"hidden_size": settings.pop("width")} if "width" in settings else {}
    trained = method_for(family, method, **(method_options or {}))
    with seeded(seed):
        module = trained.prepare(tiny_model(family, blocks=BLOCKS, seed=seed, dropout=dropout, **width)).train()
    _, builds = builds_of(module, schedule, embeddings, STAGES, STEPS, options, trained)
    return make_engine(module, engine, **settings), builds


def train(engine: Engine, build: StageBuild, first: int, trained: Trained, saver: Saver | None, saved: Sequence[int]) -> None:
    """The steps of a stage from `first` on, saved after those in `saved`; frozen tensors are watched."""
    curve = LearningRate(1e-3, "linear", STEPS, warmup_steps=1, final_fraction=0.1)
    frozen = [name for name in engine.parameters if name not in build.live]
    before = engine.digests(frozen)
    vocabulary = int(engine.module.config.vocab_size)  # type: ignore[union-attr, arg-type]
    for step in range(first, build.stage.end_step):
        seed_step(7, step, engine.rank)
        batches = share(step, ROWS, vocabulary, engine.rank, engine.world_size, MICRO)
        trained.losses[step] = engine.train_step(batches, ROWS, row_loss, curve(step)).loss
        if saver is not None and step + 1 in saved:
            save(engine, saver, step + 1, build)
            note(engine, trained, step + 1)
    after = engine.digests(frozen)
    trained.moved += [name for name in frozen if before[name] != after[name]]


def note(engine: Engine, trained: Trained, step: int) -> None:
    """Keeps what the state is at a step."""
    trained.states[step] = state_of(engine)
    if engine.settings.optimizer.blockwise:
        trained.moments[step] = moments_of(engine.shards(), engine)


def state_of(engine: Engine) -> dict[str, str]:
    """A hash of each whole tensor of the state, put together from all ranks' slices: parameter and kind → bits."""
    own = [
        (part.name, part.start, values_of(part, engine.settings.optimizer), dict(part.scalars)) for part in engine.own_slices()
    ]
    parts = sorted((part for ranks in gathered(engine, own) for part in ranks), key=lambda part: part[:2])
    whole: dict[str, list[torch.Tensor]] = {}
    for name, _, tensors, scalars in parts:
        for key, value in {**tensors, **{key: torch.tensor([value]) for key, value in scalars.items()}}.items():
            if key not in scalars or f"{name} {key}" not in whole:
                whole.setdefault(f"{name} {key}", []).append(value)
    return {key: digest(torch.cat(values)) for key, values in whole.items()}


def save(engine: Engine, saver: Saver, step: int, build: StageBuild) -> None:
    """A checkpoint with as much of a run's state as these runs need."""
    state = {
        "step": step,
        "stage": build.stage.index,
        "loss_scale": engine.scaler_state(),
        "parameters": engine.sizes(),
    }
    saver.save(step, state)
    saver.finish()


def run_and_save(
    engine: str,
    folder: str,
    schedule: str,
    steps: Sequence[int],
    options: dict[str, Any] | None = None,
    background: bool = False,
    shard_bytes: int = 20_000,
    **settings: Any,
) -> Trained:
    """The whole run, saved after each of `steps`."""
    made, builds = make(engine, schedule, dict(options or {}), seed=0, **settings)
    saver = Saver(made, Store(Path(folder), keep=100), shard_bytes=shard_bytes, background=background)
    trained = Trained()
    for build in builds:
        made.begin_stage(build)
        saver.reserve()
        train(made, build, build.stage.start_step, trained, saver, steps)
    return finish(made, trained)


def refusal(folder: str, step: int) -> str:
    """What all ranks are told when the checkpoint of `step` is not whole; "" when it is."""
    try:
        verify_together(Store(Path(folder)).path_of(step))
    except RejectedError as error:
        return str(error)
    return ""


def go_on(
    engine: str,
    folder: str,
    schedule: str,
    step: int,
    options: dict[str, Any] | None = None,
    steps: Sequence[int] = (),
    **settings: Any,
) -> Trained:
    """The rest of the run from the checkpoint of `step`, in a model that begins with other weights; saved again at `steps`."""
    made, builds = make(engine, schedule, dict(options or {}), seed=1, **settings)
    saver = Saver(made, Store(Path(folder), keep=100), shard_bytes=20_000)
    checkpoint = verify_together(Store(Path(folder)).path_of(step))
    trained = Trained()
    for build in builds:
        if build.stage.index < checkpoint.state["stage"]:
            continue
        if made.build is None:
            load_weights(checkpoint, made)
            made.begin_stage(build)
            trained.requantized = load_optimizer(checkpoint, made)
            note(made, trained, step)
            if made.scales_loss and checkpoint.state["loss_scale"] is not None:
                made.load_scaler_state(checkpoint.state["loss_scale"])
        else:
            made.begin_stage(build)
        train(made, build, max(step, build.stage.start_step), trained, saver, steps)
    return finish(made, trained)


def finish(engine: Engine, trained: Trained) -> Trained:
    """Weights and step counts at the end; the engine is closed."""
    trained.parameters = everywhere(engine)
    trained.optimizer_steps = steps_by_name(engine)
    trained.elements = sum(part.end - part.start for part in engine.own_slices())
    engine.close()
    return trained
