"""Where rows are kept, within which budget, and what an earlier process has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progscale.cache.ledger import Nodes
from progscale.cache.room import META, CacheSettings, Room
from tests.harness.cases import make_engine
from tests.tiny import tiny_model

LENGTHS = {"train": np.array([4, 6, 2]), "validation": np.array([5])}
WIDTH = 8
# Of rows and marks.
TRAIN, VALIDATION = 12 * WIDTH * 4 + 3 * 16, 5 * WIDTH * 4 + 16


def room(folder: Path, storage: Any = "disk", budget: int | None = None, identity: str = "same", **nodes: int) -> Room:
    engine = make_engine(tiny_model("bert", blocks=1), "plain")
    settings = CacheSettings(storage, folder / "cache", identity, budget_bytes=budget)
    return Room(engine, Nodes(**nodes), settings, LENGTHS)


def digest(depth: int) -> str:
    return f"weights below {depth}"


def opened(made: Room, depth: int = 2, of: Any = digest) -> str | None:
    return made.open(WIDTH, torch.float32, of, depth)


def filled(folder: Path) -> None:
    """An earlier process, which kept two rows at depth 2 and one at 1."""
    made = room(folder)
    assert opened(made) is None
    made.note(1, digest)
    made.note(2, digest)
    made.stores["train"].write([0, 1], 2, torch.ones(2, 6, WIDTH))
    made.stores["train"].write([2], 1, torch.ones(1, 2, WIDTH))
    made.close()


def depths(made: Room) -> list[int]:
    return made.ledgers["train"].depths(0, np.arange(3)).tolist()  # type: ignore[no-any-return]


def test_as_many_splits_as_the_budget_holds(tmp_path: Path) -> None:
    for budget, names in ((TRAIN + VALIDATION, ["train", "validation"]), (TRAIN, ["train"])):
        made = room(tmp_path, "ram", budget)
        assert opened(made) is None
        assert list(made.stores) == names
        assert made.bytes == budget
    made = room(tmp_path, "ram", TRAIN - 1)
    reason = opened(made)
    assert reason is not None
    assert "the training rows need 0.00 GB: ram has 0.00 GB (cache.budget_gigabytes; " in reason
    assert not made.stores


def test_auto_goes_to_the_disk_when_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = room(tmp_path, "auto")
    assert opened(made) is None
    assert made.storage == "ram"
    made = room(tmp_path, "auto")
    monkeypatch.setattr(Room, "_free", lambda self, storage: 10**9 if storage == "disk" else TRAIN)
    assert opened(made) is None
    assert made.storage == "disk"


def test_shared_memory_is_out_of_the_file_system_at_once(tmp_path: Path) -> None:
    made = room(tmp_path, "ram", world_size=2, local=2)
    before = set(Path("/dev/shm").iterdir())
    assert opened(made) is None
    assert set(Path("/dev/shm").iterdir()) == before
    made.stores["train"].write([0], 1, torch.ones(1, 4, WIDTH))
    assert made.stores["train"].read([0], 4).sum() == 4 * WIDTH


def test_a_full_disk_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("progscale.cache.memory.os.posix_fallocate", full)
    made = room(tmp_path)
    assert str(opened(made)).endswith(": disk failed: [Errno 28] No space left on device")
    assert not made.stores


def test_rows_of_the_same_weights_are_taken_over(tmp_path: Path) -> None:
    filled(tmp_path)
    made = room(tmp_path)
    assert made.left_over()
    assert opened(made) is None
    assert depths(made) == [2, 2, 1]


def test_rows_of_other_weights_are_not(tmp_path: Path) -> None:
    filled(tmp_path)
    made = room(tmp_path)
    assert opened(made, of=lambda depth: digest(depth) if depth == 1 else "trained once more") is None
    assert depths(made) == [0, 0, 1]
    made.close()
    # They are forgotten, not only passed over.
    again = room(tmp_path)
    assert opened(again) is None
    assert depths(again) == [0, 0, 1]


def test_rows_of_a_later_stage_are_not(tmp_path: Path) -> None:
    """A checkpoint of the stage before: blocks that were frozen when they were written are trained again."""
    filled(tmp_path)
    made = room(tmp_path)
    assert opened(made, depth=1) is None
    assert depths(made) == [0, 0, 1]


@pytest.mark.parametrize("what", ["identity", "meta", "broken", "gone"])
def test_rows_that_cannot_be_told_are_not(tmp_path: Path, what: str) -> None:
    filled(tmp_path)
    meta = tmp_path / "cache" / "node-0" / META
    content = json.loads(meta.read_text())
    if what == "meta":
        meta.write_text(json.dumps({**content, "digests": ["1"]}))
    elif what == "broken":
        meta.write_text(meta.read_text()[:-5])
    elif what == "gone":
        meta.unlink()
    made = room(tmp_path, identity="other" if what == "identity" else "same")
    assert opened(made) is None
    assert depths(made) == [0, 0, 0]


def test_removed_with_what_earlier_processes_left(tmp_path: Path) -> None:
    """The folders of nodes that are still there are theirs."""
    filled(tmp_path)
    for number in (1, 2):
        (tmp_path / "cache" / f"node-{number}").mkdir()
    room(tmp_path, world_size=2, local=1).remove()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["node-1"]
    filled(tmp_path)
    room(tmp_path).remove()
    assert not (tmp_path / "cache").exists()
