"""Tokenised data on disk: found again, built once, rebuilt when damaged, done without where it cannot be written."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import numpy as np
import pytest

from progscale.tasks.base import TASKS
from progscale.tasks.cache import batches_with_progress, cache_dir, cached, fingerprint_texts, fingerprint_tokenizer
from progscale.tasks.demo import demo_tokenizer

KEY = {"kind": "test", "tokenizer": "x"}


def numbers() -> dict[str, np.ndarray]:
    return {"values": np.arange(1000), "count": np.asarray(3)}


def refuse() -> dict[str, np.ndarray]:
    raise AssertionError("built again")


def the_file(cache: Path) -> Path:
    (path,) = (cache / "tokenized").glob("*.bin")
    return path


def test_the_second_time_nothing_is_built(cache: Path) -> None:
    first, second = cached(KEY, numbers), cached(KEY, refuse)
    assert (first["values"] == second["values"]).all() and int(second["count"]) == 3
    assert not list((cache / "tokenized").glob(".tmp*"))


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "digest"])
def test_a_damaged_file_is_built_again(cache: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cached(KEY, numbers)
    path = the_file(cache)
    data = bytearray(path.read_bytes())
    if damage in ("flip", "digest"):
        data[0 if damage == "digest" else len(data) // 2] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(damage, bytes(data)))
    assert len(cached(KEY, numbers)["values"]) == 1000
    assert "is damaged: it is built again" in caplog.text
    cached(KEY, refuse)


def _ask(marks: Path) -> None:
    def build() -> dict[str, np.ndarray]:
        (marks / str(os.getpid())).touch()
        time.sleep(0.5)
        return numbers()

    assert len(cached(KEY, build)["values"]) == 1000


def without_locks(path: Path) -> Any:
    """A lock that a file system of the cluster's does not have."""
    real = filelock.UnixFileLock(path)
    if path.parent.name == "tokenized":

        def missing() -> None:
            raise NotImplementedError("FileSystem does not appear to support flock")

        real._acquire = missing  # type: ignore[method-assign]
    return real


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_several_processes_one_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool) -> None:
    """Of a machine also where the folder's file system has no locks, as Lustre without its option."""
    if not has_locks:
        monkeypatch.setattr(filelock, "FileLock", without_locks)
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ask, args=(marks,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(marks.iterdir())) == 1


def test_a_folder_that_cannot_be_written(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    assert len(cached(KEY, numbers)["values"]) == 1000
    assert "is not kept" in caplog.text and "PROGSCALE_CACHE" in caplog.text


def test_a_failing_build_leaves_nothing(cache: Path) -> None:
    with pytest.raises(AssertionError, match="built again"):
        cached(KEY, refuse)
    assert len(cached(KEY, numbers)["values"]) == 1000


def test_what_the_key_depends_on() -> None:
    assert fingerprint_texts(["ab", "c"]) != fingerprint_texts(["a", "bc"])
    assert fingerprint_texts(["a"], None) != fingerprint_texts(["a"], []) != fingerprint_texts(["a"])
    tokenizer = demo_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    tokenizer(["the fox"] * 2, truncation=True, max_length=3, padding=True)
    assert fingerprint_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["badger"])
    assert fingerprint_tokenizer(tokenizer) != before
    assert fingerprint_tokenizer(SimpleNamespace(is_fast=False)) is None


def test_another_length_is_another_entry(cache: Path) -> None:
    task = TASKS.get("demo")(SimpleNamespace(max_train_examples=20, max_eval_examples=5), seed=0)
    long, short = (task.tokenize(demo_tokenizer(), length)["train"] for length in (32, 4))
    assert long.lengths.max() > short.lengths.max() == 4
    assert len(list((cache / "tokenized").glob("*.bin"))) == 4


def test_the_folder_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROGSCALE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "progscale"


def test_work_comes_in_batches() -> None:
    assert list(batches_with_progress(5, 2, "counting")) == [(0, 2), (2, 4), (4, 5)]
