"""Bottleneck adapters and BitFit: where they go, how they begin, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from progscale.blocks import partition
from progscale.errors import ModelError
from progscale.layers import Bottleneck
from progscale.methods import Subject, make_method
from progscale.models.family import FAMILIES, Family
from tests.tiny import method_for, tiny_model

INPUTS = {"input_ids": torch.arange(24).view(2, 12) + 5}


class NoBias(nn.Module):
    """Somebody's own model: no biases, no config, its own base."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 4, bias=False), "act": nn.ReLU()}) for _ in range(3))
        self.head = nn.Linear(4, 2)


OWN = Family("own", (), base="", embeddings=("tokens",), stacks={"blocks": "layers"}, head=("head",))


def own_method(name: str, **options: Any) -> Any:
    return make_method(name, Subject(OWN), options)


def test_the_first_weights() -> None:
    """Normal, cut off at two standard deviations; biases 0: close to the identity."""
    torch.manual_seed(0)
    adapter = Bottleneck(200, 50, "gelu", 1e-3)
    for layer in (adapter.down, adapter.up):
        assert layer.weight.abs().max() <= 2e-3
        # Of a normal distribution that is cut off there the deviation is 0.88 of the whole one's.
        assert layer.weight.std().item() == pytest.approx(0.88e-3, rel=0.02)
        assert not layer.bias.any()
    hidden = torch.randn(3, 200)
    assert (adapter(hidden) - hidden).abs().max() < 1e-2


def test_an_adapter_acts_before_the_residual_is_added() -> None:
    """With an up-projection that cancels the sublayer's output, the block passes on the norm of the residual alone."""
    model = method_for("bert", "adapter").prepare(tiny_model("bert")).eval()
    block = model.get_submodule("bert.encoder.layer.1")
    seen = {}
    norm = block.get_submodule("output.LayerNorm")
    norm.register_forward_pre_hook(lambda module, arguments: seen.update(norm=arguments[0]))
    block.get_submodule("attention.output.LayerNorm").register_forward_hook(lambda *call: seen.update(residual=call[2]))
    adapter: Any = block.get_submodule("output.dropout.adapter")
    adapter.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
    with torch.no_grad():
        model(**INPUTS)
    assert torch.equal(seen["norm"], seen["residual"])


def test_a_copy_of_the_model_uses_its_own_adapters() -> None:
    model = method_for("bert", "adapter").prepare(tiny_model("bert")).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = twin(**INPUTS).logits
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.fill_(1.0)
        assert torch.equal(twin(**INPUTS).logits, before)
        assert not torch.equal(model(**INPUTS).logits, before)


def test_norms_of_live_blocks() -> None:
    model = tiny_model("bert")
    method = method_for("bert", "adapter", norms=True)
    parts = partition(method.prepare(model), FAMILIES.get("bert"))
    norms = {name for name in method.tensors(parts) if "LayerNorm" in name}
    assert norms == {name for name in parts.names("block") if "LayerNorm" in name}
    assert len(norms) == 4 * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "family 'own' does not say which modules of a block of 'blocks' feed the residual stream; name them"),
        ({"sublayers": ["mxi"]}, r"method.options.sublayers: 'mxi' is no module of block 'layers.0'; did you mean 'mix'\?"),
        ({"sublayers": ["act"]}, "the width of this NoBias is unknown: it has no config.hidden_size"),
    ],
    ids=str,
)
def test_where_adapters_cannot_go(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        own_method("adapter", **options).prepare(NoBias())


def test_a_model_of_ones_own() -> None:
    method = own_method("adapter", sublayers=["mix"], size=3)
    parts = partition(method.prepare(NoBias()), OWN)
    assert parts.count(method.tensors(parts)) == 3 * (2 * 4 * 3 + 3 + 4) + 4 * 2 + 2
    method = own_method("lora", targets="all-linear", rank=2)
    parts = partition(method.prepare(NoBias()), OWN)
    assert parts.count(method.tensors(parts)) == 3 * 2 * 2 * 4 + 4 * 2 + 2


def test_buffers_are_restored_too(tmp_path: Path) -> None:
    """Statistics that a model of one's own gathers in training are part of what was trained."""
    method, models = own_method("adapter", sublayers=["mix"]), [NoBias(), NoBias()]
    for number, model in enumerate(models):
        model.register_buffer("mean", torch.full((4,), float(number)))
    trained = method.prepare(models[1])
    names = {*method.exported(partition(trained, OWN)), "mean"}
    method.save(trained, {name: value for name, value in trained.state_dict().items() if name in names}, tmp_path)
    restored = method.restore(models[0], tmp_path)
    assert all(torch.equal(restored.state_dict()[name], trained.state_dict()[name]) for name in names)


def test_a_head_whose_name_peft_would_find_elsewhere() -> None:
    model = NoBias()
    model.out = model.head
    del model.head
    family = Family("own", (), base="", embeddings=("tokens",), stacks={"blocks": "layers"}, head=("out",))
    with pytest.raises(ModelError, match=r"lies in 'out', and PEFT, .* would take 'lora_dropout' for it too"):
        make_method("lora", Subject(family), {"targets": ["mix"]}).prepare(model)


def test_bitfit_without_biases() -> None:
    with pytest.raises(ModelError, match=r"block 0 of this own model \('blocks', 3 of 3 alike\) has none; take lora or adapter"):
        own_method("bitfit").prepare(NoBias())


def test_bitfit_trains_the_poolers_bias_and_not_its_weight() -> None:
    method = method_for("bert", "bitfit")
    parts = partition(tiny_model("bert"), FAMILIES.get("bert"))
    head = method.tensors(parts) & set(parts.names("head"))
    assert head == {"bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    more = method_for("bert", "bitfit", embeddings_bias=True).tensors(parts) - method.tensors(parts)
    assert more == {"bert.embeddings.LayerNorm.bias"}


@pytest.mark.parametrize("name", ["adapter", "bitfit"])
def test_the_head_of_a_language_model_is_part_of_what_was_pretrained(name: str) -> None:
    """Its weights stay frozen; a bias of it is a bias."""
    family = Family("lm", (), base="trunk", embeddings=("tokens",), stacks={"blocks": "layers"})
    model = nn.Module()
    model.trunk = nn.Module()
    model.trunk.tokens = nn.Embedding(11, 4)
    model.trunk.layers = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 4)}) for _ in range(2))
    model.lm_head = nn.Linear(4, 11, bias=False)
    options = {"sublayers": ["mix"]} if name == "adapter" else {}
    method = make_method(name, Subject(family, "causal_lm"), options)  # type: ignore[arg-type]
    assert not {one for one in method.tensors(partition(method.prepare(model), family)) if one.startswith("lm_head")}
