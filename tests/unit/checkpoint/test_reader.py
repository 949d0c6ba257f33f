"""Damage of any kind is found before a weight is changed, and the file is named; what is whole comes back to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from progscale.checkpoint.manifest import MANIFEST, STATE
from progscale.checkpoint.reader import Checkpoint, check_fits, index, load_weights, open_checkpoint, verify, verify_together
from progscale.checkpoint.shards import WEIGHT, open_shard
from progscale.engine.base import Engine
from progscale.engine.state import MASTER
from progscale.errors import RejectedError
from tests.harness import checkpoints
from tests.harness.programs import in_process, records
from tests.harness.programs import settings as options
from tests.harness.small import (
    FILES,
    PARAMETERS,
    SHARD,
    contents,
    frozen,
    live,
    publish,
    reseal,
    safetensors_bytes,
    seal,
    tensor,
    write_contents,
    write_files,
)

EXAMPLES = [pytest.param(200, id="200"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]
# The ordinary list is the same each time, the long one another, whose failures are shown as code to run again.
FUZZ = settings(deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck))

Files = dict[str, bytes]


def read(path: Path) -> Checkpoint:
    """All that is done before a checkpoint is used."""
    checkpoint = open_checkpoint(path)
    verify(checkpoint)
    return checkpoint


def rejected(path: Path, name: str) -> None:
    """Refused with the checkpoint's path and the file's name in the message."""
    with pytest.raises(RejectedError) as caught:
        read(path)
    assert str(caught.value).startswith(f"checkpoint {path}: ")
    assert name in caught.value.reason


def test_a_whole_one(tmp_path: Path) -> None:
    path = publish(tmp_path, 7)
    checkpoint = read(path)
    assert (checkpoint.path, checkpoint.step) == (path, 7)
    assert sorted(checkpoint.shard_names) == sorted(set(FILES) - {MANIFEST, STATE})
    assert checkpoint.bytes == sum(len(raw) for name, raw in contents(path).items() if name != MANIFEST)
    assert verify_together(path) == checkpoint
    elements = {name: 0 for name in PARAMETERS}
    for stored in index(checkpoint):
        elements[stored.name] += stored.end - stored.start
        with open_shard(stored.path) as file:
            part = stored.cut(file, stored.start, stored.end)
        for kind, found in part.tensors.items():
            assert torch.equal(found, tensor(stored.name, kind, 7)[stored.start : stored.end])
        assert set(part.tensors) == ({MASTER} if "embeddings" in stored.name else {MASTER, "exp_avg", "exp_avg_sq"})
        assert part.scalars == ({} if "embeddings" in stored.name else {"step": 7.0})
    assert elements == PARAMETERS


# -- damage -------------------------------------------------------------------------------------------------------------


def truncated(length: Callable[[int], int]) -> Callable[[Files, Files, str], None]:
    def damage(files: Files, other: Files, name: str) -> None:
        files[name] = files[name][: length(len(files[name]))]

    return damage


def add(text: bytes) -> Callable[[Files, Files, str], None]:
    def damage(files: Files, other: Files, name: str) -> None:
        files[name] += text

    return damage


def swapped(files: Files, other: Files, name: str) -> None:
    files[name] = other[name]


DAMAGE: dict[str, Callable[[Files, Files, str], object]] = {
    "truncated to nothing": truncated(lambda size: 0),
    "truncated to a byte": truncated(lambda size: 1),
    "truncated to half": truncated(lambda size: size // 2),
    "a byte short": truncated(lambda size: size - 1),
    "a byte more": add(b"\0"),
    "a line more": add(b"\n"),
    "deleted": lambda files, other, name: files.pop(name),
    "of another checkpoint": swapped,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(quick: Path, damage: str, name: str) -> None:
    path, other = publish(quick, 1), publish(quick, 2)
    files = contents(path)
    DAMAGE[damage](files, contents(other), name)
    write_contents(path, files)
    # A manifest of another checkpoint is a good one, of files that are not here.
    rejected(path, name if (damage, name) != ("of another checkpoint", MANIFEST) else STATE)


def test_two_files_in_each_others_place(quick: Path) -> None:
    path = publish(quick, 1)
    files = contents(path)
    first, second = "rank00000-00001.safetensors", "rank00001-00000.safetensors"
    write_contents(path, files | {first: files[second], second: files[first]})
    rejected(path, ".safetensors")


def test_files_that_nobody_listed_are_left_alone(quick: Path) -> None:
    path = publish(quick, 1)
    (path / "rank00009-00000.safetensors").write_bytes(b"x")
    (path / "notes.txt").write_text("kept for the paper")
    assert read(path).step == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("name", FILES)
def test_no_files_at_all(quick: Path, name: str, make: Callable[[Path], None]) -> None:
    path = publish(quick, 1)
    (path / name).unlink()
    make(path / name)
    rejected(path, f"{name} is no plain file")


@pytest.mark.parametrize("examples", EXAMPLES)
def test_one_flipped_bit(quick: Path, examples: int) -> None:
    """In any file, at any place: it is seen, and the file is named."""
    files = contents(publish(quick, 1))
    places = [(name, bit) for name, raw in files.items() for bit in range(8 * len(raw))]
    hit: set[str] = set()

    @settings(FUZZ, max_examples=examples)
    @given(st.integers(0, len(places) - 1))
    def check(number: int) -> None:
        # Neighbours of a drawn number are likelier to be drawn: any order will do that has none.
        name, bit = places[number * 7919 % len(places)]
        damaged = bytearray(files[name])
        damaged[bit // 8] ^= 1 << bit % 8
        rejected(write_contents(quick / "damaged", files | {name: bytes(damaged)}), name)
        hit.add(name)

    assert len(places) % 7919
    check()
    assert hit == set(FILES)


@pytest.mark.slow
def test_every_flipped_bit(quick: Path) -> None:
    files = contents(publish(quick, 1))
    path = write_contents(quick / "damaged", files)
    for name, raw in files.items():
        for bit in range(8 * len(raw)):
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(damaged)
            rejected(path, name)
        (path / name).write_bytes(raw)
    read(path)


# -- any bytes ----------------------------------------------------------------------------------------------------------

CHANGES = st.one_of(
    st.tuples(st.just("flip"), st.sampled_from(FILES), st.integers(0, 10**6), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 10**6)),
    st.tuples(st.just("insert"), st.sampled_from(FILES), st.integers(0, 10**6), st.binary(max_size=20)),
    st.tuples(st.just("zero"), st.sampled_from(FILES), st.integers(0, 10**6), st.integers(1, 4096)),
    st.tuples(st.just("copy"), st.sampled_from(FILES), st.sampled_from(FILES), st.just(0)),
    st.tuples(st.just("swap"), st.sampled_from(FILES), st.sampled_from(FILES), st.just(0)),
    st.tuples(st.just("delete"), st.sampled_from(FILES), st.just(0), st.just(0)),
)


def mutate(files: Mapping[str, bytes], kind: str, name: str, where: int | str, what: int | bytes) -> Files:
    """One change of the files' bytes."""
    changed = dict(files)
    raw = changed.get(name, b"")
    if isinstance(where, str):
        if kind == "swap":
            changed[where], changed[name] = raw, changed.get(where, b"")
        else:
            changed[where] = raw
        return changed
    place = where % (len(raw) + 1)
    if kind == "delete":
        changed.pop(name, None)
    elif isinstance(what, bytes):
        changed[name] = raw[:place] + what + raw[place:]
    elif kind == "flip":
        changed[name] = raw[:place] + bytes(byte ^ what for byte in raw[place : place + 1]) + raw[place + 1 :]
    elif kind == "cut":
        changed[name] = raw[:place] + raw[place + what % (len(raw) + 1) :]
    else:
        changed[name] = raw[:place] + bytes(len(raw[place : place + what])) + raw[place + what :]
    return changed


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_bytes(quick: Path, examples: int) -> None:
    """Whatever was done to the files: either they are as they were, or the checkpoint is rejected; nothing else is raised."""
    whole = contents(publish(quick, 1))
    outcomes = {True: 0, False: 0}

    @settings(FUZZ, max_examples=examples)
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def check(changes: list[tuple[str, str, int | str, int | bytes]]) -> None:
        files = dict(whole)
        for change in changes:
            files = mutate(files, *change)
        path = write_contents(quick / "damaged", files)
        refusal = verdict(path)
        assert (files == whole) == (refusal is None)
        assert refusal is None or str(path) in str(refusal)
        outcomes[files == whole] += 1

    check()
    assert outcomes[False] > 0.7 * examples


