"""Checkpoints that somebody made to do harm: no code of theirs runs, and nothing outside of their folder is read or written.

Weights of models that are pickles: tests/unit/models/test_loading.py and tests/integration/test_bad_inputs.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progscale.checkpoint import manifest
from progscale.checkpoint.manifest import MANIFEST, STATE, canonical
from progscale.checkpoint.reader import open_checkpoint, verify
from progscale.cli import main
from progscale.errors import ConfigError, RejectedError
from progscale.resume import find_checkpoint, locate
from tests.harness import faultfs
from tests.harness.cases import reset_accelerate
from tests.harness.pickles import pickled
from tests.harness.programs import Answer, in_process, records
from tests.harness.programs import settings as options
from tests.harness.save_driver import FaultyForks
from tests.harness.small import FILES, SHARD, contents, publish, reseal, safetensors_bytes, seal, write_contents

OTHERS = (
    "latest.json",
    "optimizer.pt",
    "pytorch_model.bin",
    "rng_state.pth",
    "mp_rank_00_model_states.pt",
    "custom_checkpoint_0.pkl",
)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A folder that is there as soon as somebody's code ran."""
    return tmp_path / "executed"


def read(path: Path) -> None:
    verify(open_checkpoint(path))


class Opened:
    """What this process opened while it was watched; Python's own files are left out."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.paths is not None and isinstance(arguments[0], str | bytes):
            self.paths.append(os.path.abspath(os.fsdecode(arguments[0])))


OPENED = Opened()
sys.addaudithook(OPENED.note)


@contextlib.contextmanager
def opened() -> Iterator[list[str]]:
    """Paths that are opened in its body."""
    OPENED.paths = []
    try:
        yield OPENED.paths
    finally:
        OPENED.paths = None


# -- pickles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_pickles_under_every_name(tmp_path: Path, marker: Path, name: str, sealed: bool, form: str) -> None:
    """Also where the manifest has its true hash."""
    path = publish(tmp_path / "checkpoints", 1)
    (path / name).write_bytes(pickled(marker, form))
    if sealed and name != MANIFEST:
        seal(path, 1)
    with pytest.raises(RejectedError, match=name):
        read(path)
    assert not marker.exists()
    # It would have worked.
    pickle.loads(pickled(marker, "pickle"))
    assert marker.exists()


def test_pickles_that_nobody_asked_for(tmp_path: Path, marker: Path) -> None:
    path = publish(tmp_path / "checkpoints", 1)
    for folder in (path, path.parent, tmp_path):
        for name in OTHERS:
            (folder / name).write_bytes(pickled(marker, "torch"))
    read(path)
    assert find_checkpoint("must", tmp_path, {}) is not None
    assert not marker.exists()


# -- ways out of the folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["the same bytes outside", "another checkpoint", "itself", "nowhere"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_links(tmp_path: Path, name: str, target: str) -> None:
    """Refused whatever they point to; what that is, is not opened."""
    path, other = publish(tmp_path / "checkpoints", 1), publish(tmp_path / "other", 1)
    outside = tmp_path / "outside"
    shutil.copyfile(path / name, outside)
    (path / name).unlink()
    where: dict[str, str | Path] = {
        "the same bytes outside": outside,
        "another checkpoint": other / name,
        "itself": name,
        "nowhere": "nowhere",
    }
    (path / name).symlink_to(where[target])
    with opened() as paths, pytest.raises(RejectedError, match=rf"{name} is no plain file"):
        read(path)
    assert not {str(outside), str(other / name), str(path / name)} & set(paths)


def test_folders_that_are_links(tmp_path: Path) -> None:
    """A run does not look for checkpoints there, and puts none there."""
    other = publish(tmp_path / "other", 9)
    before = contents(other)
    root = tmp_path / "run" / "checkpoints"
    publish(root, 1)
    (root / "step-00000009").symlink_to(other)
    found = find_checkpoint("auto", root.parent, {})
    assert found is not None
    assert found.checkpoint.step == 1
    assert contents(other) == before


@pytest.mark.parametrize("name", ["../secret", "{outside}", "../step-00000002/state.json", "./state.json", "a/../../secret"])
def test_manifests_that_lead_out(tmp_path: Path, name: str) -> None:
    """With hashes that are right."""
    root, outside = tmp_path / "checkpoints", tmp_path / "checkpoints" / "secret"
    path = publish(root, 1)
    publish(root, 2)
    (path / "a").mkdir()
    outside.write_bytes((path / SHARD).read_bytes())
    (tmp_path / "secret").write_bytes((path / SHARD).read_bytes())
    name = name.format(outside=outside)
    seal(path, 1, [*(entry for entry in FILES if entry != MANIFEST), name])
    with opened() as paths, pytest.raises(RejectedError, match="only files in its own folder"):
        read(path)
    assert {Path(one).parent for one in paths if one.startswith(str(tmp_path))} == {path}


# -- files that are too much --------------------------------------------------------------------------------------------


HEADERS: dict[str, bytes] = {
    "a length of 2^64 - 1": b"\xff" * 8 + b"{}",
    "a length of 2^63": (2**63).to_bytes(8, "little") + b"{}",
    "a length above the limit": (100 * 2**20 + 1).to_bytes(8, "little") + b"{}",
    "a length beyond the end": safetensors_bytes(b"{}", length=1000),
    "no length": b"\0\0\0",
    "nothing": b"",
    "no JSON": safetensors_bytes(b"[1, 2"),
    "a list": safetensors_bytes(b"[]"),
    "nested too deep": safetensors_bytes(b'{"weight/0/a":' * 100_000),
    "lists nested too deep": safetensors_bytes(b"[" * 10**6),
    "data beyond the end": safetensors_bytes(b'{"weight/0/layer.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'),
    "a shape that overflows": safetensors_bytes(
        b'{"weight/0/layer.bias":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'
    ),
    "offsets that go back": safetensors_bytes(
        b'{"weight/0/layer.bias":{"dtype":"F32","shape":[5],"data_offsets":[20,0]}}', bytes(20)
    ),
    "tensors that overlap": safetensors_bytes(
        b'{"weight/0/layer.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]},'
        b'"exp_avg/0/layer.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}',
        bytes(20),
    ),
    "a step beyond all numbers": safetensors_bytes(
        b'{"__metadata__":{"scalars":"{\\"layer.bias\\": {\\"step\\": 1' + b"0" * 400 + b'}}"},'
        b'"weight/0/layer.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}',
        bytes(20),
    ),
    "numbers nested too deep": safetensors_bytes(
        b'{"__metadata__":{"scalars":"' + b"[" * 100_000 + b'"},'
        b'"weight/0/layer.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}',
        bytes(20),
    ),
    "a start beyond all numbers": safetensors_bytes(
        b'{"weight/' + b"9" * 5000 + b'/layer.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}', bytes(20)
    ),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers(tmp_path: Path, header: str) -> None:
    """Of a tensor file whose hash is right."""
    path = publish(tmp_path, 1)
    (path / "rank00001-00000.safetensors").write_bytes(HEADERS[header])
    seal(path, 1)
    with pytest.raises(RejectedError, match=r"rank00001-00000\.safetensors is damaged"):
        read(path)


@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_json_larger_than_any_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its size is enough, a hash that fits does not help."""
    path = publish(tmp_path, 1)
    size = (path / name).stat().st_size
    monkeypatch.setattr(manifest, "LARGEST_JSON_BYTES", size)
    if name == MANIFEST:  # the other one is larger
        manifest.read_manifest(path)
    else:
        read(path)
    monkeypatch.setattr(manifest, "LARGEST_JSON_BYTES", size - 1)
    with pytest.raises(RejectedError, match=rf"{name} has {size} bytes, more than any real one"):
        manifest.read_manifest(path) if name == MANIFEST else read(path)


