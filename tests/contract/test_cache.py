"""A run that reads what its frozen blocks gave is the run that computes it each time, whatever trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.methods import METHODS
from tests.harness import prefixes
from tests.harness.cases import ENGINES
from tests.harness.prefixes import EPOCH, MICRO, ROWS, Outcome
from tests.harness.refused import by_engine, by_family
from tests.harness.worker import TwoRanks
from tests.tiny import FAMILY_NAMES

LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-6, 5e-5
# Micro-batches of the first stage with a prefix that run from the tokens; the first of them is not kept.
PROBES = 2
METHODS_OF_ENGINES = [
    (engine, method)
    for number, engine in enumerate(ENGINES)
    for method in METHODS.names()[number % 2 :: 2]
    if method != "full" and by_engine(method, engine) is None
]
# In the second, rows are computed and then read.
TWO_STAGES: dict[str, Any] = {"stages": 2, "steps": 3 * EPOCH, "starts": [0, EPOCH]}
# A process that begins with the second epoch has blocks whose weights are still those of the beginning, as any other has.
FROZEN_FROM_THE_BEGINNING: dict[str, Any] = {
    "schedule": "custom",
    "options": {"first_blocks": [0, 2]},
    "stages": 2,
    "embeddings": "never",
    "steps": 6 * EPOCH,
    "starts": [0, EPOCH],
}


def train(ranks: TwoRanks, engine: str, storage: str | None, **case: Any) -> Outcome:
    if engine == "plain":
        return prefixes.run(engine=engine, storage=storage, **case)
    found: list[Outcome] = ranks.run("tests.harness.prefixes:run", engine=engine, storage=storage, **case)
    assert found[0].losses == found[1].losses
    assert found[0].evaluations == found[1].evaluations
    return found[0]


def ranks_of(engine: str) -> int:
    return 1 if engine == "plain" else 2


def same(cached: Outcome, plain: Outcome, *, bits: bool = True) -> None:
    assert cached.losses.keys() == plain.losses.keys()
    if bits:
        assert cached.losses == plain.losses
        assert cached.evaluations == plain.evaluations
    else:
        assert cached.losses == pytest.approx(plain.losses, rel=0, abs=LOSS_TOLERANCE)
        assert cached.evaluations == pytest.approx(plain.evaluations, rel=0, abs=LOSS_TOLERANCE)
    for name, value in plain.parameters.items():
        if bits:
            assert torch.equal(cached.parameters[name], value), name
        else:
            assert (cached.parameters[name] - value).abs().max().item() < PARAMETER_TOLERANCE, name
    assert cached.moved == plain.moved == []


@pytest.mark.parametrize(("engine", "storage"), [(engine, ("ram", "disk")[at % 2]) for at, engine in enumerate(ENGINES)])
def test_every_engine(two_ranks: TwoRanks, tmp_path: Path, engine: str, storage: str) -> None:
    """At equal padding bit for bit; two epochs to a stage, so that rows are computed, read, extended and read again."""
    case = {"steps": 5 * EPOCH, "starts": [0, EPOCH, 3 * EPOCH]}
    cached = train(two_ranks, engine, storage, folder=str(tmp_path / "cache"), **case)
    same(cached, train(two_ranks, engine, None, **case))
    probed = PROBES * MICRO * ranks_of(engine)
    first, second, third = cached.counts
    assert first == {"read": 0, "extended": 0, "computed": 0}, "everything is trained in the first stage"
    assert second == {"read": ROWS - probed // 2, "extended": 0, "computed": ROWS + probed // 2}
    assert third == {"read": ROWS, "extended": ROWS, "computed": 0}
    assert [line.partition(":")[0] for line in cached.said] == ["stage 2", "stage 3"]
    assert not (tmp_path / "cache").exists(), "files of a finished run"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family(family: str) -> None:
    """Rows of many lengths: what is padded, also by the model itself, has no part in it."""
    case: dict[str, Any] = {"family": family, "alike": False, "steps": 6 * EPOCH}
    cached = prefixes.run(storage="ram", **case)
    same(cached, prefixes.run(storage=None, **case), bits=False)
    assert [part["read"] > 0 for part in cached.counts] == [False, True, True]


@pytest.mark.parametrize(("engine", "method"), METHODS_OF_ENGINES)
def test_every_method(two_ranks: TwoRanks, engine: str, method: str) -> None:
    case = {"method": method, **TWO_STAGES, "embeddings": "never"}
    cached = train(two_ranks, engine, "ram", **case)
    same(cached, train(two_ranks, engine, None, **case))
    assert cached.counts[1]["read"] > 0


@pytest.mark.parametrize("engine", ["plain", "ddp", "zero2", "zero3", "zero3-offload"])
def test_stages_shorter_than_an_epoch(two_ranks: TwoRanks, engine: str) -> None:
    """Rows of one micro-batch are kept at several depths, and some not at all."""
    case = {"stages": 6, "steps": 3 * EPOCH, "alike": False}
    cached = train(two_ranks, engine, "ram", **case)
    same(cached, train(two_ranks, engine, None, **case), bits=False)
    assert sum(part["extended"] for part in cached.counts) > 0
    assert sum(part["read"] for part in cached.counts) > 0


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_nodes(two_ranks: TwoRanks, tmp_path: Path, engine: str) -> None:
    """Each node keeps its own rows, which come back to it; those that do not are computed there too."""
    case = {**TWO_STAGES, "local": 1}
    cached = train(two_ranks, engine, "disk", folder=str(tmp_path / "cache"), **case)
    same(cached, train(two_ranks, engine, None, **case), bits=False)
    assert cached.counts[1]["read"] > ROWS / 4
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_gradient_checkpointing(two_ranks: TwoRanks, engine: str) -> None:
    case = {"checkpointing": True, **TWO_STAGES}
    same(train(two_ranks, engine, "ram", **case), train(two_ranks, engine, None, **case))


@pytest.mark.parametrize(("engine", "precision"), [("plain", "bf16"), ("zero2", "bf16"), ("zero3", "bf16_params")])
def test_half_precision(two_ranks: TwoRanks, engine: str, precision: str) -> None:
    """Kept as the first live block receives it: float32 after a norm under autocast, bfloat16 between bfloat16 weights."""
    case = {"precision": precision, **TWO_STAGES}
    same(train(two_ranks, engine, "ram", **case), train(two_ranks, engine, None, **case))


def test_a_smaller_dtype_is_not_exact() -> None:
    case: dict[str, Any] = {"steps": 6 * EPOCH}
    exact, smaller = prefixes.run(storage="ram", **case), prefixes.run(storage="ram", dtype=torch.bfloat16, **case)
    assert exact.losses != smaller.losses
    assert exact.losses == pytest.approx(smaller.losses, abs=1e-2)


def test_dropout_of_the_frozen_blocks_is_another_run() -> None:
    assert prefixes.run(storage="train").losses != prefixes.run(storage=None).losses


@pytest.mark.parametrize("engine", ["plain", "zero3"])
def test_on_the_disk_it_survives(two_ranks: TwoRanks, tmp_path: Path, engine: str) -> None:
    """A process that begins in the second stage finds the rows that another kept there, if the weights are the same."""
    folder = str(tmp_path / "cache")
    case = {**FROZEN_FROM_THE_BEGINNING, "folder": folder}
    train(two_ranks, engine, "disk", first=EPOCH, last=2 * EPOCH, **case)
    assert list((tmp_path / "cache").rglob("*.rows")), "a run that may go on leaves its rows"
    found = train(two_ranks, engine, "disk", first=2 * EPOCH, last=3 * EPOCH, **case)
    # What is measured, and what the other did not keep.
    anew = PROBES * MICRO * ranks_of(engine) * 3 // 2
    assert found.counts[0] == {"read": ROWS - anew, "extended": 0, "computed": anew}
    same(found, train(two_ranks, engine, None, first=2 * EPOCH, last=3 * EPOCH, **case))
    other = train(two_ranks, engine, "disk", first=2 * EPOCH, last=3 * EPOCH, seed=1, **case)
    assert other.counts[0]["read"] == 0, "rows of other weights"


def test_a_torn_row_is_computed_anew(tmp_path: Path) -> None:
    case = {**FROZEN_FROM_THE_BEGINNING, "folder": str(tmp_path / "cache")}
    prefixes.run(storage="disk", first=EPOCH, last=2 * EPOCH, **case)
    (path,) = (tmp_path / "cache").rglob("train.rows")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the last row
    path.write_bytes(content)
    found = prefixes.run(storage="disk", first=2 * EPOCH, last=3 * EPOCH, **case)
    assert found.counts[0]["computed"] == PROBES * MICRO * 3 // 2 + 1
    same(found, prefixes.run(storage=None, first=2 * EPOCH, last=3 * EPOCH, **case), bits=False)


def test_what_is_read_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative side: with one value of each row changed, losses are others."""
    from progscale.cache.store import RowStore

    case: dict[str, Any] = {"steps": 6 * EPOCH}
    right, read = prefixes.run(storage="ram", **case), RowStore.read

    def wrong(store: RowStore, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = read(store, *args, **kwargs)
        hidden[:, 0, 0] += 1
        return hidden

    monkeypatch.setattr(RowStore, "read", wrong)
    assert prefixes.run(storage="ram", **case).losses != right.losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_the_backward_pass_stops(two_ranks: TwoRanks, engine: str, checkpointing: bool) -> None:
    """Below the lowest live block nothing has a graph and nothing is saved, with dropout there or without."""
    for storage in ("train", None):
        case = {"engine": engine, "checkpointing": checkpointing, "storage": storage}
        function = "tests.harness.prefixes:saved_below"
        saved, graphs, before = prefixes.saved_below(**case) if engine == "plain" else two_ranks.run(function, **case)[0]
        assert saved[:2] == graphs[:2] == [0, 0]
        assert before == 0
        assert all(saved[2:])
        assert all(graphs[2:])


@pytest.mark.parametrize("method", [name for name in METHODS.names() if by_family(name, "bert") is None])
def test_the_backward_pass_stops_for_every_method(method: str) -> None:
    saved, graphs, before = prefixes.saved_below("plain", method=method)
    assert (saved[:2], graphs[:2], before) == ([0, 0], [0, 0], 0)
    assert all(graphs[2:])
