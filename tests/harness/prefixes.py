"""Runs whose frozen blocks are computed anew each time, or read from a cache. Runs in each rank."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progscale.cache import CacheSettings, EvalFeed, Feed, Nodes, PrefixCache, Repeats
from progscale.cache.cache import Costs
from progscale.compiling import Compiler
from progscale.data import MicroBatch, TrainLoader, eval_batches
from progscale.layers import seeded
from progscale.loop import seed_step
from progscale.models.loading import family_of
from progscale.plan import make_plan
from progscale.prefix import Prefix
from progscale.setup import enable_checkpointing
from progscale.tasks.base import Tokenized
from progscale.tasks.ragged import Ragged
from tests.harness.cases import builds_of, end_token, make_engine, row_loss
from tests.tiny import method_for, tiny_model

ROWS, GLOBAL, MICRO, EVALUATED = 20, 8, 2, 7
EPOCH = -(-ROWS // GLOBAL)
ALWAYS = Costs(compute=1.0, write=0.0, read=0.0, depth=1)


class Ready(PrefixCache):
    """A cache that always pays: at these sizes the clock would decide by chance."""

    def _measure(self, micro: MicroBatch, compute: float, hidden: torch.Tensor) -> Costs:
        super()._measure(micro, compute, hidden)
        return ALWAYS


@dataclass
class Outcome:
    """What a run showed on this rank.

    Attributes:
        losses: by step.
        evaluations: mean loss by the step after which it was taken.
        parameters: whole ones, on the main process.
        counts: of each stage over all ranks.
        said: by the cache.
        moved: frozen parameters that changed.
    """

    losses: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: list[dict[str, int]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)


def split_of(rows: int, *, alike: bool, seed: int, end: int | None) -> Tokenized:
    """Rows of random tokens, of one length or of many; the label is told by the second token."""
    rng = np.random.default_rng(seed)
    lengths = np.full(rows, 12) if alike else rng.integers(5, 20, rows)
    texts = [rng.integers(5, 101, length) for length in lengths]
    if end is not None:
        for text in texts:
            text[text == end] = end + 1
            text[-1] = end
    ids = Ragged.from_rows([text.tolist() for text in texts])
    return Tokenized({"input_ids": ids}, ids.lengths, {"labels": np.array([int(text[1]) % 2 for text in texts])})


def run(
    engine: str = "plain",
    storage: str | None = "ram",
    *,
    family: str = "bert",
    method: str = "full",
    schedule: str = "progtuning",
    embeddings: str = "first_stage",
    stages: int = 3,
    steps: int = 3 * EPOCH,
    alike: bool = True,
    checkpointing: bool = False,
    precision: str = "fp32",
    dtype: torch.dtype | None = None,
    local: int | None = None,
    folder: str = "",
    first: int = 0,
    last: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    starts: Sequence[int] = (),
    eager: bool = True,
    budget: int | None = None,
    config: dict[str, Any] | None = None,
    compiled: bool = False,
) -> Outcome:
    """Trains with dropout, and evaluates after each epoch.

    Args:
        engine: a key of ENGINES or VARIANTS.
        storage: of the cache; None computes the frozen blocks each time, "train" with dropout.
        alike: all rows are of one length, so that nothing is padded.
        local: ranks of a node; None puts all on one.
        folder: for storage "disk".
        first: step to begin with, of a model whose weights are still those of the beginning.
        last: step to end before, as if the run was stopped; None runs to the end.
        seed: of the weights.
        starts: steps at which the stages begin; evenly spread by default.
        eager: the cache is used whatever the clock says.
        budget: of the cache, in bytes.
        compiled: each block above the prefix, without a compiler of machine code.
    """
    trained = method_for(family, method)
    with seeded(seed):
        module = trained.prepare(tiny_model(family, blocks=4, seed=seed, dropout=0.1, **(config or {})))
    if checkpointing:
        enable_checkpointing(module)
    module.train()
    made = make_engine(module, engine, precision=precision)
    parts, builds = builds_of(
        module, schedule, embeddings, stages, steps, {**(options or {}), **({"starts": list(starts)} if starts else {})}, trained
    )
    plan = make_plan(parts, [build.stage for build in builds], trained, EPOCH)
    end = end_token(module.config)
    splits = {
        "train": split_of(ROWS, alike=alike, seed=1, end=end),
        "validation": split_of(EVALUATED, alike=alike, seed=2, end=end),
    }
    nodes = Nodes(made.world_size, local or made.world_size, made.rank)
    loader = TrainLoader(
        splits["train"],
        {"input_ids": 0},
        global_batch_size=GLOBAL,
        micro_batch_size=MICRO,
        world_size=made.world_size,
        rank=made.rank,
        nodes=nodes.count,
    )
    outcome = Outcome()
    compiler = Compiler(made, family_of(module), "aot_eager") if compiled else None
    feed: Feed = Feed()
    if storage != "train":
        feed = EvalFeed(Prefix(made, family_of(module)))
    if storage not in (None, "train"):
        settings = CacheSettings(storage, Path(folder), "the same", dtype, budget)  # type: ignore[arg-type]
        kind = Ready if eager else PrefixCache
        feed = kind(made, Prefix(made, family_of(module)), parts, splits, nodes, settings, outcome.said.append)
    for build in builds:
        if build.stage.end_step <= first:
            continue
        made.begin_stage(build)
        lowest = min(plan.stages[build.stage.index - 1].lowest_trained, next(iter(parts.num_blocks.values())))
        step = max(first, build.stage.start_step)
        if compiler is not None:
            compiler.begin_stage(lowest)
        feed.begin_stage(build.stage.index, lowest, repeats(step, steps))
        frozen = [name for name in parts.parameters if name not in build.live]
        bits = made.digests(frozen)
        while step < build.stage.end_step and step != last:
            feed.at(repeats(step, steps))
            for batch in loader.epoch(step // EPOCH, start=step % EPOCH):
                seed_step(7, step, made.rank)
                result = made.train_step(batch.micro_batches, batch.weight, row_loss, 1e-3, around=feed.around)
                outcome.losses[step] = result.loss
                step += 1
                if step % EPOCH == 0:
                    outcome.evaluations[step] = evaluate(made, feed, splits["validation"], repeats(step, steps), nodes.count)
                if step in (build.stage.end_step, last):
                    break
        after = made.digests(frozen)
        outcome.moved += [name for name in frozen if bits[name] != after[name]]
        counts = made.gather_objects(dict(feed.counts()))
        outcome.counts.append({key: sum(part[key] for part in counts) for key in counts[0]})
        if step == last:
            break
    outcome.parameters = {name: value.clone() for name, value in made.full_parameters() if value is not None}
    feed.close(finished=last is None)
    made.close()
    return outcome


def repeats(step: int, steps: int) -> Repeats:
    """Passes that are left; one evaluation after each."""
    return Repeats.after(step, steps, EPOCH, (steps - step) // EPOCH)


def evaluate(engine: Any, feed: Feed, split: Tokenized, left: Repeats, nodes: int) -> float:
    """Mean loss over a split."""
    feed.at(left)
    total = 0.0
    with engine.evaluating():
        for micro in eval_batches(split, 2, engine.world_size, engine.rank, pad={"input_ids": 0}, nodes=nodes):
            with feed.around(micro, "validation"):
                outputs = engine.forward(micro.inputs)
            total += float(row_loss(outputs, micro.labels).sum()) * micro.weight
    return sum(engine.gather_objects(total)) / len(split)


class Saved:
    """A tensor that the backward pass will want."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_below(
    engine: str, checkpointing: bool = False, method: str = "full", family: str = "bert", storage: str | None = "train"
) -> tuple[list[int], list[int], int]:
    """Where the backward pass keeps anything, in the second of three stages.

    Returns:
        For each block, low to high, the tensors saved while it ran; the same for those whose output has a graph; tensors saved
        before the first block.
    """
    trained = method_for(family, method)
    with seeded(0):
        module = trained.prepare(tiny_model(family, blocks=6, dropout=0.1))
    if checkpointing:
        enable_checkpointing(module)
    module.train()
    made = make_engine(module, engine)
    _, builds = builds_of(module, "progtuning", "first_stage", 3, 6, {}, trained)
    made.begin_stage(builds[0])
    made.begin_stage(builds[1])
    prefix = Prefix(made, family_of(module))
    if storage is None:
        prefix.freeze(2)
    graphs, inside = [0] * 6, [-1]
    hooks: list[Any] = []
    for index, block in enumerate(prefix._blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: inside.__setitem__(0, index)))

        def left(block: Any, args: Any, output: Any, index: int = index) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            graphs[index] += tensor.grad_fn is not None

        hooks.append(block.register_forward_hook(left))

    kept: list[tuple[int, weakref.ref[Saved]]] = []

    def pack(tensor: torch.Tensor) -> Saved:
        packed = Saved(tensor)
        kept.append((inside[0], weakref.ref(packed)))
        return packed

    tokens = torch.randint(5, 101, (4, 12), generator=torch.Generator().manual_seed(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor), prefix.running():
        outputs = made.forward({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    gc.collect()
    # What checkpointing looks at in passing is gone by now.
    where = [index for index, packed in kept if packed() is not None]
    saved, before = [where.count(index) for index in range(6)], where.count(-1)
    del outputs
    for hook in hooks:
        hook.remove()
    prefix.release()
    made.close()
    return saved, graphs, before


def rows_read(counts: Sequence[dict[str, int]]) -> list[int]:
    """By stage."""
    return [part.get("read", 0) for part in counts]
