"""An exported model is what was trained, and others can load it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from progscale.engine.base import Engine
from progscale.errors import WriteError
from progscale.export import export_model, exported_origin
from progscale.tasks.demo import demo_tokenizer
from tests.harness.cases import make_engine
from tests.tiny import FAMILY_NAMES, SHARED_BLOCKS, tiny_model

# Each row ends in the end token of T5, whose classifier looks for it.
INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 1], [11, 12, 13, 14, 15, 1]]),
    "attention_mask": torch.ones(2, 6, dtype=torch.long),
}
LABELS = ["no", "maybe", "yes"]


def engine_over(module: nn.Module) -> Engine:
    return make_engine(module.eval(), "plain")


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *SHARED_BLOCKS])
def test_round_trip(tmp_path: Path, family: str) -> None:
    module = tiny_model(family, num_labels=3, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)})
    export_model(engine_over(module), demo_tokenizer(), tmp_path / "model")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**INPUTS).logits, module(**INPUTS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("the fox")["input_ids"] == demo_tokenizer()("the fox")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"step": 3}', '{"step": "x", "metrics": {}}', '{"step": 3, "metrics": {"f1": null}}', None]
)
def test_an_origin_that_is_damaged(tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """The model counts as none of ours; the next best one takes its place."""
    export_model(engine_over(tiny_model("bert")), None, tmp_path / "model", step=3, metrics={"f1": 0.5, "loss": float("nan")})
    found = exported_origin(tmp_path / "model")
    assert found is not None and (found["step"], found["metrics"]["f1"]) == (3, 0.5)
    origin = tmp_path / "model" / "progscale.json"
    origin.unlink()
    if content is None:
        origin.mkdir()
    else:
        origin.write_text(content)
    with caplog.at_level(logging.WARNING, "progscale"):
        assert exported_origin(tmp_path / "model") is None
    assert "progscale.json is damaged" in caplog.text


def test_what_a_killed_export_left_is_mended(tmp_path: Path) -> None:
    model = tmp_path / "model"
    export_model(engine_over(tiny_model("bert")), None, model, step=3)
    for left in ("model.old", "model.partial"):
        shutil.copytree(model, tmp_path / left)
    (tmp_path / "model.partial" / "progscale.json").unlink()
    assert exported_origin(model) == {"step": 3, "metrics": {}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before it stays."""
    engine = engine_over(tiny_model("bert"))
    export_model(engine, None, tmp_path / "model", step=3)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("progscale.export.sync", full)
    with pytest.raises(WriteError, match=r"the model could not be written to .*No space left on device"):
        export_model(engine, None, tmp_path / "model", step=6)
    assert exported_origin(tmp_path / "model") == {"step": 3, "metrics": {}}


def test_a_span_head(tmp_path: Path) -> None:
    module = tiny_model("bert", "question_answering")
    export_model(engine_over(module), None, tmp_path / "model")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**INPUTS).start_logits, module(**INPUTS).start_logits)


def test_a_better_model_takes_the_place_of_the_old(tmp_path: Path) -> None:
    engine = engine_over(tiny_model("bert"))
    export_model(engine, None, tmp_path / "model")
    (tmp_path / "model" / "of the old one").write_text("")
    (tmp_path / "model.partial").mkdir()
    with torch.no_grad():
        engine.parameters["classifier.bias"].fill_(7.0)
    export_model(engine, None, tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")["classifier.bias"].eq(7.0).all()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("config.json", "model.safetensors", "progscale.json")
    ]
    assert not (tmp_path / "model.partial").exists()


class Own(nn.Module):
    """No transformers model: a persistent buffer, one that is not, and a tied tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("derived", torch.arange(4.0), persistent=False)


def test_somebody_elses_module(tmp_path: Path) -> None:
    module = Own()
    export_model(engine_over(module), None, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert sorted(tensors) == ["first.bias", "first.weight", "kept", "second.bias"]
    fresh = Own()
    assert fresh.load_state_dict(tensors, strict=False).missing_keys == ["second.weight"], "the tied name of another"
    for name, value in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
