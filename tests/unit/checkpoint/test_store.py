"""The folder of a run's checkpoints: what becomes one, what is found again in which order, and what is tidied up."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from progscale.checkpoint.manifest import MANIFEST, STATE, FileInfo, read_manifest
from progscale.checkpoint.store import Store
from progscale.errors import RejectedError
from progscale.resume import find_checkpoint
from tests.harness.small import FILES, SHARD, contents, publish, saved_state, seal, write_contents


def save(store: Store, step: int, **state: Any) -> Path:
    """A checkpoint without tensors."""
    return store.publish(store.begin(step), step, {**saved_state(step), "parameters": {}, **state}, {})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def steps(store: Store) -> list[int]:
    """Of the candidates, in their order."""
    return [read_manifest(path).step for path in store.candidates()]


# -- publishing ---------------------------------------------------------------------------------------------------------


def test_nothing_is_made_before_it_is_needed(tmp_path: Path) -> None:
    store = Store(tmp_path / "run" / "checkpoints")
    assert store.candidates() == []
    store.clean()
    store.restore()
    assert names(tmp_path) == []


def test_a_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    path = publish(root, 150)
    assert path == Store(root).path_of(150) == root / "step-00000150"
    assert names(root) == ["latest.json", "step-00000150"]
    assert json.loads((root / "latest.json").read_text()) == {"step": 150, "path": "step-00000150"}
    assert names(path) == sorted(FILES)
    umask = os.umask(0)
    os.umask(umask)
    assert {entry.stat().st_mode & 0o777 for entry in path.iterdir()} == {0o666 & ~umask}, "others may read them as any file"


def test_two_saves_of_a_step_do_not_meet(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = store.begin(3), store.begin(3)
    assert first != second
    assert {path.name[:14] for path in (first, second)} == {".tmp-00000003-"}
    store.discard(first)
    store.discard(first)
    assert names(tmp_path) == [second.name]


def test_large_steps(tmp_path: Path) -> None:
    """The name grows, and the order is that of numbers."""
    store = Store(tmp_path, keep=10)
    for step in (10**8, 99_999_999, 10**12):
        save(store, step)
    assert steps(store) == [10**12, 10**8, 99_999_999]


def test_a_step_that_is_saved_again(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=5)
    save(store, 2, note="old")
    save(store, 3)
    path = save(store, 2, note="new")
    assert json.loads((path / STATE).read_text())["note"] == "new"
    assert names(tmp_path) == ["latest.json", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("left", [False, True])
def test_a_replacement_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool) -> None:
    """What was there is there again under its name."""
    store = Store(tmp_path)
    path = save(store, 2, note="old")
    if left:
        (tmp_path / ".old-step-00000002").mkdir()
        (tmp_path / ".old-step-00000002" / "half").write_text("deleted")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".tmp-" in str(source) and Path(target) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save(store, 2, note="new")
    assert json.loads((path / STATE).read_text())["note"] == "old"
    assert steps(store) == [2]


def test_files_of_ranks_that_this_machine_does_not_see(tmp_path: Path) -> None:
    """The run folder is not on a file system that all share, or a rank wrote something else."""
    store = Store(tmp_path)
    files = {SHARD: FileInfo(5, "0" * 64)}
    with pytest.raises(
        OSError, match=r"rank00000-00000\.safetensors is missing .*; the run folder must be on a file system that"
    ):
        store.publish(store.begin(1), 1, saved_state(1), files)
    staged = store.begin(1)
    (staged / SHARD).write_bytes(b"1234")
    with pytest.raises(OSError, match=r"rank00000-00000\.safetensors has 4 bytes where its rank wrote 5"):
        store.publish(staged, 1, saved_state(1), files)
    assert steps(store) == []


# -- keeping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(tmp_path: Path, keep: int) -> None:
    store = Store(tmp_path, keep)
    for step in range(1, 6):
        path = save(store, step)
        assert path.exists()
        assert steps(store) == list(range(step, max(0, step - keep), -1))
    assert names(tmp_path) == ["latest.json", *(f"step-{step:08d}" for step in range(6 - keep, 6))]


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    for name in ("step-1", "step-00000001.bak", "xstep-00000001", "rejected-step-00000001", "rejected-step-00000001.3", "notes"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    for step in (1, 2):
        save(store, step)
    store.clean()
    assert names(tmp_path) == sorted([*before, "latest.json", "step-00000002"])


def test_an_old_one_that_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new one counts all the same."""
    store = Store(tmp_path, keep=1)
    save(store, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with caplog.at_level(logging.WARNING, "progscale"):
        save(store, 2)
    assert "step-00000001 is left over, and cannot be deleted" in caplog.text
    assert steps(store) == [2]


# -- tidying up ---------------------------------------------------------------------------------------------------------


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=5)
    for step in (1, 2, 3):
        save(store, step)
    os.rename(tmp_path / "step-00000002", tmp_path / ".old-step-00000002")
    write_contents(tmp_path / ".old-step-00000003", contents(tmp_path / "step-00000003"))
    half = store.begin(4)
    (half / SHARD).write_bytes(b"half")
    os.rename(tmp_path / "step-00000001", tmp_path / ".tmp-step-00000001")
    assert steps(store) == [3]
    store.clean()
    assert names(tmp_path) == ["latest.json", "step-00000002", "step-00000003"]
    assert steps(store) == [3, 2]
    store.clean()
    assert steps(store) == [3, 2]