def verdict(path: Path) -> RejectedError | None:
    """Why a checkpoint is rejected; None when it is not."""
    try:
        read(path)
    except RejectedError as error:
        return error
    return None


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_bytes_under_a_manifest_that_fits(quick: Path, examples: int) -> None:
    """Somebody made the hashes anew: nothing but RejectedError is raised, whatever the files hold."""
    whole = contents(publish(quick, 1))
    sealed = [name for name in FILES if name != MANIFEST]

    @settings(FUZZ, max_examples=examples)
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def check(changes: list[tuple[str, str, int | str, int | bytes]]) -> None:
        files = dict(whole)
        for change in changes:
            files = mutate(files, *change)
        path = write_contents(quick / "damaged", files)
        seal(path, 1, [name for name in sealed if name in files])
        verdict(path)

    check()


EMPTY: st.SearchStrategy[Any] = st.sampled_from([None, [], {}])
VALUES = EMPTY | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400)
KEYS = st.sampled_from(["weight", "exp_avg", "step", "", "weight/0", "weight/0/layer.bias", "weight/x/layer.bias"]) | st.builds(
    "{}/{}/{}".format,
    st.sampled_from(["weight", "exp_avg", "step", ""]),
    st.sampled_from(["0", "1", "-1", "00", " 0", "0x0", "1e3", "", "9" * 30, "9" * 5000, "٣"]),
    st.sampled_from([*PARAMETERS, "", "/", "layer/bias", "\ud800"]),
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "?"]),
        "shape": st.lists(st.sampled_from([0, 1, 5, 24, 40, -1, 2**40]), max_size=2),
        "data_offsets": st.sampled_from([[0, 0], [0, 20], [0, 10], [20, 40], [0, 2**50], [-1, 3]]),
    }
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_header(quick: Path, examples: int) -> None:
    """Of a tensor file whose hash is right."""
    whole = contents(publish(quick, 1))
    scalars = st.none() | st.dictionaries(
        st.sampled_from([*PARAMETERS, ""]), VALUES | st.dictionaries(st.text(max_size=4), VALUES)
    )

    @settings(FUZZ, max_examples=examples)
    @given(st.dictionaries(KEYS, ENTRY, max_size=3), scalars, st.booleans())
    def check(entries: dict[str, object], scalars: object, as_text: bool) -> None:
        metadata = {"__metadata__": {"scalars": json.dumps(scalars) if as_text else scalars}}
        header = json.dumps({**metadata, **entries}).encode()
        path = write_contents(quick / "damaged", whole | {"rank00001-00000.safetensors": safetensors_bytes(header, bytes(40))})
        seal(path, 1)
        assert verdict(path) is not None

    check()


