"""Which checkpoint a run goes on from, and which runs it belongs to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progscale.checkpoint.manifest import canonical
from progscale.checkpoint.reader import Checkpoint, open_checkpoint
from progscale.checkpoint.store import Store
from progscale.config import decisive_values, load_config
from progscale.errors import ConfigError, RejectedError
from progscale.numbers import decode_scores, encode_numbers
from progscale.resume import check_same_run, derive_stage, find_checkpoint, fingerprint, locate, stage_values
from progscale.schedule import build_stages
from progscale.tasks.base import Tokenized
from progscale.tasks.ragged import Ragged

IDENTITY = {"schedule.name": "progtuning", "model.name": "bert"}
STAGES = build_stages("progtuning", num_blocks={"blocks": 4}, stages=3, total_steps=6, embeddings="always", options={})


def publish(root: Path, step: int, **state: Any) -> Path:
    """A checkpoint without tensors."""
    store = Store(root, keep=10)
    content = {**saved_state(step), **state}
    return store.publish(store.begin(step), step, content, {})


def saved_state(step: int) -> dict[str, Any]:
    """All that state.json must have."""
    seconds = dict.fromkeys(("evaluation_seconds", "saving_seconds", "switch_seconds", "earlier_seconds"), 0.5)
    progress = {"step": step, "stage": 1, "evaluation_due": False, "metrics": {"loss": "nan"}, "best": {}, "best_step": 0}
    meter = dict.fromkeys(("rows", "tokens", "skipped_steps", "volume_before"), 0)
    return {
        **{"step": step, "stage": 1, "run": IDENTITY, "engine": "plain", "world_size": 1, "versions": {}, "loss_scale": None},
        **{"learning_rate": 0.1, "unlogged": [], "metrics_bytes": 0, "parameters": {}},
        "progress": {**progress, **seconds, "stages": [], "skipped_in_a_row": 0, "carried": "none"},
        "meter": {**meter, "seconds": 0.0, "audit_seconds": 0.0, "peak": {}},
    }


def test_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (1, 12, 3):
        publish(tmp_path / "checkpoints", step)
    found = find_checkpoint("auto", tmp_path, IDENTITY)
    assert found is not None
    assert (found.checkpoint.step, found.in_place, found.rejected) == (12, True, ())


def test_a_damaged_one_is_named_and_left_out(tmp_path: Path) -> None:
    publish(tmp_path / "checkpoints", 1)
    newest = publish(tmp_path / "checkpoints", 2)
    (newest / "state.json").write_bytes(b"{")
    said: list[str] = []
    found = find_checkpoint("must", tmp_path, IDENTITY, said.append)
    assert found is not None
    assert found.checkpoint.step == 1
    (text,) = said
    assert "step-00000002" in text
    assert "state.json has 1 bytes instead of" in text
    with pytest.raises(RejectedError, match=r"state\.json has 1 bytes"):
        find_checkpoint(str(newest), tmp_path, IDENTITY)


def test_none_at_all(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path, IDENTITY) is None
    with pytest.raises(RejectedError, match=r"--resume must needs a valid checkpoint, and there is none there"):
        find_checkpoint("must", tmp_path, IDENTITY)
    newest = publish(tmp_path / "checkpoints", 2)
    (newest / "manifest.json").unlink()
    with pytest.raises(RejectedError, match=r"1 there, all of them rejected: .*manifest\.json is missing"):
        find_checkpoint("must", tmp_path, IDENTITY)
    assert find_checkpoint("auto", tmp_path, IDENTITY) is None


def test_a_path(tmp_path: Path) -> None:
    """Of a checkpoint, of the folder around it, or of the run; it may be another run's folder."""
    publish(tmp_path / "run" / "checkpoints", 1)
    newest = publish(tmp_path / "run" / "checkpoints", 2)
    for path, step in ((newest.with_name("step-00000001"), 1), (newest.parent, 2), (tmp_path / "run", 2)):
        found = find_checkpoint(str(path), tmp_path / "other", IDENTITY)
        assert found is not None
        assert (found.checkpoint.step, found.in_place) == (step, False)
    with pytest.raises(RejectedError, match=r"there is no such folder; --resume takes auto, never, must"):
        locate(tmp_path / "nowhere")
    with pytest.raises(RejectedError, match=r"it has no manifest\.json and holds no checkpoints"):
        locate(tmp_path)