def test_what_was_being_replaced(tmp_path: Path) -> None:
    """It comes back, and nothing else changes."""
    store = Store(tmp_path, keep=5)
    save(store, 1)
    save(store, 2, note="old")
    os.rename(tmp_path / "step-00000002", tmp_path / ".old-step-00000002")
    staged = store.begin(2)
    store.restore()
    assert json.loads((tmp_path / "step-00000002" / STATE).read_text())["note"] == "old"
    assert names(tmp_path) == [staged.name, "latest.json", "step-00000001", "step-00000002"]


def test_leftovers_that_cannot_be_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file and a link under such a name: neither is ours, and what the link points to is not touched."""
    outside, root = tmp_path / "outside", tmp_path / "checkpoints"
    outside.mkdir()
    (outside / "thesis.tex").write_text("all of it")
    store = Store(root)
    save(store, 1)
    (root / ".tmp-file").write_text("x")
    (root / ".tmp-link").symlink_to(outside)
    (root / ".old-step-00000001").symlink_to(outside)
    with caplog.at_level(logging.WARNING, "progscale"):
        store.clean()
    assert len(caplog.records) == 3
    assert ".tmp-link is left over, and cannot be deleted" in caplog.text
    assert (outside / "thesis.tex").read_text() == "all of it"
    assert steps(store) == [1]


def test_put_aside(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=5)
    for number in range(3):
        path = save(store, 1, note=number)
        aside = store.sideline(path)
        assert aside.name == "rejected-step-00000001" + (f".{number}" if number else "")
        assert json.loads((aside / STATE).read_text())["note"] == number
    assert steps(store) == []


# -- finding ------------------------------------------------------------------------------------------------------------


def set_times(root: Path, how: str) -> None:
    """Times of folders and files: alike, or the highest step the oldest."""
    for path in [root, *root.rglob("*")]:
        step = next((int(part[5:]) for part in path.parts if part.startswith("step-")), 0)
        stamp = 1_000_000_000 - (1000 * step if how == "reversed" else 0)
        os.utime(path, (stamp, stamp))


@pytest.mark.parametrize("how", ["alike", "reversed"])
def test_times_mean_nothing(tmp_path: Path, how: str) -> None:
    store = Store(tmp_path / "checkpoints", keep=3)
    for step in (5, 12, 7):
        save(store, step)
    set_times(store.root, how)
    assert steps(store) == [12, 7, 5]
    found = find_checkpoint("auto", tmp_path, {})
    assert found is not None
    assert found.checkpoint.step == 12
    store.keep = 2
    save(store, 6)
    assert steps(store) == [12, 7], "the one just saved is not the newest: it goes"


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Folders are listed in any order, another one each time."""
    order = random.Random(0)
    listdir = os.listdir

    def shuffle(path: Any = ".") -> list[Any]:
        entries = listdir(path)
        order.shuffle(entries)
        return entries

    def iterdir(path: Path) -> Iterator[Path]:
        return (path / name for name in shuffle(path))

    monkeypatch.setattr(os, "listdir", shuffle)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    return order


def test_the_order_of_a_listing_means_nothing(tmp_path: Path, shuffled: random.Random) -> None:
    """Of saving, keeping, finding and tidying up."""
    saved = list(range(1, 21))
    shuffled.shuffle(saved)
    root = tmp_path / "checkpoints"
    for step in saved:
        save(Store(root, keep=30), step)
    set_times(root, "reversed")
    store = Store(root, keep=4)
    for step in (21, 22):
        save(store, step)
        assert steps(store) == [step, step - 1, step - 2, step - 3]
    os.rename(root / "step-00000020", root / ".old-step-00000020")
    store.begin(23)
    store.clean()
    assert steps(store) == [22, 21, 20, 19]


