"""The list of a checkpoint's files: any damage shows, and no name in it leads out of its folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from progscale.checkpoint import manifest as module
from progscale.checkpoint.manifest import MANIFEST, SHARD_NAME, STATE, FileInfo, Manifest, canonical, check_sizes, read_manifest
from progscale.errors import RejectedError

HASH = hashlib.sha256(b"").hexdigest()
SHARD = "rank00000-00000.safetensors"
GOOD = Manifest(7, {STATE: FileInfo(2, HASH), SHARD: FileInfo(0, HASH)})
EXAMPLES = [pytest.param(200, id="200"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]


def write(folder: Path, content: Any) -> Path:
    """A manifest of any content; bytes as they are."""
    (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def sealed(content: dict[str, Any]) -> bytes:
    """Any content with the digest that fits it."""
    content = {"format": module.FORMAT, **content}
    return canonical({**content, "digest": hashlib.sha256(canonical(content)).hexdigest()})


def test_round_trip(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, GOOD.to_bytes())) == GOOD
    backwards = Manifest(7, dict(reversed(list(GOOD.files.items()))))
    assert backwards.to_bytes() == GOOD.to_bytes(), "one form for one content"


def test_every_flipped_bit(quick: Path) -> None:
    raw = GOOD.to_bytes()
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RejectedError, match=r"manifest\.json"):
            read_manifest(write(quick, bytes(damaged)))


def test_every_length(quick: Path) -> None:
    raw = GOOD.to_bytes()
    for length in range(len(raw)):
        with pytest.raises(RejectedError, match=r"manifest\.json is damaged"):
            read_manifest(write(quick, raw[:length]))
    for more in (b"\n", b"\0", b"{}", raw):
        with pytest.raises(RejectedError, match=r"manifest\.json is damaged"):
            read_manifest(write(quick, raw + more))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "format None"),
        (7, "format None"),
        (None, "format None"),
        ({}, "format None"),
        ({"format": "progscale-checkpoint-2"}, "format 'progscale-checkpoint-2' instead of 'progscale-checkpoint-1'"),
        ({"format": ["a"]}, r"format \['a'\]"),
        (b'{"format": "progscale-checkpoint-1"', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        (b'{"step": ' + b"9" * 5000 + b"}", "no JSON"),
        (sealed({}), "no step or no files"),
        (sealed({"files": {}, "step": -1}), "no step or no files"),
        (sealed({"files": {}, "step": True}), "no step or no files"),
        (sealed({"files": {}, "step": 1.0}), "no step or no files"),
        (sealed({"files": {}, "step": "1"}), "no step or no files"),
        (sealed({"files": [STATE], "step": 1}), "no step or no files"),
        (sealed({"files": {STATE: []}, "step": 1}), r"state\.json has no size or hash"),
        (sealed({"files": {STATE: {"bytes": -1, "sha256": HASH}}, "step": 1}), r"state\.json has no size or hash"),
        (sealed({"files": {STATE: {"bytes": True, "sha256": HASH}}, "step": 1}), r"state\.json has no size or hash"),
        (sealed({"files": {STATE: {"bytes": 2, "sha256": 3}}, "step": 1}), r"state\.json has no size or hash"),
        (sealed({"files": {STATE: {"bytes": 2, "sha256": HASH}}, "step": 1, "more": 1}), "its digest does not fit"),
        (sealed({"files": {STATE: {"bytes": 2, "sha256": HASH, "more": 1}}, "step": 1}), "its digest does not fit"),
        (sealed({"files": {}, "step": 1}), r"lists no state\.json"),
        (sealed({"files": {SHARD: {"bytes": 0, "sha256": HASH}}, "step": 1}), r"lists no state\.json"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(RejectedError, match=message) as caught:
        read_manifest(write(tmp_path, content))
    assert str(caught.value).startswith(f"checkpoint {tmp_path}: manifest.json")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)
    with pytest.raises(RejectedError, match=r"manifest\.json is missing \(Not a directory\)"):
        read_manifest(write(tmp_path, b"") / MANIFEST)
    (tmp_path / "elsewhere").write_bytes(GOOD.to_bytes())
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere"), lambda path: path.symlink_to("nowhere")):
        (tmp_path / MANIFEST).unlink(missing_ok=True)
        make(tmp_path / MANIFEST)
        with pytest.raises(RejectedError, match=r"manifest\.json is no plain file"):
            read_manifest(tmp_path)
        if (tmp_path / MANIFEST).is_dir():
            (tmp_path / MANIFEST).rmdir()


def test_more_than_any_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read at all: its size is enough."""
    raw = GOOD.to_bytes()
    monkeypatch.setattr(module, "LARGEST_JSON_BYTES", len(raw))
    assert read_manifest(write(tmp_path, raw)) == GOOD
    monkeypatch.setattr(module, "LARGEST_JSON_BYTES", len(raw) - 1)
    monkeypatch.setattr(module, "open_plain", lambda folder, name: pytest.fail("it was opened"))
    with pytest.raises(RejectedError, match=rf"manifest\.json has {len(raw)} bytes, more than any real one"):
        read_manifest(tmp_path)