def test_another_run_is_refused_with_both_values(tmp_path: Path) -> None:
    publish(tmp_path / "checkpoints", 1)
    with pytest.raises(ConfigError) as caught:
        find_checkpoint("auto", tmp_path, {"schedule.name": "none", "model.name": "bert", "optimizer.lr": 1e-5})
    assert [fault.key for fault in caught.value.faults] == ["optimizer.lr", "schedule.name"]
    assert 'schedule.name: the checkpoint has "progtuning", this run "none"' in str(caught.value)
    assert "optimizer.lr: the checkpoint has null, this run 1e-05" in str(caught.value)
    assert str(tmp_path / "checkpoints" / "step-00000001") in str(caught.value)


def test_what_follows_is_told_only_where_nothing_else_is(tmp_path: Path) -> None:
    publish(tmp_path, 1, run={"schedule.name": "mine", "schedule's stages": [1], "training data": "a"})
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(str(tmp_path), tmp_path, {"schedule.name": "mine", "schedule's stages": [2], "training data": "a"})
    assert [fault.key for fault in caught.value.faults] == ["schedule's stages"]
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(str(tmp_path), tmp_path, {"schedule.name": "other", "schedule's stages": [2], "training data": "b"})
    assert [fault.key for fault in caught.value.faults] == ["schedule.name"]


@pytest.mark.parametrize("key", sorted(saved_state(1).keys() - {"step"}))
def test_a_state_that_lacks_something(tmp_path: Path, key: str) -> None:
    """Its hashes are right: somebody made it so."""
    path = publish(tmp_path, 1, **{key: [None] if key in ("run", "loss_scale") else {"step": []}})
    with pytest.raises(RejectedError, match=rf"state\.json: {key}|does not belong to its manifest"):
        check_same_run(open_checkpoint(path), IDENTITY)


def test_a_state_that_contradicts_itself(tmp_path: Path) -> None:
    path = publish(tmp_path, 1, progress={**saved_state(1)["progress"], "step": 2})
    with pytest.raises(RejectedError, match="contradicts itself"):
        check_same_run(open_checkpoint(path), IDENTITY)


@pytest.mark.parametrize(
    "key",
    [
        *("run.name=x", "run.threads=1", "train.num_workers=2", "train.micro_batch_size=2", "train.eval_batch_size=1"),
        *("checkpoint.every_steps=3", "train.nonfinite=skip:3", "engine.timeout_seconds=3", "train.gradient_checkpointing=true"),
    ],
)
def test_what_may_change(key: str) -> None:
    assert decisive_values(load_config([], [key])) == decisive_values(load_config())


@pytest.mark.parametrize(
    "key",
    [
        *("schedule.name=none", "schedule.stages=2", "task.max_train_examples=64", "optimizer.lr=0.1", "run.seed=1"),
        *("train.global_batch_size=64", "train.max_length=16", "train.precision=bf16", "train.epochs=2", "train.max_grad_norm=2"),
        *("model.overrides.hidden_dropout_prob=0.2", "train.group_by_length=false", "schedule.embeddings=never"),
    ],
)
def test_what_may_not(key: str) -> None:
    changed, before = decisive_values(load_config([], [key])), decisive_values(load_config())
    assert {name for name in changed if changed[name] != before[name]} == {".".join(key.partition("=")[0].split(".")[:2])}


def opened(tmp_path: Path, step: int, stage: Any) -> Checkpoint:
    return open_checkpoint(publish(tmp_path, step, stage=stage))


