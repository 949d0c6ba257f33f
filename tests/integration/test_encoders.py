"""Encoders with a rule of their own, through the whole program: ALBERT, BigBird, MPNet, and a type that has no family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, BigBirdModel

from tests.harness.programs import Answer, in_process, settings
from tests.harness.tables import OWN_TABLE, write_table
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("empty_folder")

SPARSE = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of four steps on a table; the model is to be put into the folder "model"."""
    write_table(tmp_path)
    return {**OWN_TABLE, "train__max_length": 32, "train__global_batch_size": 16}


def train(table: dict[str, Any], *flags: str, **change: Any) -> Answer:
    return in_process("train", *flags, *settings(**{**table, **change}))


def summary() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("runs/a/summary.json").read_text())
    return content


def refused(answer: Answer, message: str) -> None:
    assert answer.code == 2, answer.err
    assert message in answer.err.splitlines()[-1]
    assert not Path("runs").exists()


def test_one_shared_block_takes_no_stages(table: dict[str, Any]) -> None:
    """In every command; with `none` the embeddings policy still makes stages."""
    tiny_model("albert", vocab_size=256).save_pretrained("model")
    said = "all layers of this albert model share one block, so freezing one freezes all of them"
    refused(train(table), f"schedule.name: 'progtuning' with 2 stages; {said}")
    planned = in_process("plan", "--model", "albert-base-v2", "--epochs", "3")
    refused(planned, f"schedule.name: 'progtuning' with 3 stages; {said}")
    doctor = in_process("doctor", *settings(**table))
    assert doctor.code == 2 and "schedule.name: 'progtuning'" in doctor.out
    answer = train(table, schedule__name="none", schedule__embeddings="first_stage")
    assert answer.code == 0, answer.err
    stages = summary()["stages"]
    assert [stage["frozen_changed"] for stage in stages] == [0, 0]
    assert stages[0]["trainable_parameters"] > stages[1]["trainable_parameters"]
    assert summary()["updated_parameters"] == summary()["planned_updated_parameters"]


def test_sparse_attention_meets_no_short_batch(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in training nor in evaluation, though most texts are shorter than that."""
    tiny_model("big_bird", vocab_size=256, **SPARSE).save_pretrained("model")
    message = "train.max_length: 14; sparse attention over blocks of 2 tokens needs at least 15"
    refused(train(table, train__max_length=14), message)
    turned: list[str] = []
    monkeypatch.setattr(BigBirdModel, "set_attention_type", lambda self, value: turned.append(value))
    answer = train(table)
    assert answer.code == 0, answer.err
    assert turned == []
    assert summary()["updated_parameters"] == summary()["planned_updated_parameters"]
    assert json.loads(Path("runs/a/model/config.json").read_text())["attention_type"] == "block_sparse"


def test_gradient_checkpointing_that_a_model_does_not_support(table: dict[str, Any]) -> None:
    tiny_model("mpnet", vocab_size=256, pad_token_id=0).save_pretrained("model")
    message = "train.gradient_checkpointing: MPNetForSequenceClassification does not support it; set it to false"
    refused(train(table, train__gradient_checkpointing=True), message)
    assert train(table, "--dry-run").code == 0


def test_a_model_type_without_a_family(table: dict[str, Any]) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 256}
    config = AutoConfig.for_model("megatron-bert", **size, max_position_embeddings=64)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("model")
    refused(train(table), "entry-point group 'progscale.families'")
    answer = train(table, model__family="generic")
    assert answer.code == 0, answer.err
    assert "blocks are encoder.layer; embeddings embeddings.word_embeddings" in " ".join(answer.out.split())
    assert [stage["first_block"] for stage in summary()["stages"]] == [0, 1]
    assert [stage["frozen_changed"] for stage in summary()["stages"]] == [0, 0]
    assert summary()["updated_parameters"] == summary()["planned_updated_parameters"]
    tiny_model("albert", vocab_size=256).save_pretrained("model")
    assert "is a list of 1, but its config has num_hidden_layers 4" in train(table, "--dry-run", model__family="generic").err
