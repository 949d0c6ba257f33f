"""A rank's files: as large as they may be, to the bit what was given, and no more memory than one of them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from progscale.checkpoint.shards import (
    WEIGHT,
    Shard,
    Stored,
    index_shard,
    open_shard,
    shards_of,
    slice_bytes,
    system_error,
    write_shard,
)
from progscale.engine.state import MASTER, Slice
from tests.harness.programs import REPOSITORY

NAME = "rank00000-00000.safetensors"
FUZZ = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def part(name: str, size: int, kinds: Sequence[str] = (MASTER,), start: int = 0, dtype: torch.dtype = torch.float32) -> Slice:
    """A range whose elements count on from kind to kind."""
    tensors = {kind: (torch.arange(size) + 1000 * index).to(dtype) for index, kind in enumerate(kinds)}
    return Slice(name, start, start + size, tensors, {"step": 3.0} if len(kinds) > 1 else {})


def write(folder: Path, slices: Sequence[Slice], limit_bytes: int = 10**6) -> list[str]:
    names = []
    for number, shard in enumerate(shards_of(slices, limit_bytes)):
        names.append(f"rank00000-{number:05d}.safetensors")
        write_shard(folder / names[-1], shard.tensors, shard.metadata())
    return names


def read(folder: Path, names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Whole tensors by parameter and kind, put together from all files."""
    found: dict[str, dict[str, list[tuple[int, torch.Tensor]]]] = {}
    for name in names:
        for stored in index_shard(folder, name):
            with open_shard(stored.path) as file:
                for kind, tensor in stored.cut(file, stored.start, stored.end).tensors.items():
                    found.setdefault(stored.name, {}).setdefault(kind, []).append((stored.start, tensor))
    return {
        name: {kind: torch.cat([tensor for _, tensor in sorted(ranges)]) for kind, ranges in kinds.items()}
        for name, kinds in found.items()
    }


# -- packing ------------------------------------------------------------------------------------------------------------


def test_as_many_as_fit() -> None:
    parts = [part("a", 10), part("b", 10), part("c", 5), part("d", 10)]
    shards = list(shards_of(parts, 100))
    assert [list(shard.tensors) for shard in shards] == [["weight/0/a", "weight/0/b", "weight/0/c"], ["weight/0/d"]]
    assert [shard.bytes for shard in shards] == [100, 40]


def test_a_range_larger_than_a_file_is_cut() -> None:
    """Its kinds stay together, and so does the rest with what comes after it."""
    shards = list(shards_of([part("a", 10, (MASTER, "exp_avg")), part("b", 3)], 32))
    assert [list(shard.tensors) for shard in shards] == [
        ["weight/0/a", "exp_avg/0/a"],
        ["weight/4/a", "exp_avg/4/a"],
        ["weight/8/a", "exp_avg/8/a", "weight/0/b"],
    ]
    assert [shard.bytes for shard in shards] == [32, 32, 28]
    assert all(shard.scalars == {"a": {"step": 3.0}} for shard in shards)


def test_a_file_has_an_element_at_least() -> None:
    shards = list(shards_of([part("a", 3, (MASTER, "exp_avg", "exp_avg_sq"))], 1))
    assert [shard.bytes for shard in shards] == [12, 12, 12]


def test_nothing_to_write() -> None:
    assert list(shards_of([], 100)) == []
    assert list(shards_of([part("a", 0)], 100)) == []


SLICES = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([(MASTER,), (MASTER, "exp_avg"), (MASTER, "exp_avg", "exp_avg_sq")])),
    max_size=8,
)


@FUZZ
@given(sizes=SLICES, limit=st.integers(1, 400))
def test_any_sizes(sizes: list[tuple[int, tuple[str, ...]]], limit: int) -> None:
    """No file is larger than it may be, none is smaller than it need be, and every element comes once, in order."""
    parts = [part(f"p{number}", size, kinds) for number, (size, kinds) in enumerate(sizes)]
    shards = list(shards_of(parts, limit))
    whole: dict[str, list[torch.Tensor]] = {}
    for shard in shards:
        assert shard.bytes == sum(tensor.numel() * 4 for tensor in shard.tensors.values()) > 0
        smallest = max(4 * len({key.split("/")[0] for key in shard.tensors}), limit)
        assert shard.bytes <= smallest
        for key, tensor in shard.tensors.items():
            kind, start, name = key.split("/")
            assert int(start) == sum(map(len, whole.setdefault(f"{kind} {name}", [])))
            whole[f"{kind} {name}"].append(tensor)
    for one in parts:
        for kind, tensor in one.tensors.items():
            found = whole.get(f"{WEIGHT if kind == MASTER else kind} {one.name}", [torch.empty(0)])
            assert torch.equal(torch.cat(found), tensor)
    for shard, after in pairwise(shards):
        place = next(iter(after.tensors)).partition("/")[2]
        first = sum(tensor.numel() * 4 for key, tensor in after.tensors.items() if key.partition("/")[2] == place)
        assert shard.bytes + first > limit, "it would have had room"