@pytest.mark.parametrize(("step", "stage"), [(0, 1), (1, 1), (2, 1), (2, 2), (3, 2), (6, 3)])
def test_the_stage_is_derived(tmp_path: Path, step: int, stage: int) -> None:
    assert derive_stage(STAGES, opened(tmp_path, step, stage)).index == stage


@pytest.mark.parametrize(
    ("step", "stage", "allowed"), [(1, 2, "1"), (2, 3, "1 or 2"), (7, 3, "none"), (3, None, "2"), (3, "2", "2")]
)
def test_a_stage_that_the_schedule_contradicts(tmp_path: Path, step: int, stage: Any, allowed: str) -> None:
    with pytest.raises(RejectedError, match=rf"it names stage .* at step {step}, where the schedule has {allowed}$"):
        derive_stage(STAGES, opened(tmp_path, step, stage))


def test_stages_as_values() -> None:
    assert stage_values(STAGES[1]) == [2, 4, {"blocks": "1-3"}, True]
    gap = replace(STAGES[0], live_blocks={"blocks": (0, 2, 3)})
    assert stage_values(gap)[2] == {"blocks": "0-0,2-3"}


def split_of(rows: list[list[int]], labels: list[int], dtype: type = np.int32) -> Tokenized:
    column = Ragged.from_rows(rows, dtype)
    return Tokenized({"input_ids": column}, column.lengths, {"labels": np.array(labels)})


def test_the_data_are_told_by_their_content() -> None:
    base = fingerprint(split_of([[1, 2], [3]], [0, 1]))
    assert fingerprint(split_of([[1, 2], [3]], [0, 1], np.int64)) == base
    for rows, labels in (([[1], [2, 3]], [0, 1]), ([[1, 2], [4]], [0, 1]), ([[1, 2], [3]], [1, 1])):
        assert fingerprint(split_of(rows, labels)) != base


def test_numbers_that_json_lacks() -> None:
    scores = {"a": float("nan"), "b": float("-inf"), "c": 0.1}
    text = canonical(encode_numbers({"scores": scores, "list": (1, float("inf"))}))
    assert b'"nan"' in text
    back = decode_scores(encode_numbers(scores))
    assert np.isnan(back.pop("a"))
    assert back == {"b": float("-inf"), "c": 0.1}


def test_same_run_after_json(tmp_path: Path) -> None:
    """Tuples become lists on the way to the disk."""
    checkpoint = open_checkpoint(publish(tmp_path, 1, run={"a": [1, [2]]}))
    check_same_run(checkpoint, {"a": (1, (2,))})


def test_ragged_labels_are_part_of_the_data() -> None:
    """Where a target stands decides, and so does where one row of them ends."""
    column = Ragged.from_rows([[5, 6, 7], [8, 9]])

    def found(*rows: list[int]) -> str:
        return fingerprint(Tokenized({"input_ids": column}, column.lengths, {"labels": Ragged.from_rows(rows)}))

    assert found([5, 6, 7], [8, 9]) == found([5, 6, 7], [8, 9])
    assert len({found([5, 6, 7], [8, 9]), found([-100, 6, 7], [8, 9]), found([5, 6], [7, 8, 9])}) == 3


def test_an_option_that_the_checkpoint_is_older_than(tmp_path: Path) -> None:
    """Empty, it asks for nothing that the run of then did not do; filled, it does."""
    checkpoint = open_checkpoint(publish(tmp_path, 1, run={"schedule.name": "none"}))
    check_same_run(checkpoint, {"schedule.name": "none", "optimizer.options": {}, "task.num_beams": None})
    with pytest.raises(ConfigError, match=r"optimizer\.options: the checkpoint has null, this run \{\"momentum\": 0\.5\}"):
        check_same_run(checkpoint, {"schedule.name": "none", "optimizer.options": {"momentum": 0.5}})