@pytest.mark.parametrize("depth", [200, 500, 800, 900, 950, 990, 1000, 1100, 100_000])
def test_json_nested_deep(tmp_path: Path, depth: int) -> None:
    """At any depth: what can be parsed is compared, and shown, or refused."""
    path = publish(tmp_path / "checkpoints", 1)
    raw = (path / STATE).read_bytes()
    (path / STATE).write_bytes(raw.replace(b'"run": {}', b'"run": {"deep": ' + b"[" * depth + b"]" * depth + b"}"))
    seal(path, 1)
    # Where it can be read, it is no run of ours.
    with pytest.raises((RejectedError, ConfigError)) as caught:
        find_checkpoint("must", tmp_path, {})
    str(caught.value).encode()


# -- whole runs ---------------------------------------------------------------------------------------------------------


def command(output: Path, *more: str) -> list[str]:
    """The demo at its smallest."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
    changes: dict[str, Any] = {
        "train__epochs": 2,
        "task__max_train_examples": 16,
        "task__max_eval_examples": 8,
        "schedule__stages": 2,
    }
    changes |= {"checkpoint__keep": 9, "train__logging_steps": 3}
    changes |= {"train__global_batch_size": 8, "train__save_model": "none", "checkpoint__every_steps": 1, "run__threads": 1}
    return ["train", *options(run__output_dir=str(output), model__overrides=small, **changes), *more]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of four steps in two stages that could go on from steps 1, 2 and 3."""
    output = tmp_path_factory.mktemp("ended")
    answer = in_process(*command(output))
    assert answer.code == 0, answer.err
    (output / "a" / "summary.json").unlink()
    shutil.rmtree(output / "a" / "checkpoints" / "step-00000004")
    return output


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(ended, tmp_path / "output")
    return tmp_path / "output"


