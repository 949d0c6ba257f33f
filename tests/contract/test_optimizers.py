"""Other optimizers than AdamW keep the contracts; on one process they are bitsandbytes as one writes it by hand."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from progscale.engine.launch import set_up_cpu
from progscale.optimizers import OPTIMIZERS
from tests.contract.test_moving_state import one_then_none
from tests.contract.test_resume import same_bits
from tests.harness import checkpoints
from tests.harness.cases import ENGINES, Outcome, global_batch, run
from tests.harness.checkpoints import Trained
from tests.harness.moves import Moved
from tests.harness.worker import TwoRanks
from tests.tiny import tiny_model

# Wide enough that matrices have the 4,096 elements from which on their state is quantised, and with them every flat shard.
CASE: dict[str, Any] = {"schedule": "progtuning", "embeddings": "first_stage", "stages": 3, "steps": 6, "blocks": 3, "width": 64}
FORCED = CASE | {"schedule": "none", "embeddings": "always"}
OTHERS = [name for name in OPTIMIZERS.names() if name != "adamw"]
DISTRIBUTED = [name for name in ENGINES if name != "plain"]
# Each optimizer on the plain engine, AdamW in 8 bits on all, and the rest under two or three of the others.
CONTRACTS = [("plain", name) for name in OTHERS]
CONTRACTS += [(engine, "adamw_8bit") for engine in DISTRIBUTED]
CONTRACTS += [
    ("zero1", "lion_8bit"),
    ("zero2-offload", "lion_8bit"),
    ("zero3", "lion_8bit"),
    ("ddp", "lion"),
    ("zero3", "lion"),
    ("zero2", "paged_adamw"),
    ("zero3-offload", "paged_adamw"),
]
RATE = 1e-3
# What quantising once more does to a moment, relative (L2): more to one that shares a block with larger ones.
ROUNDING = 0.1


def train(two_ranks: TwoRanks, engine: str, **case: Any) -> Outcome:
    if engine == "plain":
        return run(engine=engine, **case)
    outcomes: list[Outcome] = two_ranks.run("tests.harness.cases:run", engine=engine, **case)
    assert outcomes[0].losses == outcomes[1].losses
    return outcomes[0]


@cache
def alone(optimizer: str, **changes: Any) -> Outcome:
    """The run on one process."""
    return run(engine="plain", optimizer=optimizer, **{**CASE, **changes})


def largest_gap(outcome: Outcome, expected: Outcome) -> float:
    return max((outcome.parameters[name] - value).abs().max().item() for name, value in expected.parameters.items())


@pytest.mark.parametrize(("engine", "optimizer"), CONTRACTS)
def test_contracts(two_ranks: TwoRanks, engine: str, optimizer: str) -> None:
    outcome = alone(optimizer) if engine == "plain" else train(two_ranks, engine, optimizer=optimizer, **CASE)
    assert outcome.frozen_changed == [[], [], []]
    assert outcome.frozen_with_gradient == [[], [], []]
    assert outcome.live_unmoved == [[], [], []]
    assert outcome.state_names == outcome.live_names
    assert outcome.updated == outcome.planned
    assert outcome.carried == ["none", "shards", "shards"]
    agrees(outcome, alone(optimizer), engine, optimizer)


def agrees(outcome: Outcome, expected: Outcome, engine: str, optimizer: str) -> None:
    """How near to one process, by what can differ.

    Blocks of 256 elements are cut out of flat shards, and begin elsewhere under ZeRO: another element may then be the largest of
    a block, and all others are rounded in another way. One step of Adam moves an element by up to the learning rate whatever the
    size of its gradient, so a moment near 0 that is rounded away, or not, shows as a part of a step: of an element, never of the
    mean. Lion takes the sign: where the gradient is nothing but rounding (a key's bias), each engine goes its own way.
    """
    steps = sum(rate > 0 for rate in outcome.learning_rates)
    if optimizer.startswith("lion"):
        assert outcome.losses == pytest.approx(expected.losses, abs=1e-5)
        assert largest_gap(outcome, expected) <= 2 * steps * RATE
    elif optimizer == "paged_adamw":
        assert outcome.losses == pytest.approx(expected.losses, abs=2e-6)
        assert largest_gap(outcome, expected) < 5e-5
    else:
        assert outcome.losses == pytest.approx(expected.losses, abs=2e-6 if engine == "ddp" else 1e-3)
        assert largest_gap(outcome, expected) <= 2 * steps * RATE
        for name, value in expected.parameters.items():
            assert (outcome.parameters[name] - value).abs().mean().item() < 2e-4, name


def by_hand(optimizer: str, first_blocks: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The run as one writes it with bitsandbytes and without progscale; frozen tensors have no gradient."""
    import bitsandbytes

    set_up_cpu(1)
    kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "AdamW8bit", "paged_adamw": "AdamW", "lion": "Lion"}
    kind = getattr(bitsandbytes.optim, {**kinds, "lion_8bit": "Lion8bit"}[optimizer])
    module = tiny_model("bert", blocks=3, hidden_size=64)
    config: PreTrainedConfig = module.config
    module.train()
    named = dict(module.named_parameters())
    decayed = [value for value in named.values() if value.dim() > 1]
    plain = [value for value in named.values() if value.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    made = kind(groups, lr=1.0, betas=(0.9, 0.999))
    losses = []
    for step in range(6):
        stage = step * 3 // 6
        tokens, labels = global_batch(step, 8, config.vocab_size)
        logits = module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        # Torch's own mean of the batch rounds in another way.
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum() / 8
        loss.backward()
        for name, value in named.items():
            block = re.search(r"encoder\.layer\.(\d+)\.", name)
            if (block and int(block[1]) < first_blocks[stage]) or ("embeddings" in name and stage > 0):
                value.grad = None
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in made.param_groups:
            group["lr"] = 0.0 if step == 0 else RATE * (0.1 + 0.9 * (1 - (step - 1) / 5))
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize("optimizer", OTHERS)
def test_the_reference_is_what_one_writes_by_hand(optimizer: str) -> None:
    """In one batch of 8 rows, as by hand: the same to the bit."""
    losses, parameters = by_hand(optimizer, [0, 1, 2])
    outcome = alone(optimizer, micro=8)
    assert outcome.losses == losses
    for name, value in parameters.items():
        assert torch.equal(outcome.parameters[name], value), name


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit"])
def test_moments_are_really_in_8_bits(optimizer: str) -> None:
    """And yet near AdamW and Lion in full precision."""
    full = alone("adamw" if optimizer == "adamw_8bit" else "lion")
    outcome = alone(optimizer)
    assert largest_gap(outcome, full) > 1e-5
    assert outcome.losses == pytest.approx(full.losses, abs=2e-3)
    assert outcome.losses[-1] < 0.75


@pytest.mark.parametrize(("engine", "optimizer"), [*((engine, "adamw_8bit") for engine in ENGINES), ("zero2", "lion_8bit")])
def test_a_forced_switch_changes_nothing(two_ranks: TwoRanks, engine: str, optimizer: str) -> None:
    """Codes, scales and step counts are handed over as they are."""
    never = train(two_ranks, engine, optimizer=optimizer, **FORCED)
    forced = train(two_ranks, engine, optimizer=optimizer, force=True, **FORCED)
    assert (never.carried, forced.carried) == (["none"] * 3, ["none", "shards", "shards"])
    assert forced.losses == never.losses
    for name, value in never.parameters.items():
        assert torch.equal(forced.parameters[name], value), name


@pytest.mark.parametrize("engine", ["zero2", "zero3-offload"])
def test_eight_stages_leave_one_engine_and_then_none(two_ranks: TwoRanks, engine: str) -> None:
    for left in two_ranks.run("tests.harness.moves:many_stages", engine=engine, count=8, optimizer="adamw_8bit"):
        one_then_none(left, of_stage3=int(engine.startswith("zero3")))


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("plain", "bf16"),
        ("plain", "fp16"),
        ("zero1", "bf16_params"),
        ("zero2", "fp16"),
        ("zero3", "bf16_params"),
        ("zero3", "bf16"),
    ],
)
def test_16_bits_beside_8(two_ranks: TwoRanks, engine: str, precision: str) -> None:
    outcome = train(two_ranks, engine, optimizer="adamw_8bit", precision=precision, **CASE)
    assert outcome.frozen_changed == [[], [], []]
    assert outcome.live_unmoved == [[], [], []], "judged on the fp32 masters"
    assert outcome.updated == outcome.planned
    assert outcome.losses == pytest.approx(alone("adamw_8bit").losses, abs=2e-2)


