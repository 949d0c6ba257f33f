"""Stopped anywhere, a run goes on as if nothing had happened: same engine bit for bit, any other engine and world size too."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.checkpoint.reader import index, open_checkpoint
from progscale.checkpoint.store import Store
from progscale.methods import METHODS
from progscale.schedule import SCHEDULES
from tests.contract.test_contracts import OPTIONS
from tests.harness import checkpoints
from tests.harness.cases import ENGINES
from tests.harness.checkpoints import STEPS, Trained
from tests.harness.refused import by_engine
from tests.harness.worker import TwoRanks

# Stages begin at 0, 2 and 4: in the middle of each, exactly on each boundary, and at the very end.
STOPS = [1, 2, 3, 4, 5, 6]
# Relative, and absolute.
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-6, 5e-5


class Runs:
    """Uninterrupted runs with their checkpoints, each made once."""

    def __init__(self, ranks: TwoRanks, root: Path) -> None:
        self.ranks = ranks
        self.root = root
        self._made: dict[str, Trained] = {}

    def folder(self, engine: str, schedule: str, **settings: Any) -> Path:
        return self.root / "-".join([engine, schedule, *map(str, settings.values())])

    def whole(self, engine: str, schedule: str, **settings: Any) -> Trained:
        folder = self.folder(engine, schedule, **settings)
        if folder.name not in self._made:
            case = {"folder": str(folder), "schedule": schedule, "steps": STOPS, "options": OPTIONS.get(schedule, {})}
            self._made[folder.name] = self.call("run_and_save", engine, **case, **settings)
        return self._made[folder.name]

    def rest(self, engine: str, schedule: str, step: int, saved_by: str | None = None, **settings: Any) -> Trained:
        folder = self.folder(saved_by or engine, schedule, **settings)
        settings.pop("background", None)
        case = {"folder": str(folder), "schedule": schedule, "step": step, "options": OPTIONS.get(schedule, {})}
        return self.call("go_on", engine, **case, **settings)

    def call(self, function: str, engine: str, **case: Any) -> Trained:
        if engine == "plain":
            return getattr(checkpoints, function)(engine=engine, **case)  # type: ignore[no-any-return]
        found: list[Trained] = self.ranks.run(f"tests.harness.checkpoints:{function}", engine=engine, **case)
        assert found[0].losses == found[1].losses
        return found[0]


@pytest.fixture(scope="module")
def runs(two_ranks: TwoRanks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(two_ranks, tmp_path_factory.mktemp("checkpoints"))


def same_bits(rest: Trained, whole: Trained, step: int) -> None:
    assert rest.states[step] == whole.states[step], "what was loaded is not what was saved"
    assert rest.losses == {at: loss for at, loss in whole.losses.items() if at >= step}
    assert rest.optimizer_steps == whole.optimizer_steps
    for name, value in whole.parameters.items():
        assert torch.equal(rest.parameters[name], value), name
    assert whole.moved == rest.moved == []


def near(rest: Trained, whole: Trained, step: int) -> None:
    assert rest.losses == pytest.approx({at: loss for at, loss in whole.losses.items() if at >= step}, rel=LOSS_TOLERANCE)
    assert rest.optimizer_steps == whole.optimizer_steps
    for name, value in whole.parameters.items():
        assert (rest.parameters[name] - value).abs().max().item() < PARAMETER_TOLERANCE, name
    assert rest.moved == []


ROUNDS = [("zero2", "zero3", "ddp"), ("zero3", "ddp", "zero1"), ("ddp", "zero2-offload", "zero3-offload")]
TIMES = [(1, 2, 4), (2, 3, 5), (1, 3, 5)]
# Each of the engines and each of the times once; the long list has all.
CHANGES = [
    pytest.param(*engines, steps, marks=[] if at == when else pytest.mark.slow)
    for at, engines in enumerate(ROUNDS)
    for when, steps in enumerate(TIMES)
]
CASES = [(engine, schedule) for engine in ENGINES for schedule in SCHEDULES.names()]
# ZeRO-3 takes as long as all others together: the ordinary list has it with these schedules.
OF_STAGE_3 = {"zero3": ("progtuning", "growing"), "zero3-offload": ("custom",)}
PAIRS = list(permutations(ENGINES, 2))


@pytest.mark.parametrize(
    ("engine", "schedule"),
    [
        pytest.param(*case, marks=[] if case[1] in OF_STAGE_3.get(case[0], SCHEDULES.names()) else pytest.mark.product)
        for case in CASES
    ],
)
def test_stopped(runs: Runs, engine: str, schedule: str) -> None:
    """In the middle of a stage, and exactly on a boundary."""
    number = CASES.index((engine, schedule))
    stopped(runs, engine, schedule, [[1, 4], [2, 3], [2, 5]][number % 3])


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "schedule"), CASES)
def test_stopped_anywhere(runs: Runs, engine: str, schedule: str) -> None:
    stopped(runs, engine, schedule, STOPS)


def stopped(runs: Runs, engine: str, schedule: str, steps: list[int]) -> None:
    """Dropout is on: its masks too are those of the run that was never stopped."""
    # Half of the cases write in the background.
    settings = {"background": (list(ENGINES).index(engine) + SCHEDULES.names().index(schedule)) % 2 == 0}
    whole = runs.whole(engine, schedule, **settings)
    assert len(whole.losses) == STEPS
    for step in steps:
        same_bits(runs.rest(engine, schedule, step, **settings), whole, step)


METHOD_CASES = [
    pytest.param(engine, method, marks=pytest.mark.product if engine.endswith("offload") else [])
    for engine in ENGINES
    for method in METHODS.names()
    if method != "full" and by_engine(method, engine) is None
]


@pytest.mark.parametrize(("engine", "method"), METHOD_CASES)
def test_a_method_is_stopped(runs: Runs, engine: str, method: str) -> None:
    """All that it added and quantised is in the checkpoint, frozen or not: the model that goes on begins with other weights."""
    whole = runs.whole(engine, "progtuning", method=method)
    for step in (2, 3):
        same_bits(runs.rest(engine, "progtuning", step, method=method), whole, step)


@pytest.mark.parametrize(("saved_by", "engine"), [("zero2", "ddp"), ("ddp", "zero3"), ("zero3", "plain"), ("plain", "zero1")])
@pytest.mark.parametrize("options", [{"init": "pissa", "rank": 4}, {"dora": True}], ids=str)
def test_a_method_goes_on_in_another_engine(runs: Runs, saved_by: str, engine: str, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"method": "lora", "method_options": options, "dropout": 0.0}
    whole = runs.whole(saved_by, "progtuning", **settings)
    near(runs.rest(engine, "progtuning", 3, saved_by=saved_by, **settings), whole, 3)


@pytest.mark.parametrize(("saved_by", "engine"), PAIRS)
def test_another_engine_goes_on(runs: Runs, saved_by: str, engine: str) -> None:
    """Any engine reads what any other wrote; "plain" is one process, the others are two."""
    step = (1, 2, 3, 5)[PAIRS.index((saved_by, engine)) % 4]
    goes_on(runs, saved_by, engine, step)


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "engine"), PAIRS)
def test_another_engine_goes_on_anywhere(runs: Runs, saved_by: str, engine: str) -> None:
    """In every stage and on every boundary."""
    for step in STOPS:
        goes_on(runs, saved_by, engine, step)


def goes_on(runs: Runs, saved_by: str, engine: str, step: int) -> None:
    whole = runs.whole(saved_by, "progtuning", dropout=0.0)
    rest = runs.rest(engine, "progtuning", step, saved_by=saved_by, dropout=0.0)
    assert rest.states[step] == whole.states[step], "what was loaded is not what was saved"
    near(rest, whole, step)
    if {saved_by, engine} == {"zero1", "zero2"}:
        # The norm is summed in another order; where nothing is clipped it decides nothing. (Under ZeRO-3 the flat buffers
        # begin elsewhere, and the vectorised optimizer rounds the elements at their ends in another way.)
        unclipped: dict[str, Any] = {"dropout": 0.0, "max_grad_norm": None}
        whole = runs.whole(saved_by, "progtuning", **unclipped)
        same_bits(runs.rest(engine, "progtuning", step, saved_by=saved_by, **unclipped), whole, step)


@pytest.mark.parametrize(("two", "three", "back", "steps"), CHANGES)
def test_more_and_fewer_ranks(
    runs: Runs, three_ranks: TwoRanks, tmp_path: Path, two: str, three: str, back: str, steps: tuple[int, int, int]
) -> None:
    """Two ranks, then one, three, and two again: a run that nobody stopped computes the same."""
    whole = runs.whole("plain", "progtuning", dropout=0.0)
    case: dict[str, Any] = {"folder": str(tmp_path), "schedule": "progtuning", "dropout": 0.0}
    first, second, third = steps
    parts = [
        runs.call("run_and_save", two, steps=[first], **case),
        runs.call("go_on", "plain", step=first, steps=[second], **case),
        three_ranks.run("tests.harness.checkpoints:go_on", engine=three, step=second, steps=[third], **case)[0],
        runs.call("go_on", back, step=third, **case),
    ]
    for part in parts:
        near(part, whole, min(part.losses))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "plain"])
def test_three_ranks(runs: Runs, three_ranks: TwoRanks, tmp_path: Path, engine: str, step: int) -> None:
    """Every engine, in every stage: from one rank to three, and from three to two."""
    whole = runs.whole("plain", "progtuning", dropout=0.0)
    case: dict[str, Any] = {"folder": str(tmp_path), "schedule": "progtuning", "dropout": 0.0}
    runs.call("run_and_save", "plain", steps=[step], **case)
    near(three_ranks.run("tests.harness.checkpoints:go_on", engine=engine, step=step, **case)[0], whole, step)
    case["folder"] = str(tmp_path / "three")
    three_ranks.run("tests.harness.checkpoints:run_and_save", engine=engine, steps=[step], **case)
    near(runs.call("go_on", "zero3" if engine == "ddp" else "ddp", step=step, **case), whole, step)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_masters_are_kept(runs: Runs, engine: str) -> None:
    """bf16 parameters with fp32 masters: the masters go on, not what the model shows of them."""
    whole = runs.whole(engine, "progtuning", precision="bf16_params")
    for step in (1, 2, 3):
        same_bits(runs.rest(engine, "progtuning", step, precision="bf16_params"), whole, step)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_the_loss_scale_goes_on(runs: Runs, engine: str) -> None:
    whole = runs.whole(engine, "progtuning", precision="fp16")
    same_bits(runs.rest(engine, "progtuning", 3, precision="fp16"), whole, 3)


def test_what_one_rank_finds_all_ranks_refuse(runs: Runs) -> None:
    """They share the files to be hashed; each of the damaged ones is read by one rank alone."""
    runs.whole("zero2", "progtuning", dropout=0.0)
    folder = runs.folder("zero2", "progtuning", dropout=0.0)
    where: dict[str, Any] = {"folder": str(folder), "step": 3}
    assert runs.ranks.run("tests.harness.checkpoints:refusal", **where) == ["", ""]
    shards = sorted(Store(folder).path_of(3).glob("*.safetensors"))
    assert {path.name[:9] for path in shards} == {"rank00000", "rank00001"}
    for path in shards:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        first, second = runs.ranks.run("tests.harness.checkpoints:refusal", **where)
        assert first == second
        assert f"{path.name} is damaged" in first
        path.write_bytes(content)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_element_is_stored_once(runs: Runs, engine: str) -> None:
    """Equal shares: no rank writes what another writes, and none the whole."""
    runs.whole(engine, "progtuning", dropout=0.0)
    checkpoint = open_checkpoint(Store(runs.folder(engine, "progtuning", dropout=0.0)).path_of(3))
    live = checkpoint.state["parameters"]
    by_rank: Counter[int] = Counter()
    for part in index(checkpoint):
        by_rank[int(part.path.name[4:9])] += part.end - part.start
    assert by_rank.total() == sum(live.values())
    assert max(by_rank.values()) <= 1.1 * min(by_rank.values())
