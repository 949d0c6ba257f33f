"""Frozen partitions of ZeRO-3 in files. (VARIANTS compare such runs with one process, on every push.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_resume import same_bits
from tests.harness.files import ENGINE, Where
from tests.harness.worker import TwoRanks
from tests.tiny import tiny_model


# The second freezes and thaws again.
@pytest.mark.parametrize(
    ("schedule", "embeddings", "options"),
    [("progtuning", "first_stage", {}), ("custom", "never", {"first_blocks": [1, 2, 0]})],
    ids=["progtuning", "thawing"],
)
def test_what_is_frozen_lies_in_files_and_what_is_live_in_memory(
    two_ranks: TwoRanks, schedule: str, embeddings: str, options: dict[str, Any]
) -> None:
    found: list[tuple[list[Where], int]] = two_ranks.run(
        "tests.harness.files:look", schedule=schedule, embeddings=embeddings, options=options
    )
    for stages, left in found:
        assert len({len(where.frozen) for where in stages}) > 1
        for where in stages:
            assert where.mapped == where.frozen
            held, planned = where.bytes
            # What the partitions of a hundred tensors are padded with.
            assert 0 <= held - planned <= 100 * 4
            assert where.mappings == len(where.mapped)
        assert left == 0, "files that nobody uses take room on the disk"


def test_loaded_into_files(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """All of it, before any engine; then the same losses as from memory, bit for bit."""
    tiny_model("bert", blocks=2).save_pretrained(tmp_path)
    bare = two_ranks.run("tests.harness.files:loaded", folder=str(tmp_path), engine="zero3-offload")
    for rank, (losses, mapped, names, seen) in enumerate(
        two_ranks.run("tests.harness.files:loaded", folder=str(tmp_path), engine=ENGINE)
    ):
        assert mapped == set(names)
        assert losses == bare[rank][0]
        assert seen, "the audit does not look into the files"
        assert bare[rank][1] == set()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.product)])
def test_stopped(two_ranks: TwoRanks, tmp_path: Path, step: int, background: bool) -> None:
    """On the end of a stage and within one; gone on with files and without."""
    case: dict[str, Any] = {"folder": str(tmp_path), "schedule": "progtuning"}
    save = "tests.harness.checkpoints:run_and_save"
    whole = two_ranks.run(save, engine=ENGINE, steps=[step], background=background, **case)[0]
    for engine in (ENGINE, "zero3-offload"):
        rest = two_ranks.run("tests.harness.checkpoints:go_on", engine=engine, step=step, **case)[0]
        same_bits(rest, whole, step)


def test_a_background_save_copies_no_files(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """They would come back into memory, and stay."""
    for copied, all_of_it in two_ranks.run("tests.harness.files:copied_for_a_save", folder=str(tmp_path)):
        assert 0 < copied < all_of_it
