"""Saving as one rank sees it: what is stored, what a background copy is safe from, and what a failure leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from progscale.checkpoint import shards
from progscale.checkpoint.reader import load_weights, open_checkpoint, verify
from progscale.checkpoint.saver import Saver
from progscale.checkpoint.store import Store
from progscale.engine.base import Engine
from progscale.errors import CheckpointError
from progscale.optim import GroupSpec, StageBuild
from progscale.schedule import Stage
from tests.harness.cases import make_engine
from tests.harness.checkpoints import state_of


class Own(nn.Module):
    """No transformers model, with running statistics."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.lower = nn.Linear(3, 5)
        self.upper = nn.Linear(5, 2)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("derived", torch.full((4,), fill), persistent=False)
        for tensor in (*self.parameters(), self.norm.running_mean):
            assert tensor is not None
            nn.init.constant_(tensor, fill)


def engine_over(fill: float) -> Engine:
    """One whose lower layer is frozen."""
    engine = make_engine(Own(fill), "plain")
    names = tuple(name for name in engine.parameters if not name.startswith("lower"))
    engine.begin_stage(StageBuild(Stage(1, 0, 1, {"blocks": (1,)}, False), (GroupSpec("head", 0.0, names),)))
    return engine


def saver_over(engine: Engine, folder: Path, **options: Any) -> Saver:
    return Saver(engine, Store(folder), shard_bytes=100, **options)


def content(engine: Engine, step: int) -> dict[str, Any]:
    return {"step": step, "parameters": engine.sizes()}


def test_frozen_parameters_and_buffers_too(tmp_path: Path) -> None:
    engine, other = engine_over(0.5), engine_over(-1.0)
    saver_over(engine, tmp_path).save(3, content(engine, 3))
    checkpoint = open_checkpoint(Store(tmp_path).path_of(3))
    verify(checkpoint)
    assert set(checkpoint.state["parameters"]) == {
        *engine.parameters,
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    }
    load_weights(checkpoint, other)
    assert state_of(other) == state_of(engine)
    assert other.module.norm.running_mean.eq(0.5).all()  # type: ignore[union-attr, operator]


def test_a_background_copy_is_that_of_its_step(tmp_path: Path) -> None:
    engine = engine_over(0.5)
    before = state_of(engine)
    saver = saver_over(engine, tmp_path, background=True)
    assert saver.save(1, content(engine, 1)) is None
    assert saver.busy
    with torch.no_grad():
        for parameter in engine.parameters.values():
            parameter.fill_(7.0)
    saved = saver.finish()
    assert saved is not None
    assert (saved.step, saver.busy, saver.finish()) == (1, False, None)
    other = engine_over(-1.0)
    load_weights(open_checkpoint(saved.path), other)
    assert state_of(other) == before


def test_what_must_be_there_at_once_is(tmp_path: Path) -> None:
    engine = engine_over(0.5)
    saver = saver_over(engine, tmp_path, background=True)
    saved = saver.save(1, content(engine, 1), wait=True)
    assert saved is not None
    assert saved.path.is_dir()


def test_the_buffer_is_made_ready_and_stays(tmp_path: Path) -> None:
    engine = engine_over(0.5)
    saver = saver_over(engine, tmp_path, background=True)
    saver.reserve()
    saver.save(1, content(engine, 1))
    buffer = saver._copy.data_ptr()
    saver.finish()
    saver.reserve()
    saver.save(2, content(engine, 2))
    saver.finish()
    assert saver._copy.data_ptr() == buffer != 0
    idle = saver_over(engine, tmp_path)
    idle.reserve()
    assert idle._copy.numel() == 0, "a foreground save needs no copy"


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    engine = engine_over(0.5)
    saver = saver_over(engine, tmp_path, background=background)
    saver.save(1, content(engine, 1), wait=True)
    files = sorted(path for path in tmp_path.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(CheckpointError, match=r"rank 0: .*No space left.* It needs \d+ bytes, \d+ are free there"):
        saver.save(2, content(engine, 2))
        saver.finish()
    assert sorted(path for path in tmp_path.rglob("*")) == files
    monkeypatch.undo()
    saver.save(2, content(engine, 2), wait=True)
    verify(open_checkpoint(Store(tmp_path).path_of(2)))


def test_others_may_read_it(tmp_path: Path) -> None:
    engine = engine_over(0.5)
    before = os.umask(0o022)
    try:
        shards._umask.cache_clear()
        saver_over(engine, tmp_path).save(1, content(engine, 1))
    finally:
        os.umask(before)
        shards._umask.cache_clear()
    modes = {path.name: path.stat().st_mode & 0o777 for path in Store(tmp_path).path_of(1).iterdir()}
    assert set(modes.values()) == {0o644}, modes
