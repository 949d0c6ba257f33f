"""What a stage's record says, against a stage that was counted by hand."""

from __future__ import annotations

import json
import time

import pytest
import torch

from progscale.engine.base import digest
from progscale.errors import AuditError
from progscale.meters import Audit, MemoryMeter, StageMeter
from tests.harness.cases import builds_of, make_engine, row_loss, share
from tests.tiny import tiny_model

CPU = torch.device("cpu")
ROWS, STEPS_PER_EPOCH = 6, 4


def stage_record(skip: tuple[int, ...] = ()) -> tuple[dict, int]:
    """The record of the second of two stages (three steps), and its live elements."""
    module = tiny_model("bert", blocks=2).train()
    engine = make_engine(module, "plain")
    parts, builds = builds_of(module, "progtuning", "never", 2, 6, {})
    engine.begin_stage(builds[0])
    engine.train_step(share(0, ROWS, 101, 0, 1, 3), ROWS, row_loss, 1e-3)
    audit = Audit(engine, builds[1])
    engine.begin_stage(builds[1])
    sizes = {name: info.numel for name, info in parts.parameters.items()}
    meter = StageMeter(engine, builds[1], sizes, MemoryMeter(CPU), audit)
    meter.start()
    for step in range(3, 6):
        loss = (lambda o, y: row_loss(o, y) * float("nan")) if step in skip else row_loss
        result = engine.train_step(share(step, ROWS, 101, 0, 1, 3), ROWS, loss, 1e-3)
        meter.step(ROWS, ROWS * 12, result.applied)
    meter.stop()
    time.sleep(0.2)
    record = meter.finish(steps_per_epoch=STEPS_PER_EPOCH, first_block=1, switch_seconds=0.5, carried="shards")
    assert record.train_seconds < 0.2 + meter.seconds, "time stood still after stop"
    assert meter.seconds == record.train_seconds
    return record.to_json(), parts.count(builds[1].live)


def test_a_record() -> None:
    record, live = stage_record()
    assert json.loads(json.dumps(record)) == record
    assert record["trainable_parameters"] == live
    assert record["planned_updated_parameters"] == record["updated_parameters"] == 3 * live / STEPS_PER_EPOCH
    assert record["samples_per_second"] == pytest.approx(3 * ROWS / record["train_seconds"])
    assert record["tokens_per_second"] == pytest.approx(12 * record["samples_per_second"])
    wanted = {"stage": 2, "first_block": 1, "start_step": 3, "end_step": 6, "skipped_steps": 0, "frozen_changed": 0}
    assert {key: record[key] for key in wanted} == wanted
    assert (record["embeddings_live"], record["switch_seconds"], record["carried"]) == (False, 0.5, "shards")
    assert record["optimizer_state_bytes"] > 8 * live
    assert record["peak_resident_bytes"] > record["peak_memory_bytes"] >= 0
    assert "peak_reserved_bytes" not in record, "a CPU has none"


def test_skipped_steps_are_no_updates() -> None:
    record, live = stage_record(skip=(4,))
    assert record["skipped_steps"] == 1
    assert record["planned_updated_parameters"] == 3 * live / STEPS_PER_EPOCH
    assert record["updated_parameters"] == 2 * live / STEPS_PER_EPOCH


def test_memory_peaks_begin_anew() -> None:
    meter = MemoryMeter(CPU)
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert meter.peak()["peak_memory_bytes"] >= 60 * 2**20, "a peak that is over counts"
    meter.reset()
    assert meter.peak()["peak_memory_bytes"] < 60 * 2**20, "until the next reset"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_digest_sees_any_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).to(dtype).view(4, 6)
    before = digest(tensor)
    assert before == digest(tensor.clone())
    raw = tensor.view(-1).view(torch.uint8)
    for position in (0, len(raw) // 2, len(raw) - 1):
        for bit in (1, 128):
            raw[position] ^= bit
            assert digest(tensor) != before, (position, bit)
            raw[position] ^= bit
    assert digest(tensor) == before
    assert digest(tensor.t()) == digest(tensor.t().contiguous())
    assert digest(torch.empty(0, dtype=dtype)) == ""


def test_minus_zero_is_a_change() -> None:
    """Equal numbers, other bits: what frozen means is the bits."""
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_a_changed_tensor_stops_the_run() -> None:
    module = tiny_model("bert", blocks=2)
    engine = make_engine(module, "plain")
    parts, builds = builds_of(module, "progtuning", "never", 2, 4, {})
    engine.begin_stage(builds[1])
    sizes = {name: info.numel for name, info in parts.parameters.items()}
    audit = Audit(engine, builds[1])
    meter = StageMeter(engine, builds[1], sizes, MemoryMeter(CPU), audit)
    assert audit.changed() == []
    name = parts.names("embeddings")[0]
    with torch.no_grad():
        engine.parameters[name][3, 2].add_(1e-6)
    assert audit.changed() == [name]
    assert audit.seconds > 0
    with pytest.raises(AuditError, match=f"stage 2: 1 frozen tensors changed their bits, the first of them {name}") as caught:
        meter.finish(steps_per_epoch=4, first_block=1, switch_seconds=0.0, carried="none")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("saved_by", "kept"), [("plain, 1", 77), ("zero2, 4", None)])
def test_what_was_sent_is_kept_over_a_resume(saved_by: str, kept: int | None) -> None:
    """A run that goes on near the end of a stage may not come by the step in which it is counted."""
    module = tiny_model("bert", blocks=2).train()
    engine = make_engine(module, "plain")
    parts, builds = builds_of(module, "none", "never", 1, 6, {})
    audit = Audit(engine, builds[0])
    engine.begin_stage(builds[0])
    sizes = {name: info.numel for name, info in parts.parameters.items()}
    meter = StageMeter(engine, builds[0], sizes, MemoryMeter(CPU), audit)
    saved = meter.to_json()
    assert (saved["communicated_bytes"], saved["communicated_by"]) == (0, "plain, 1")
    engine.traffic = None
    meter.restore({**saved, "communicated_bytes": 77, "communicated_by": saved_by})
    assert meter.to_json()["communicated_bytes"] == kept
    engine.traffic = 5
    assert meter.to_json()["communicated_bytes"] == 5, "counted anew"
    engine.close()