def test_the_manifest_tells_the_step(tmp_path: Path) -> None:
    """And not the folder's name, which anybody may give: copies keep their step."""
    store = Store(tmp_path / "checkpoints", keep=9)
    for step in (1, 2, 3):
        save(store, step)
    os.rename(store.path_of(1), store.path_of(9))
    os.rename(store.path_of(3), store.path_of(0))
    assert [path.name for path in store.candidates()] == ["step-00000000", "step-00000002", "step-00000009"]
    assert steps(store) == [3, 2, 1]
    (store.root / "latest.json").write_text(json.dumps({"step": 9, "path": "step-00000009"}))
    found = find_checkpoint("auto", tmp_path, {})
    assert found is not None
    assert found.checkpoint.path.name == "step-00000000"


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"[]", b'{"step": 99, "path": "../../elsewhere"}'])
def test_latest_is_for_people(tmp_path: Path, content: bytes | None) -> None:
    """A run reads the manifests: the file may be missing, damaged or a lie."""
    store = Store(tmp_path / "checkpoints", keep=5)
    for step in (1, 2):
        save(store, step)
    (store.root / "latest.json").unlink()
    if content is not None:
        (store.root / "latest.json").write_bytes(content)
    found = find_checkpoint("must", tmp_path, {})
    assert found is not None
    assert found.checkpoint.step == 2


def test_damaged_ones_have_a_place(tmp_path: Path) -> None:
    """That of their name: they are named among the rejected before an older one is taken."""
    store = Store(tmp_path, keep=9)
    for step in (1, 2, 3):
        save(store, step)
    (store.path_of(3) / MANIFEST).write_bytes(b"")
    (store.path_of(2) / MANIFEST).unlink()
    (tmp_path / "step-00000007").write_text("a file")
    (tmp_path / "step-00000008").mkdir()
    found = [path.name for path in store.candidates()]
    assert found == ["step-00000008", "step-00000007", "step-00000003", "step-00000002", "step-00000001"]


def test_links_are_no_candidates(tmp_path: Path) -> None:
    other = publish(tmp_path / "other", 9)
    store = Store(tmp_path / "checkpoints")
    save(store, 1)
    (store.root / "step-00000009").symlink_to(other)
    (store.root / "step-00000010").symlink_to("nowhere")
    assert steps(store) == [1]
    save(store, 2)
    assert steps(store) == [2, 1], "links do not count as kept"
    assert read_manifest(other).step == 9


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    saved=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    keep=st.integers(1, 4),
    left=st.sets(st.sampled_from(["tmp", "old", "doomed", "replaced"])),
)
def test_any_history(quick: Path, saved: list[int], keep: int, left: set[str]) -> None:
    """The newest are kept, whatever was left over by runs that were killed, and tidying up loses none of them."""
    root = quick / f"{len(list(quick.iterdir()))}"
    store, expected = Store(root, keep), set[int]()
    for step in saved:
        save(store, step)
        expected = set(sorted(expected | {step}, reverse=True)[:keep])
        assert steps(store) == sorted(expected, reverse=True)
    newest = max(expected)
    if "tmp" in left:
        store.begin(newest + 1)
    if "doomed" in left:
        (root / f".tmp-step-{newest + 2:08d}").mkdir()
    if "replaced" in left:
        (root / f".old-step-{newest:08d}").mkdir()
    elif "old" in left:
        os.rename(store.path_of(newest), root / f".old-step-{newest:08d}")
    store.clean()
    assert steps(store) == sorted(expected, reverse=True)
    assert not [path for path in root.iterdir() if path.name.startswith((".tmp-", ".old-"))]


# -- what is told -------------------------------------------------------------------------------------------------------


def test_a_rejection_is_sent_to_other_ranks(tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    (path / STATE).unlink()
    seal(path, 1)
    with pytest.raises(RejectedError) as caught:
        read_manifest(path)
    sent = pickle.loads(pickle.dumps(caught.value))
    assert type(sent) is RejectedError
    assert str(sent) == str(caught.value) == f"checkpoint {path}: manifest.json lists no state.json"
    assert (sent.path, sent.reason, sent.exit_code) == (str(path), "manifest.json lists no state.json", 2)