def newest(output: Path) -> Path:
    return output / "a" / "checkpoints" / "step-00000003"


def resume(output: Path, how: str = "auto") -> Answer:
    """`--resume auto`, or the path of the newest checkpoint."""
    return in_process(*command(output, "--resume", str(newest(output)) if how == "PATH" else how))


@pytest.mark.parametrize("name", [MANIFEST, STATE, SHARD])
def test_a_run_meets_pickles(run: Path, marker: Path, name: str) -> None:
    """It goes on from the checkpoint before."""
    (newest(run) / name).write_bytes(pickled(marker, "torch"))
    if name != MANIFEST:
        seal(newest(run), 3)
    for folder in (newest(run), newest(run).parent, run / "a"):
        for other in OTHERS:
            (folder / other).write_bytes(pickled(marker, "torch"))
    refused = resume(run, "PATH")
    assert refused.code == 2
    assert name in refused.err
    answer = resume(run)
    assert answer.code == 0, answer.err
    (record,) = records(run / "a", "resume")
    assert record["step"] == 2
    assert not marker.exists()


def test_a_model_folder_full_of_pickles(run: Path, marker: Path) -> None:
    """What lies where the model is exported to is replaced and never read."""
    model = run / "a" / "model"
    model.mkdir()
    for name in (*OTHERS, "model.safetensors", "config.json", "tokenizer.json", "training_args.bin"):
        (model / name).write_bytes(pickled(marker, "pickle"))
    answer = in_process(*command(run, "--resume", "auto", "--set", "train.save_model=last"))
    assert answer.code == 0, answer.err
    assert not marker.exists()
    assert not (model / "optimizer.pt").exists()


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all values that hold no others, and of those that do."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from leaves(one, (*path, key))