# -- ranges that do not make up the parameters ---------------------------------------------------------------------------


def seal_files(root: Path, slices: list[object], parameters: Mapping[str, object] = PARAMETERS) -> Path:
    """A checkpoint with these slices, whatever they are."""
    path = publish(root, 1)
    for entry in path.glob("*.safetensors"):
        entry.unlink()
    write_files(path, slices)  # type: ignore[arg-type]
    seal(path, 1)
    reseal(path, lambda state: state.update(parameters=dict(parameters)))
    return path


EMBEDDINGS, BIAS = frozen("embeddings.weight", 0, 24, 1), live("layer.bias", 0, 5, 1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([live("layer.weight", 0, 40, 1)], None),
        ([live("layer.weight", 20, 40, 1), live("layer.weight", 0, 20, 1)], None),
        ([], "layer.weight is missing"),
        ([live("layer.weight", 1, 40, 1)], "of layer.weight has not each of its 40 elements once"),
        ([live("layer.weight", 0, 39, 1)], "of layer.weight has not each of its 40 elements once"),
        ([live("layer.weight", 0, 20, 1), live("layer.weight", 21, 40, 1)], "not each of its 40 elements once"),
        ([live("layer.weight", 0, 20, 1), live("layer.weight", 19, 40, 1)], "not each of its 40 elements once"),
        ([live("layer.weight", 0, 40, 1), live("layer.weight", 3, 9, 1)], "not each of its 40 elements once"),
        ([live("layer.weight", 0, 40, 1), live("layer.weight", 39, 40, 1)], "not each of its 40 elements once"),
        # Moments for a part of a parameter.
        ([live("layer.weight", 0, 20, 1), frozen("layer.weight", 20, 40, 1)], "exp_avg of layer.weight has not each"),
    ],
)
def test_ranges(quick: Path, weights: list[object], message: str | None) -> None:
    path = seal_files(quick, [EMBEDDINGS, BIAS, *weights])
    if message is None:
        assert read(path).step == 1
    else:
        rejected(path, message)


