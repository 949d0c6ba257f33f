"""LoRA and QLoRA: which layers, what is refused, and that frozen bits stay what they are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.blocks import partition
from progscale.config import Config, load_config
from progscale.errors import ModelError
from progscale.methods import Subject, make_method
from progscale.methods.qlora import QLora, QLoraOptions
from progscale.models.family import FAMILIES, Family
from progscale.names import name_faults
from tests.harness.refused import accepted
from tests.tiny import method_for, tiny_model

INPUTS = {"input_ids": torch.arange(24).view(2, 12) + 5}


def prepared(family: str = "bert", name: str = "lora", **options: Any) -> torch.nn.Module:
    return method_for(family, name, **options).prepare(tiny_model(family))


def changed(model: torch.nn.Module) -> set[str]:
    """Paths in block 1 of the layers beside which there are low-rank matrices."""
    return {
        path.split(".1.", 1)[1].removesuffix(".lora_A")
        for path, _ in model.named_modules()
        if path.endswith("lora_A") and ".1." in path
    }


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, {"attention.self.query", "attention.self.value"}),
        ({"targets": ["key"]}, {"attention.self.key"}),
        ({"targets": ["attention.output.dense"]}, {"attention.output.dense"}),
        (
            {"targets": "all-linear"},
            {
                *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
                *("intermediate.dense", "output.dense"),
            },
        ),
    ],
    ids=["default", "a-name", "a-path", "all-linear"],
)
def test_targets(options: dict[str, Any], places: set[str]) -> None:
    assert changed(prepared(**options)) == places


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["qery"], "'qery' is no module of this BertForSequenceClassification"),
        (["dense"], "'dense' is also 'bert.pooler.dense', which lies outside of the blocks"),
        (["word_embeddings"], "'word_embeddings' is also 'bert.embeddings.word_embeddings', which lies outside"),
        (["attention.self"], "'bert.encoder.layer.0.attention.self' is a BertSelfAttention; linear layers are allowed"),
    ],
    ids=str,
)
def test_targets_that_cannot_be(targets: list[str], says: str) -> None:
    with pytest.raises(ModelError, match=f"method.options.targets: {says}"):
        prepared(targets=targets)


def test_the_nearest_layer_is_named() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'attention\.self\.query'"):
        prepared(targets=["attention.self.qery"])


@pytest.mark.parametrize(("name", "family"), accepted(["lora", "qlora"]))
def test_peft_copies_the_head_and_nothing_of_the_base_model(name: str, family: str) -> None:
    parts = partition(prepared(family, name), FAMILIES.get(family))
    copies = [info for info in parts.parameters.values() if ".modules_to_save." in info.name]
    assert copies
    assert all(info.part == "head" and not info.name.startswith(parts.base) for info in copies)
    originals = {info.name for info in parts.parameters.values() if ".original_module." in info.name}
    assert not originals & method_for(family, name).tensors(parts)
    outside = {one for one in parts.names("head") if not one.startswith(parts.base)}
    assert outside == originals | {info.name for info in copies}


def test_pissa_computes_the_same_at_first() -> None:
    plain = tiny_model("bert").eval()
    model = method_for("bert", "lora", init="pissa", rank=4).prepare(copy.deepcopy(plain)).eval()
    weights = [value for name, value in model.named_parameters() if name.endswith("query.base_layer.weight")]
    assert not torch.equal(weights[0], plain.get_parameter("bert.encoder.layer.0.attention.self.query.weight"))
    with torch.no_grad():
        assert (model(**INPUTS).logits - plain(**INPUTS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_quantised_weights_keep_their_bits(precision: str) -> None:
    """In eval mode too: there bitsandbytes would repack them, and cast the biases, in place."""
    method = QLora(method_for("bert", "qlora").subject.__class__(FAMILIES.get("bert"), precision=precision))
    model = method.prepare(tiny_model("bert", hidden_size=64, intermediate_size=64))
    codes = [value for value in model.parameters() if value.dtype == torch.uint8]
    assert len(codes) == 4 * 6
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for training in (True, False, True):
        model.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"), torch.set_grad_enabled(training):
            outputs = model(**INPUTS)
        assert outputs.logits.isfinite().all()
    for name, value in model.named_parameters():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name


def test_four_bits_are_an_eighth_of_the_bytes() -> None:
    model = prepared("bert", "qlora")
    plain = sum(value.numel() * 4 for name, value in tiny_model("bert").named_parameters() if is_matrix_of_a_block(name, value))
    held = sum(value.numel() for value in model.parameters() if value.dtype == torch.uint8)
    assert held * 8 == plain


def is_matrix_of_a_block(name: str, value: torch.Tensor) -> bool:
    return "encoder.layer" in name and value.dim() == 2


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            {"engine": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
            "method.name: 'qlora' and ZeRO-3 do not go together",
        ),
        ({"method": {"options": {"init": "pissa"}}}, "method.options.init: 'pissa' changes the frozen weights"),
    ],
    ids=str,
)
def test_what_qlora_cannot_be_combined_with(layer: dict[str, Any], says: str) -> None:
    faults = name_faults(load_config([{"method": {"name": "qlora"}}, layer]))
    assert len(faults) == 1
    assert f"{faults[0].key}: {faults[0].message}".startswith(says)


def test_zero_2_is_no_fault() -> None:
    config = load_config([{"method": {"name": "qlora"}, "engine": {"deepspeed": {"zero_optimization": {"stage": 2}}}}])
    assert name_faults(config) == []
    assert QLora.refusals(QLoraOptions(), Config()) == []


def test_all_linear_layers_are_those_of_the_blocks_alone() -> None:
    """PEFT looks at the end of a path: what stands directly in a block must not be found elsewhere."""

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = torch.nn.Embedding(11, 4)
            self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 4)}) for _ in range(2))
            self.pooler = torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 4)})

    family = Family("flat", (), base="", embeddings=("tokens",), stacks={"blocks": "layers"}, head=("pooler",))
    with pytest.raises(ModelError, match=r"'dense' is also 'pooler\.dense', which lies outside of the blocks"):
        make_method("lora", Subject(family), {"targets": "all-linear"}).prepare(Flat())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_what_the_exported_folder_says(precision: str, dtype: str, tmp_path: Path) -> None:
    """The base model's revision, and the dtype that the quantised layers computed in."""
    method = make_method("qlora", Subject(FAMILIES.get("bert"), base="somebody/bert", precision=precision, revision="v2"), {})
    model = method.prepare(tiny_model("bert"))
    names = method.exported(partition(model, FAMILIES.get("bert")))
    method.save(model, {name: value for name, value in model.named_parameters() if name in names}, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/bert", "v2")
    quantised = json.loads((tmp_path / "quantization_config.json").read_text())
    assert quantised["bnb_4bit_compute_dtype"] == dtype
    assert quantised["llm_int8_skip_modules"] == ["bert.pooler.dense", "classifier"]