def put(state: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    holder: Any = state
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value


WRONG: list[Any] = [None, "x", -1, 1.5, True, [], {}, [[]], {"": None}, 10**400, "nan", 0]
# What a run does not read again.
UNREAD = ("config", "seed", "epoch", "position", "learning_rate")


@pytest.mark.slow
def test_a_state_with_any_value_of_another_type(ended: Path, tmp_path: Path) -> None:
    """Each value in turn, with a hash that fits: refused in a line, or of no account; never a traceback."""
    state = json.loads((newest(ended) / STATE).read_text())
    paths = [path for path in leaves(state) if path[0] not in UNREAD and path[0] != "run" and path[:1] != ("parameters",)]
    assert len(paths) > 40
    failures = []
    for number, path in enumerate(paths):
        for value in (WRONG[number % len(WRONG)], WRONG[(5 * number + 3) % len(WRONG)]):
            output = tmp_path / "output"
            shutil.copytree(ended, output)
            reseal(newest(output), lambda content, path=path, value=value: put(content, path, value))  # type: ignore[misc]
            try:
                answer = resume(output, "PATH")
                if answer.code not in (0, 2) or answer.err.count("\n") > 1:
                    failures.append(f"{path} = {value!r}: {answer.code} {answer.err}")
            except Exception as error:
                failures.append(f"{path} = {value!r}: {type(error).__name__}: {error}")
            shutil.rmtree(output)
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("step",), 2),
        (("step",), 3.0),
        (("stage",), "2"),
        (("stage",), 1),
        (("stage",), 9),
        (("progress",), []),
        (("progress", "step"), None),
        (("progress", "evaluation_due"), "no"),
        (("progress", "best"), {"accuracy": "high"}),
        (("progress", "stages"), [{"stage": 1}]),
        (("progress", "stages", 0, "train_seconds"), "long"),
        (("progress", "stages", 0, "more"), 1),
        (("meter", "seconds"), {}),
        (("unlogged",), [None]),
        (("metrics_bytes",), -1),
        (("world_size",), 0),
        (("versions",), None),
        (("run",), None),
        (("parameters",), {}),
    ],
)
def test_a_state_with_a_wrong_value(run: Path, path: tuple[str | int, ...], value: Any) -> None:
    """Refused with the value's name, before the run folder is touched."""
    reseal(newest(run), lambda content: put(content, path, value))
    before = contents_of(run)
    answer = resume(run, "PATH")
    assert answer.code == 2
    assert answer.err.startswith(f"progscale: checkpoint {newest(run)}: ")
    assert answer.err.count("\n") == 1
    assert contents_of(run) == before


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what is shown ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[/b]", "[/]", "[link=file:///etc/passwd]"])
def test_brackets_in_what_is_shown(run: Path, text: str) -> None:
    """A message is shown as it is."""
    content = {"format": manifest.FORMAT, "step": 3, "files": {text: {}}}
    (newest(run) / MANIFEST).write_bytes(canonical(content))
    answer = resume(run)
    assert answer.code == 0, answer.err
    assert text in answer.out


@pytest.mark.parametrize("name", ["\ud800", "\x1b[2J\x1b]0;owned\x07", "a\nprogscale: all is well"])
def test_names_that_no_terminal_should_get(run: Path, name: str) -> None:
    """Half characters, control sequences and line ends are shown as text."""
    reseal(newest(run), lambda content: content["parameters"].update({name: 1}))
    refused = resume(run, "PATH")
    assert refused.code == 2
    assert refused.err[:-1].isprintable()
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    reset_accelerate()
    with contextlib.redirect_stdout(shown):
        assert main(command(run, "--resume", "auto")) == 0


@pytest.mark.parametrize("length", [300, 5000])
def test_a_path_that_no_system_takes(length: int) -> None:
    with pytest.raises(RejectedError, match="there is no such folder"):
        locate(Path("x" * length))


@pytest.mark.parametrize("name", [".tmp-00000003-0123", ".old-step-00000003"])
def test_a_leftover_by_its_path(run: Path, name: str) -> None:
    """Somebody looks for what can be saved, and names it: it is refused, and not deleted."""
    leftover = newest(run).with_name(name)
    shutil.copytree(newest(run), leftover)
    answer = in_process(*command(run, "--resume", str(leftover)))
    assert answer.code == 2
    assert "left over or put aside in this run's own folder" in answer.err
    assert leftover.exists()
    copy = run.parent / "copy"
    shutil.move(leftover, copy)
    assert in_process(*command(run, "--resume", str(copy))).code == 0


# -- what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not faultfs.SUPPORTED, reason="the shim knows x86-64 Linux alone")
def test_nothing_outside_is_written(run: Path, marker: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Seen from below libc: a run that tidies up, rejects, puts aside, goes on and saves changes its own folder alone."""
    root = run.parent
    outside = publish(root / "outside", 7)
    before = contents_of(root / "outside")
    folder = newest(run).parent
    (folder / ".tmp-00000009-link").symlink_to(outside)
    (folder / ".old-step-00000002").symlink_to(outside)
    (folder / ".old-step-00000008").symlink_to(outside)
    (folder / "step-00000011").symlink_to(outside)
    (folder / ".latest.json").symlink_to(root / "outside" / "made")
    write_contents(folder / "step-00000012", contents(outside))
    seal(folder / "step-00000012", 12)
    manifest_of_12 = folder / "step-00000012" / MANIFEST
    manifest_of_12.write_bytes(
        manifest_of_12.read_bytes().replace(b"state.json", b"../../../../outside/step-00000007/state.json")
    )
    (newest(run) / STATE).write_bytes(pickled(marker, "torch"))
    seal(newest(run), 3)
    with FaultyForks(root, "kill", tmp_path_factory.mktemp("cache")) as forks:
        operations = forks.operations(command(run, "--resume", "auto"))
    assert {one.path.split("/")[0] for one in operations} == {"output"}
    assert contents_of(root / "outside") == before
    assert records(run / "a", "resume")[-1]["step"] == 2
    assert not marker.exists()