def test_a_range_in_two_files(quick: Path) -> None:
    path = seal_files(quick, [EMBEDDINGS, BIAS, live("layer.weight", 0, 40, 1)])
    write_files(path, [live("layer.weight", 0, 40, 1)], rank=1)
    seal(path, 1)
    rejected(path, "of layer.weight has not each of its 40 elements once")


def test_step_counts_that_differ(quick: Path) -> None:
    path = seal_files(quick, [EMBEDDINGS, BIAS, live("layer.weight", 0, 20, 1)])
    write_files(path, [live("layer.weight", 20, 40, 1)], rank=1)
    file = path / "rank00001-00000.safetensors"
    file.write_bytes(file.read_bytes().replace(rb"\"step\": 1.0", rb"\"step\": 2.0"))
    seal(path, 1)
    rejected(path, "layer.weight has several step counts")


def test_what_has_no_elements_is_in_no_file(quick: Path) -> None:
    """A buffer may be empty."""
    read(seal_files(quick, [EMBEDDINGS, BIAS, live("layer.weight", 0, 40, 1)], {**PARAMETERS, "empty": 0}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({**PARAMETERS, "more": 3}, "more is missing"),
        ({name: PARAMETERS[name] for name in ("embeddings.weight", "layer.weight")}, "layer.bias is no parameter of its model"),
        ({**PARAMETERS, "layer.bias": 6}, "of layer.bias has not each of its 6 elements once"),
        ({**PARAMETERS, "layer.bias": -5}, "not each of its -5 elements once"),
        ({**PARAMETERS, "layer.bias": "5"}, "layer.bias is missing"),
        ({**PARAMETERS, "layer.bias": 5.0}, "layer.bias is missing"),
        ({**PARAMETERS, "layer.bias": None}, "layer.bias is missing"),
        ({**PARAMETERS, "layer.bias": 0}, "layer.bias is no parameter of its model"),
    ],
)
def test_parameters_that_are_not_those_of_the_model(quick: Path, parameters: Mapping[str, object], message: str) -> None:
    path = seal_files(quick, [EMBEDDINGS, BIAS, live("layer.weight", 0, 40, 1)], parameters)
    rejected(path, message)


@pytest.mark.parametrize(
    "state", [[], 3, None, "state", {}, {"step": 1}, {"step": 2, "parameters": {}}, {"step": 1, "parameters": []}]
)
def test_a_state_of_another_checkpoint(quick: Path, state: object) -> None:
    path = publish(quick, 1)
    (path / STATE).write_text(json.dumps(state))
    seal(path, 1)
    rejected(path, "state.json does not belong to its manifest")


def test_a_share_of_the_files_is_hashed(quick: Path) -> None:
    """The other ranks hash the rest."""
    path = publish(quick, 1)
    raw = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    checkpoint = open_checkpoint(path)
    verify(checkpoint, [name for name in checkpoint.shard_names if name != SHARD])
    for share in ([SHARD], None):
        with pytest.raises(RejectedError, match=rf"{SHARD} is damaged"):
            verify(checkpoint, share)


# -- an engine, and a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a trained model after steps 1 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints.run_and_save("plain", str(folder), "progtuning", [1, 3])
    return folder


@pytest.mark.parametrize("damage", ["a byte short", "truncated to half", "deleted", "of another checkpoint"])
def test_no_weight_changes_before_all_is_read(saved: Path, tmp_path: Path, damage: str) -> None:
    """Whatever file it is, the model is as it was."""
    engine, builds = checkpoints.make("plain", "progtuning", {}, seed=1)
    before = engine.digests(list(engine.parameters))
    other = contents(saved / "step-00000001")
    files = contents(saved / "step-00000003")
    assert len(files) > 4
    for name in files:
        changed = dict(files)
        if damage == "of another checkpoint" and name not in other:
            continue
        DAMAGE[damage](changed, other, name)
        path = write_contents(tmp_path / "damaged", changed)
        with pytest.raises(RejectedError):
            verify_together(path)
        assert engine.digests(list(engine.parameters)) == before
    engine.begin_stage(builds[0])
    engine.close()