def test_a_shard_at_a_time() -> None:
    """The next slice is asked for when the file before it is done."""
    asked: list[str] = []

    def slices() -> Iterator[Slice]:
        for name in "abcd":
            asked.append(name)
            yield part(name, 10)

    shards = shards_of(slices(), 40)
    next(shards)
    assert asked == ["a", "b"]
    next(shards)
    assert asked == ["a", "b", "c"]


def test_views_are_not_copied() -> None:
    """What lies on the CPU is written from where it lies."""
    one = part("a", 10)
    (shard,) = shards_of([one], 100)
    assert shard.tensors["weight/0/a"].data_ptr() == one.tensors[MASTER].data_ptr()
    assert slice_bytes(one) == shard.bytes == 40


# -- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also of what is no number, of zeros with a sign, and of the smallest numbers."""
    width = torch.empty(0, dtype=dtype).element_size()
    bits = {2: torch.int16, 4: torch.int32}[width]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (999 * width,), generator=generator, dtype=torch.uint8).view(bits)
    odd = torch.tensor(
        [0.0, -0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).smallest_normal / 2], dtype=dtype
    )
    value = torch.cat([drawn, odd.view(bits)]).view(dtype)
    one = Slice("a", 0, len(value), {MASTER: value, "exp_avg": value.flip(0)}, {"step": 1.0})
    names = write(tmp_path, [one], limit_bytes=500)
    assert len(names) > 4
    found = read(tmp_path, names)["a"]
    assert found[MASTER].dtype == dtype
    assert torch.equal(found[MASTER].view(bits), value.view(bits))
    assert torch.equal(found["exp_avg"].view(bits), value.flip(0).view(bits))


def test_kinds_of_several_dtypes(tmp_path: Path) -> None:
    """A frozen bf16 parameter beside fp32 masters."""
    parts = [part("a", 7, dtype=torch.bfloat16), part("b", 9, (MASTER, "exp_avg")), part("c", 3, dtype=torch.float16)]
    found = read(tmp_path, write(tmp_path, parts))
    dtypes = {name: kinds[MASTER].dtype for name, kinds in found.items()}
    assert dtypes == {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16}
    for one in parts:
        for kind, tensor in one.tensors.items():
            assert torch.equal(found[one.name][kind], tensor)


@pytest.mark.parametrize("name", ["a/b", "1/weight/0/x", "schicht.größe", "a b", "模型.weight", "x" * 500, '"\\', "__metadata__"])
def test_names_of_parameters(tmp_path: Path, name: str) -> None:
    write(tmp_path, [part(name, 4, (MASTER, "exp_avg"), start=3)])
    (stored,) = index_shard(tmp_path, NAME)
    assert (stored.name, stored.start, stored.end, stored.scalars) == (name, 3, 7, {"step": 3.0})
    assert set(stored.keys) == {WEIGHT, "exp_avg"}


@pytest.mark.parametrize("step", [0.0, 1.0, 16777217.0, 1e15, 0.1])
def test_numbers_beside_the_tensors(tmp_path: Path, step: float) -> None:
    one = Slice("a", 0, 2, {MASTER: torch.ones(2)}, {"step": step, "weight_sum": 0.5})
    write(tmp_path, [one, part("b", 2)])
    scalars = {stored.name: stored.scalars for stored in index_shard(tmp_path, NAME)}
    assert scalars == {"a": {"step": step, "weight_sum": 0.5}, "b": {}}


def test_parts_of_a_range(tmp_path: Path) -> None:
    """Read without the rest of the file, and only the kinds that are asked for."""
    write(tmp_path, [part("a", 20, (MASTER, "exp_avg"), start=100)])
    (stored,) = index_shard(tmp_path, NAME)
    with open_shard(stored.path) as file:
        assert stored.cut(file, 105, 108).tensors[MASTER].tolist() == [5, 6, 7]
        assert stored.cut(file, 105, 108).tensors["exp_avg"].tolist() == [1005, 1006, 1007]
        assert list(stored.cut(file, 100, 101, [WEIGHT]).tensors) == [MASTER]
        assert stored.cut(file, 108, 108).tensors[MASTER].numel() == 0