@pytest.mark.parametrize(
    ("first", "second", "schedule"),
    [
        ("ddp", "zero3", "none"),
        ("zero3", "ddp", "progtuning"),
        ("zero2", "zero3", "growing"),
        ("zero3-offload", "zero1", "none"),
        ("zero1", "zero2", "progtuning"),
    ],
)
def test_another_engine_goes_on(two_ranks: TwoRanks, first: str, second: str, schedule: str) -> None:
    """In one run: what lies in other blocks is quantised anew, and close; what does not, keeps its codes."""
    case = {"schedule": schedule, "width": 64, "optimizer": "adamw_8bit"}
    moves: list[Moved] = two_ranks.run("tests.harness.moves:carry", first=first, second=second, **case)
    expected = run(engine="plain", stages=2, steps=6, blocks=4, **case)  # type: ignore[arg-type]
    moved = moves[0]
    assert moved.losses == pytest.approx(expected.losses, abs=2e-3)
    for name, step in moved.steps_after.items():
        assert step == (0 if name in moved.thawed else 3), name
    assert bool(moved.thawed) == (schedule == "growing")
    assert moved.largest_moment_of_thawed == 0.0
    # ZeRO 1 and 2 lay their shards out alike.
    alike = {first, second} == {"zero1", "zero2"}
    assert (sum(one.requantized for one in moves) == 0) == alike
    assert moments_error(moved.moments_before, moved.moments_after) < (1e-12 if alike else ROUNDING)