def test_a_hole_of_a_terabyte(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RejectedError, match=r"manifest\.json has 1099511627776 bytes, more than any real one"):
        read_manifest(tmp_path)


NAMES_OUTSIDE = [
    *("", ".", "..", "/", "../state.json", "/etc/passwd", "./state.json", "state.json/", "a/state.json", "state.json\0"),
    *("State.json", "state.json ", " state.json", "state.json\n", "manifest.json", "latest.json", "config.json", "~/state.json"),
    *("rank00000-00000.safetensors/..", "../rank00000-00000.safetensors", "rank0-0.safetensors", "rank00000-00000.safetensors\n"),
    *("rank00000-00000.safetensors\0", "rank00000-00000.bin", "rank00000-00000.pt", "xrank00000-00000.safetensors"),
    *(
        "rank-0000-00000.safetensors",
        "rank00000_00000.safetensors",
        "rank٠٠٠٠٠-٠٠٠٠٠.safetensors",
        "ｒank00000-00000.safetensors",
    ),
    *("..\\state.json", "C:\\state.json", "file:///etc/passwd", "%2e%2e/state.json", "\ud800", "a" * 100_000),
]


@pytest.mark.parametrize("name", NAMES_OUTSIDE, ids=range(len(NAMES_OUTSIDE)))
def test_names_that_no_checkpoint_has(tmp_path: Path, name: str) -> None:
    files = {STATE: {"bytes": 2, "sha256": HASH}, name: {"bytes": 0, "sha256": HASH}}
    with pytest.raises(RejectedError, match=r"which no checkpoint has: only files in its own folder") as caught:
        read_manifest(write(tmp_path, sealed({"files": files, "step": 1})))
    assert len(str(caught.value)) < 3000, "a message, whatever the name is"
    str(caught.value).encode()


PIECES = (
    "..",
    ".",
    "/",
    "\\",
    "\0",
    "state.json",
    "manifest.json",
    SHARD,
    "rank",
    "00000",
    "-",
    ".safetensors",
    "etc",
    "~",
    "\n",
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_name(quick: Path, examples: int) -> None:
    """What is taken is one of two forms; everything else is refused with a message, before any file of that name is touched."""

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("".join) | st.text(max_size=40))
    def check(name: str) -> None:
        files = {STATE: {"bytes": 2, "sha256": HASH}, name: {"bytes": 2, "sha256": HASH}}
        try:
            found = read_manifest(write(quick, sealed({"files": files, "step": 1})))
        except RejectedError:
            return
        for taken in found.files:
            assert taken == STATE or SHARD_NAME.fullmatch(taken)
            assert (quick / taken).resolve().parent == quick.resolve()

    check()


FIELDS = ("format", "step", "files", "bytes", "sha256", "digest")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([STATE, SHARD, module.FORMAT]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*FIELDS, STATE, SHARD, ""]), inner, max_size=5),
    max_leaves=12,
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_json(quick: Path, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(JSON | st.fixed_dictionaries({"format": st.just(module.FORMAT), "step": JSON, "files": JSON}))
    def check(content: Any) -> None:
        with pytest.raises(RejectedError):
            read_manifest(write(quick, content))

    check()


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"{}")
    (tmp_path / SHARD).write_bytes(b"")
    check_sizes(tmp_path, GOOD)
    for size in (1, 3):
        (tmp_path / STATE).write_bytes(b"x" * size)
        with pytest.raises(RejectedError, match=rf"state\.json has {size} bytes instead of 2"):
            check_sizes(tmp_path, GOOD)
