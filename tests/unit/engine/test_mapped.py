"""Tensors in files without a name."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.config.deepspeed import nvme_folder
from progscale.engine import mapped
from progscale.engine.mapped import as_deepspeed_reads_it, check_folder, is_mapped, to_file
from progscale.errors import UserError

NVME = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/scratch", "pin_memory": True}}


@pytest.fixture(autouse=True)
def of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # The harness of other tests makes it 1.
    monkeypatch.setattr(mapped, "SMALLEST", 64 * 1024)


def large(dtype: torch.dtype = torch.float32, count: int = 40_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)


def mappings() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if ".partition (deleted)" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_in_a_file_that_goes_with_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    before, held = len(mappings()), large(dtype)
    expected = held.clone()
    to_file(held, tmp_path)
    assert is_mapped(held)
    assert torch.equal(held, expected) and held.dtype == dtype and held.shape == expected.shape
    assert list(tmp_path.iterdir()) == []
    assert len(mappings()) == before + 1
    held[5] = 3.0
    view = held[4:6]
    assert float(view[1]) == 3.0
    del held, view
    assert len(mappings()) == before


def test_files_take_no_descriptors(tmp_path: Path) -> None:
    """A process may have 1024 of them open, and a large model has more tensors."""
    before = len(os.listdir("/proc/self/fd"))
    tensors = [large(count=20_000) for _ in range(50)]
    for tensor in tensors:
        to_file(tensor, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_stays_where_it_is(tmp_path: Path) -> None:
    held = large()
    to_file(held, tmp_path)
    first = held.data_ptr()
    to_file(held, tmp_path)
    assert held.data_ptr() == first
    # As DeepSpeed does with what becomes live.
    held.data = torch.zeros(40_000)
    assert not is_mapped(held)
    to_file(held, tmp_path)
    assert is_mapped(held) and not held.any()


def test_small_ones_stay_in_memory(tmp_path: Path) -> None:
    held, empty = torch.ones(mapped.SMALLEST // 4 - 1), torch.empty(0)
    to_file(held, tmp_path)
    to_file(empty, tmp_path)
    assert not is_mapped(held) and not is_mapped(empty)


def test_a_full_disk_is_an_error_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    held, limit = large(), resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = held.clone()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(
            UserError, match=rf"nvme_path: 160000 bytes cannot be put into a file in '{tmp_path}' \(File too large\)"
        ):
            to_file(held, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert torch.equal(held, expected) and not is_mapped(held)
    assert list(tmp_path.iterdir()) == []


def test_no_folder(tmp_path: Path) -> None:
    held = large()
    with pytest.raises(UserError, match=r"nvme_path: 160000 bytes cannot be put into a file in .*No such file"):
        to_file(held, tmp_path / "gone")
    assert not is_mapped(held)


def test_what_deepspeed_is_told() -> None:
    given: dict[str, Any] = {"zero_optimization": NVME}
    assert nvme_folder(given) == Path("/scratch")
    told = as_deepspeed_reads_it(given)
    assert told == {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}
    assert given["zero_optimization"]["offload_param"]["device"] == "nvme", "the user's own stays as it is"
    for other in ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {"zero_optimization": {"stage": 2}}):
        assert nvme_folder(other) is None
        assert as_deepspeed_reads_it(other) == other
    assert nvme_folder(None) is None


def test_home_is_meant_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    block = {"offload_param": {"device": "nvme", "nvme_path": "~/fast"}}
    assert nvme_folder({"zero_optimization": block}) == Path("/home/me/fast")


def test_the_folder_is_looked_at(tmp_path: Path) -> None:
    assert check_folder(tmp_path, 3 * 2**20).startswith("3.0 MiB for partitions of the parameters, of ")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"nvme_path: 1.0 TiB .* take a folder on a larger disk, or more machines"):
        check_folder(tmp_path, 2**40)
    file = tmp_path / "file"
    file.touch()
    for wrong in (file, tmp_path / "none"):
        with pytest.raises(UserError, match=rf"nvme_path: '{wrong}' is not a folder; make one on a disk of this machine"):
            check_folder(wrong, 1)
    with pytest.raises(UserError, match=r"nvme_path: 4096 bytes cannot be put into a file in '/proc'"):
        check_folder(Path("/proc"), 1)


def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "read", lambda path: f"/dev/sda1 / ext4 rw 0 0\ntmpfs {tmp_path.resolve()} tmpfs rw 0 0\n")
    with pytest.raises(
        UserError, match=rf"nvme_path: '{tmp_path}' is on a tmpfs, which lies in memory itself; take a folder on a disk"
    ):
        check_folder(tmp_path, 1)


def test_what_torch_says_of_a_file_it_cannot_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that map none."""

    def refuse(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("unable to mmap 4096 bytes")

    monkeypatch.setattr(torch, "from_file", refuse)
    with pytest.raises(UserError, match=r"nvme_path: 4096 bytes cannot be put into a file in .*unable to mmap"):
        check_folder(tmp_path, 1)