def moments_error(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The largest relative error (L2) of a moment; 1 where it is lost."""
    errors = {
        key: float((value - before[key]).norm() / before[key].norm())
        for key, value in after.items()
        if before.get(key) is not None
    }
    assert errors
    return max(errors.values())


class Saved:
    """Runs saved at one step, each made once."""

    def __init__(self, ranks: TwoRanks, root: Path) -> None:
        self.ranks = ranks
        self.root = root
        self._made: dict[str, Trained] = {}

    def folder(self, engine: str, step: int, **settings: Any) -> Path:
        return self.root / "-".join([engine, str(step), *map(str, settings.values())])

    def whole(self, engine: str, step: int, *, background: bool = False, **settings: Any) -> Trained:
        folder = self.folder(engine, step, **settings)
        if folder.name not in self._made:
            # Files that cut the shards, in the middle of blocks too.
            case = {"folder": str(folder), "steps": [step], "shard_bytes": 50_001, "background": background, **settings}
            self._made[folder.name] = self.call(self.ranks, "run_and_save", engine, **case)
        return self._made[folder.name]

    def rest(self, engine: str, step: int, saved_by: str, ranks: TwoRanks | None = None, **settings: Any) -> Trained:
        folder = self.folder(saved_by, step, **settings)
        return self.call(ranks or self.ranks, "go_on", engine, folder=str(folder), step=step, **settings)

    def call(self, ranks: TwoRanks, function: str, engine: str, **case: Any) -> Trained:
        case = {"schedule": "progtuning", "width": 64, **case}
        if engine == "plain":
            return getattr(checkpoints, function)(engine=engine, **case)  # type: ignore[no-any-return]
        found: list[Trained] = ranks.run(f"tests.harness.checkpoints:{function}", engine=engine, **case)
        assert len({tuple(one.losses.values()) for one in found}) == 1
        return found[0]


@pytest.fixture(scope="module")
def saved(two_ranks: TwoRanks, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(two_ranks, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(
    ("engine", "optimizer", "step"),
    [
        *((engine, "adamw_8bit", (1, 2, 3, 5)[index % 4]) for index, engine in enumerate(ENGINES)),
        ("zero2", "lion_8bit", 4),
        ("zero3", "lion", 3),
        ("ddp", "paged_adamw", 3),
        ("plain", "paged_adamw_8bit", 3),
    ],
)
def test_stopped(saved: Saved, engine: str, optimizer: str, step: int) -> None:
    """With dropout, in the middle of a stage and on a boundary: bit for bit the run that nobody stopped."""
    whole = saved.whole(engine, step, optimizer=optimizer, background=step % 2 == 0)
    rest = saved.rest(engine, step, saved_by=engine, optimizer=optimizer)
    assert rest.requantized == 0
    same_bits(rest, whole, step)


@pytest.mark.parametrize(
    ("saved_by", "engine", "step"),
    [
        ("plain", "zero2", 3),
        ("zero2", "plain", 3),
        ("zero3", "zero2-offload", 1),
        ("plain", "zero3-offload", 3),
        ("zero2", "zero3", 1),
    ],
)
def test_another_layout_reads_it(saved: Saved, saved_by: str, engine: str, step: int) -> None:
    """Another engine, and in part another number of processes: close, and it is told how many values changed."""
    whole = saved.whole(saved_by, step, optimizer="adamw_8bit", dropout=0.0)
    rest = saved.rest(engine, step, saved_by=saved_by, optimizer="adamw_8bit", dropout=0.0)
    assert rest.requantized > 0
    close(rest, whole, step)


@pytest.mark.parametrize(("saved_by", "engine"), [("plain", "ddp"), ("ddp", "plain"), ("zero2", "zero1"), ("zero2", "zero3")])
def test_the_same_blocks_are_the_same_values(saved: Saved, saved_by: str, engine: str) -> None:
    """What is left of the model at step 3 has sizes that are multiples of a block's: ZeRO 2 and 3 cut it into the same ones."""
    whole = saved.whole(saved_by, 3, optimizer="adamw_8bit", dropout=0.0)
    rest = saved.rest(engine, 3, saved_by=saved_by, optimizer="adamw_8bit", dropout=0.0)
    assert rest.requantized == 0
    assert rest.states[3] == whole.states[3]
    close(rest, whole, 3)


def close(rest: Trained, whole: Trained, step: int) -> None:
    assert moments_error(whole.moments[step], rest.moments[step]) < ROUNDING
    assert rest.losses == pytest.approx({at: loss for at, loss in whole.losses.items() if at >= step}, abs=2e-3)
    assert rest.optimizer_steps == whole.optimizer_steps
    assert rest.moved == []


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_three_ranks_read_it(saved: Saved, three_ranks: TwoRanks, engine: str) -> None:
    """The shards of three are smaller: some are quantised no more."""
    whole = saved.whole(engine, 3, optimizer="adamw_8bit", dropout=0.0)
    rest = saved.rest(engine, 3, saved_by=engine, ranks=three_ranks, optimizer="adamw_8bit", dropout=0.0)
    assert rest.requantized > 0
    close(rest, whole, 3)