def test_a_stored_range_is_a_plain_value(tmp_path: Path) -> None:
    write(tmp_path, [part("a", 2)])
    (stored,) = index_shard(tmp_path, NAME)
    assert stored == Stored(tmp_path / NAME, "a", 0, 2, {WEIGHT: "weight/0/a"}, {})
    assert Shard().metadata() == {"scalars": "{}"}


# -- what the system says -----------------------------------------------------------------------------------------------


def test_errors_of_the_writer(tmp_path: Path) -> None:
    """Rust tells them as text; they come as what they are."""
    with pytest.raises(OSError, match="No such file or directory") as caught:
        write_shard(tmp_path / "nowhere" / NAME, {"weight/0/a": torch.ones(1)}, {})
    assert caught.value.errno == errno.ENOENT
    found = system_error(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert (found.errno, str(found)) == (28, "[Errno 28] No space left on device")
    assert str(system_error(SafetensorError("something else"))) == "[Errno None] something else"


def test_what_is_told_of_a_file(tmp_path: Path) -> None:
    """Its size and hash, of the bytes that are on the disk."""
    import hashlib

    info = write_shard(tmp_path / NAME, {"weight/0/a": torch.ones(5)}, {"scalars": "{}"})
    raw = (tmp_path / NAME).read_bytes()
    assert (info.bytes, info.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


# -- memory -------------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from progscale.checkpoint.reader import load_weights, open_checkpoint, verify
from progscale.checkpoint.saver import Saver
from progscale.checkpoint.store import Store
from progscale.engine.state import MASTER, Slice
from tests.harness.small import saved_state

root, count, elements, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
names = [f"layer.{number}.weight" for number in range(count)]
state = {name: {kind: torch.rand(elements) for kind in (MASTER, "exp_avg", "exp_avg_sq")} for name in names}

def slices():
    for name, tensors in state.items():
        yield Slice(name, 0, elements, tensors, {"step": 1.0})

engine = SimpleNamespace(
    rank=0, device=torch.device("cpu"), own_slices=slices, gather_objects=lambda thing: [thing], on_main=lambda action: action(),
    held=lambda name: (0, state[name][MASTER]),
)

def peak_of(action):
    "Bytes that an action takes beside what is there before it."
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

content = saved_state(1) | {"parameters": {name: elements for name in names}}
saver = Saver(engine, Store(root), shard_bytes=limit)
saving = peak_of(lambda: saver.save(1, content))
path = Store(root).path_of(1)
state = {name: {MASTER: tensors[MASTER]} for name, tensors in state.items()}
expected = {name: tensors[MASTER].sum().item() for name, tensors in state.items()}
for tensors in state.values():
    tensors[MASTER].zero_()
verifying = peak_of(lambda: verify(open_checkpoint(path)))
loading = peak_of(lambda: load_weights(open_checkpoint(path), engine))
assert expected == {name: tensors[MASTER].sum().item() for name, tensors in state.items()}
files = sorted(entry.stat().st_size for entry in path.glob("*.safetensors"))
print(json.dumps({"saving": saving, "verifying": verifying, "loading": loading, "files": files}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its peak")
@pytest.mark.parametrize(
    ("count", "elements", "limit"),
    [
        pytest.param(8, 2**20, 8 * 2**20, id="96 MB in files of 8"),
        pytest.param(9, 2**22, 32 * 2**20, id="432 MB in files of 32", marks=pytest.mark.slow),
        # Every parameter larger than a file.
        pytest.param(2, 2**24, 32 * 2**20, id="384 MB in files of 32", marks=pytest.mark.slow),
    ],
)
def test_memory_of_one_file(quick: Path, count: int, elements: int, limit: int) -> None:
    """Beside the state itself, saving and loading take a file and a parameter at most, however large the state is."""
    command = [sys.executable, "-c", PROGRAM, str(quick), str(count), str(elements), str(limit)]
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["files"]) >= count * elements * 12 // limit
    assert max(found["files"]) < limit + 10_000, "the header comes on top"
    allowed = limit + 4 * elements + 2**21
    assert found["saving"] < allowed, found
    assert found["verifying"] < 2**22, found
    assert found["loading"] < allowed, found