def test_a_model_with_other_tensors(saved: Path) -> None:
    """Another release of a library may give a model a buffer more; nothing is loaded then."""
    engine, builds = checkpoints.make("plain", "progtuning", {}, seed=1)
    checkpoint = open_checkpoint(saved / "step-00000003")
    check_fits(checkpoint, engine)
    engine.module.register_buffer("more", torch.zeros(3))
    with pytest.raises(RejectedError, match="more has 0 elements, and in this run's model 3"):
        check_fits(checkpoint, engine)
    engine.begin_stage(builds[0])
    engine.close()


def test_a_disk_that_fails_while_weights_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks are told, and none waits."""
    engine, builds = checkpoints.make("plain", "progtuning", {}, seed=1)
    checkpoint = verify_together(saved / "step-00000003")

    def stale(*arguments: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("progscale.checkpoint.reader.open_shard", stale)
    with pytest.raises(RejectedError, match=r"it cannot be read .*Stale file handle"):
        load_weights(checkpoint, engine)
    engine.begin_stage(builds[0])
    engine.close()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that ended after step 2 of 4 without a summary; its checkpoints are those of steps 1 and 2."""
    output = tmp_path_factory.mktemp("stopped")
    answer = in_process(*command(output))
    assert answer.code == 0, answer.err
    (output / "a" / "summary.json").unlink()
    return output


def command(output: Path, *more: str) -> list[str]:
    """The demo at its smallest."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
    changes: dict[str, Any] = {
        "train__max_steps": 2,
        "task__max_train_examples": 16,
        "task__max_eval_examples": 8,
        "schedule__stages": 1,
    }
    changes |= {"train__global_batch_size": 8, "train__save_model": "none", "checkpoint__every_steps": 1, "run__threads": 1}
    return ["train", *options(run__output_dir=str(output), model__overrides=small, **changes), *more]


@pytest.mark.parametrize("name", [MANIFEST, STATE, SHARD])
def test_a_run_falls_back_and_says_so(stopped: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume auto` takes the one before, `--resume PATH` refuses; nothing was loaded until then."""
    output = tmp_path / "output"
    shutil.copytree(stopped, output)
    newest = output / "a" / "checkpoints" / "step-00000002"
    file = newest / name
    raw = bytearray(file.read_bytes())
    raw[random.Random(name).randrange(len(raw))] ^= 1
    file.write_bytes(raw)

    loads: list[Path] = []
    load = checkpoints.load_weights

    def load_and_note(found: Checkpoint, engine: Engine) -> None:
        loads.append(found.path)
        load(found, engine)

    monkeypatch.setattr("progscale.session.load_weights", load_and_note)
    answer = in_process(*command(output, "--resume", str(newest)))
    assert answer.code == 2
    assert answer.err.startswith(f"progscale: checkpoint {newest}: {name} ")
    assert answer.err.count("\n") == 1
    assert loads == []

    answer = in_process(*command(output, "--resume", "auto"))
    assert answer.code == 0, answer.err
    assert f"rejected: checkpoint {newest}: {name} " in answer.out
    assert "step-00000001: step 1 of 2" in answer.out
    assert [path.name for path in loads] == ["step-00000001"]
    (record,) = records(output / "a", "resume")
    assert record["step"] == 1
    assert len(record["rejected"]) == 1
    assert name in record["rejected"][0]
    assert (newest.parent / "rejected-step-00000002" / name).read_bytes() == raw, "kept for whoever looks into it"
    assert read(newest).step == 2


def test_none_is_valid(stopped: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(stopped, output)
    for path in (output / "a" / "checkpoints").glob("step-*"):
        (path / SHARD).unlink()
    answer = in_process(*command(output, "--resume", "must"))
    assert answer.code == 2
    assert "needs a valid checkpoint, and there is 2 there, all of them rejected" in answer.err
    answer = in_process(*command(output, "--resume", "auto"))
    assert answer.code == 0
    assert "starting fresh" in answer.out.replace("\n", " ")
    assert (output / "a.1" / "checkpoints" / "step-00000001" / STATE).exists(), "what was there is moved, never deleted"


def test_weights_alone_are_read_for_the_model(quick: Path) -> None:
    """A range of a file, and only the kinds asked for."""
    (stored,) = [one for one in index(read(publish(quick, 1))) if (one.name, one.start) == ("layer.weight", 22)]
    with open_shard(stored.path) as file:
        part = stored.cut(file, 25, 31, [WEIGHT])
    assert list(part.tensors) == [MASTER]
    assert torch.equal(part.tensors[MASTER], tensor("layer.weight", MASTER, 1)[25:31])
