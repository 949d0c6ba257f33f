"""Rows in memory: what is written is read, what is torn is not, and a full disk is a reason and no crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from progscale.cache.memory import Memory, reserve
from progscale.cache.store import RowStore

LENGTHS = np.array([3, 1, 5, 2])


def store_in(path: Path | None, dtype: torch.dtype = torch.float32, *, hashed: bool = True) -> RowStore:
    size = RowStore.size_of(LENGTHS, 4, dtype)
    return RowStore(Memory(size, path, create=True), LENGTHS, 4, dtype, hashed=hashed)


def hidden(rows: list[int], length: int = 5) -> torch.Tensor:
    return torch.randn(len(rows), length, 4, generator=torch.Generator().manual_seed(sum(rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_file", [False, True])
def test_rows_come_back_without_padding(tmp_path: Path, dtype: torch.dtype, in_file: bool) -> None:
    store = store_in(tmp_path / "rows" if in_file else None, dtype)
    written = hidden([2, 0])
    store.write([2, 0], 1, written)
    read = store.read([0, 2], 6)
    assert read.dtype == dtype
    assert torch.equal(read[0, :3], written[1, :3].to(dtype))
    assert torch.equal(read[1, :5], written[0].to(dtype))
    assert not read[0, 3:].any()
    assert not read[1, 5:].any()
    assert store.verify([0, 1, 2, 3]).tolist() == [1, 0, 1, 0]


def test_another_process_finds_what_was_kept(tmp_path: Path) -> None:
    first = store_in(tmp_path / "rows")
    first.write([1, 3], 2, hidden([1, 3]))
    kept = first.read([1, 3], 2)
    first.close()
    again = store_in(tmp_path / "rows")
    assert again.verify([0, 1, 2, 3]).tolist() == [0, 2, 0, 2]
    assert torch.equal(again.read([1, 3], 2), kept)


def test_a_row_that_is_not_whole_is_forgotten(tmp_path: Path) -> None:
    store = store_in(tmp_path / "rows")
    store.write([0, 2], 1, hidden([0, 2]))
    store._values[4, 0] += 1  # of row 2, which begins after four tokens
    assert store.verify([0, 2]).tolist() == [1, 0]
    store.write([2], 3, hidden([2]))
    store._marks[2]["depth"] = 2  # written by one process, its depth by another
    assert store.verify([2]).tolist() == [0]


def test_rows_can_be_forgotten() -> None:
    store = store_in(None)
    store.write([0, 1], 1, hidden([0, 1]))
    store.forget([1])
    assert store.verify([0, 1]).tolist() == [1, 0]
    store.forget([])


def test_a_file_of_another_size_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"\xff" * 7)
    assert store_in(tmp_path / "rows").verify([0, 1, 2, 3]).tolist() == [0] * 4


def test_no_space_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"File too large|No space"):
        reserve(tmp_path / "rows", 2**62)
    assert (tmp_path / "rows").stat().st_size == 0


def test_the_kernel_may_read_ahead(tmp_path: Path) -> None:
    store = store_in(tmp_path / "rows")
    store.will_need([0, 1, 2, 3])
    store.memory.flush()


def test_memory_of_no_bytes() -> None:
    assert Memory(0).bytes.numel() == 0


def test_what_a_killed_process_wrote_is_whole_or_gone(tmp_path: Path) -> None:
    """It is killed while it writes the same rows over and over, at two depths."""
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.unit.cache.test_store import hidden, store_in
store = store_in(Path({str(tmp_path / "rows")!r}))
print("ready", flush=True)
while True:
    for depth in (1, 2):
        store.write([0, 1, 2, 3], depth, hidden([0, 1, 2, 3]) + depth)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    store = store_in(tmp_path / "rows")
    depths = store.verify([0, 1, 2, 3])
    for row, depth in enumerate(depths.tolist()):
        if depth:
            expected = hidden([0, 1, 2, 3])[row, : LENGTHS[row]] + depth
            assert torch.equal(store.read([row], int(LENGTHS[row]))[0], expected)
