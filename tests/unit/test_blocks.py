"""Embeddings, blocks and head: every parameter of every family in exactly one part."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

from progscale.blocks import partition
from progscale.errors import ModelError
from progscale.methods import live_parameters
from progscale.models.family import FAMILIES, Family, ModelRequest
from progscale.models.loading import build_meta, load_model
from progscale.models.lookup import family_of
from progscale.schedule import Stage
from tests.tiny import DECODERS, FAMILY_NAMES, method_for, tiny_config, tiny_model

HEADS = ("sequence_classification", "question_answering")
LANGUAGE_MODELS = [(name, "causal_lm") for name in (*DECODERS, "qwen2", "qwen3", "mistral", "gemma")] + [("t5", "seq2seq_lm")]
STACKS = {"t5": ("encoder", "decoder")}


class Own(nn.Module):
    """An encoder of somebody's own, its own base model."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 2)


OWN = Family("own", (), base="", embeddings=("tokens",), stacks={"blocks": "layers"}, head=("norm", "out"))


@pytest.mark.parametrize(("name", "head"), [*product(FAMILY_NAMES, HEADS), *LANGUAGE_MODELS])
def test_parts_partition_the_parameters(name: str, head: str) -> None:
    model = tiny_model(name, head)
    parts = partition(model, family_of(model))
    stacks = STACKS.get(name, ("blocks",))
    expected = dict(model.named_parameters())
    assert list(parts.parameters) == list(expected)
    assert all(info.shape == tuple(expected[key].shape) for key, info in parts.parameters.items())
    by_part = [*parts.names("embeddings"), *parts.names("head")]
    by_part += [key for stack in stacks for block in range(4) for key in parts.block_names(stack, block)]
    assert sorted(by_part) == sorted(expected)
    assert sorted(parts.names()) == sorted(expected)
    assert parts.num_blocks == dict.fromkeys(stacks, 4)
    assert parts.numel() == sum(tensor.numel() for tensor in expected.values())
    assert parts.numel() == parts.numel("embeddings") + parts.numel("block") + parts.numel("head")
    # ModernBERT's first block has no norm before its attention.
    alike = range(1 if name == "modernbert" else 0, 4)
    for stack in stacks:
        assert len({parts.count(parts.block_names(stack, block)) for block in alike}) == 1


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_meta_device_gives_the_same_partition(name: str) -> None:
    with torch.device("meta"):
        model = tiny_model(name)
    assert partition(model, FAMILIES.get(name)) == partition(tiny_model(name), FAMILIES.get(name))


def test_where_the_special_parameters_go() -> None:
    def part(family: str, ending: str) -> str:
        parts = partition(tiny_model(family), FAMILIES.get(family)).parameters
        (info,) = [info for name, info in parts.items() if name.endswith(ending)]
        return info.part

    assert part("xlm-roberta-xl", "roberta.encoder.LayerNorm.weight") == "head"
    assert part("deberta-v2", "deberta.encoder.rel_embeddings.weight") == "embeddings"
    assert part("deberta-v2", "deberta.encoder.LayerNorm.weight") == "embeddings"
    assert part("deberta-v2", "deberta.encoder.conv.conv.weight") == "embeddings"
    assert part("electra", "electra.embeddings_project.weight") == "embeddings"
    assert part("bert", "bert.pooler.dense.weight") == "head"
    assert part("bert", "layer.0.attention.output.LayerNorm.bias") == "block"
    assert part("modernbert", "model.final_norm.weight") == "head"
    assert part("mpnet", "encoder.relative_attention_bias.weight") == "embeddings"
    assert part("deberta", "encoder.rel_embeddings.weight") == "embeddings"
    assert part("albert", "encoder.embedding_hidden_mapping_in.weight") == "embeddings"
    assert part("albert", "albert.pooler.weight") == "head"
    assert part("big_bird", "bert.pooler.weight") == "head"
    assert part("gpt2", "wpe.weight") == "embeddings"
    assert part("gpt2", "ln_f.bias") == "head"
    assert part("llama", "model.norm.weight") == "head"
    for stack in ("encoder", "decoder"):
        assert part("t5", f"{stack}.final_layer_norm.weight") == "head"
        # In the first block, but every block of the stack uses it.
        assert part("t5", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight") == "embeddings"
        assert part("t5", f"{stack}.block.0.layer.0.SelfAttention.q.weight") == "block"


def test_what_no_output_depends_on_is_known() -> None:
    parts = partition(tiny_model("big_bird"), FAMILIES.get("big_bird"))
    assert {name for name, info in parts.parameters.items() if info.unused} == {"bert.pooler.weight", "bert.pooler.bias"}
    everything = Stage(1, 0, 1, {"blocks": (0, 1, 2, 3)}, embeddings=True)
    live = live_parameters(everything, parts, method_for("big_bird"))
    assert set(parts.parameters) - set(live) == {"bert.pooler.weight", "bert.pooler.bias"}


@pytest.mark.parametrize(("name", "head"), LANGUAGE_MODELS)
def test_an_output_layer_tied_to_the_embeddings_belongs_to_them(name: str, head: str) -> None:
    tied, own = (tiny_model(name, head, tie_word_embeddings=tied) for tied in (True, False))
    with_it, without = (partition(model, family_of(model)) for model in (tied, own))
    (word,) = [info for info in with_it.parameters.values() if "lm_head.weight" in info.tied]
    assert word.part == "embeddings"
    if name != "t5":  # whose config cannot say so by itself: see the family
        assert without.parameters["lm_head.weight"].part == "head"
        assert without.numel() == with_it.numel() + word.numel


def test_a_t5_with_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """What the config says is what is built, planned, loaded and written; transformers alone ties them until it sees weights."""
    family = FAMILIES.get("t5")
    own = tiny_model("t5", "seq2seq_lm", tie_word_embeddings=False)
    assert own.lm_head.weight is own.shared.weight
    assert family.adapt is not None
    family.adapt(own)
    with torch.no_grad():
        own.lm_head.weight.normal_()
    own.save_pretrained(tmp_path)
    request = ModelRequest(str(tmp_path), head="seq2seq_lm")
    loaded, meta = load_model(request), build_meta(request)
    assert partition(meta, family) == partition(loaded, family)
    assert partition(loaded, family).parameters["lm_head.weight"].part == "head"
    assert torch.equal(loaded.lm_head.weight, own.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.shared.weight)
    loaded.tie_weights()
    assert torch.equal(loaded.lm_head.weight, own.lm_head.weight)


def test_a_tied_tensor_belongs_to_the_embeddings_and_keeps_its_other_names() -> None:
    model = BertForMaskedLM(tiny_config("bert"))
    parts = partition(model, FAMILIES.get("bert"))
    word = parts.parameters["bert.embeddings.word_embeddings.weight"]
    assert word.part == "embeddings"
    assert word.tied == ("cls.predictions.decoder.weight",)
    assert "cls.predictions.decoder.weight" not in parts.parameters
    assert parts.numel() == sum(tensor.numel() for tensor in model.parameters())
    head = parts.parameters["cls.predictions.bias"]
    assert (head.part, head.tied) == ("head", ("cls.predictions.decoder.bias",))


def test_a_tied_tensor_whose_first_name_is_in_the_head_still_belongs_to_the_embeddings() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(4, 11, bias=False)
            self.base = Own()
            self.base.tokens.weight = self.decoder.weight

    parts = partition(Reversed(), dataclasses.replace(OWN, base="base"))
    assert parts.parameters["decoder.weight"].part == "embeddings"
    assert parts.parameters["decoder.weight"].tied == ("base.tokens.weight",)


def test_zero3_shapes_are_the_true_ones() -> None:
    model = tiny_model("bert")
    whole = partition(model, FAMILIES.get("bert"))
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert partition(model, FAMILIES.get("bert")) == whole


def test_a_peft_model_is_cut_like_the_model_it_wraps() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(tiny_model("bert"), config)
    parts = partition(model, FAMILIES.get("bert"))
    assert sorted(parts.parameters) == sorted(dict(model.named_parameters()))
    lora = {info.block for name, info in parts.parameters.items() if "lora_" in name}
    assert lora == {0, 1, 2, 3}
    assert all("modules_to_save" in name or "original_module" in name or "pooler" in name for name in parts.names("head"))


def test_two_stacks() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(3, 2)
            self.encoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.decoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    family = Family("two", (), "", ("tokens",), {"encoder": "encoder", "decoder": "decoder"})
    parts = partition(Two(), family)
    assert parts.num_blocks == {"encoder": 2, "decoder": 3}
    assert parts.block_names("decoder", 2) == ("decoder.2.weight", "decoder.2.bias")
    with pytest.raises(IndexError, match=r"block 3 of stack 'decoder', which has 3"):
        parts.block_names("decoder", 3)
    with pytest.raises(KeyError, match=r"third"):
        parts.block_names("third", 0)


def test_star_stands_for_one_component_and_blocks_keep_their_order() -> None:
    model = Own(blocks=12)
    parts = partition(model, dataclasses.replace(OWN, embeddings=("*kens",), head=("norm.*", "out.weight", "out.bias")))
    assert parts.names("embeddings") == ("tokens.weight",)
    assert [parts.block_names("blocks", block)[0] for block in (2, 10, 11)] == [
        "layers.2.weight",
        "layers.10.weight",
        "layers.11.weight",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": ("out",)}, "parameter 'norm.weight' belongs to no part"),
        ({"head": ("norm", "out", "out.weight", "tokens")}, "parameter 'tokens.weight' is claimed twice"),
        ({"head": ("norm", "out", "layers.0.weight")}, "'layers.0.weight' is claimed twice"),
        ({"embeddings": ("tokens", "layers")}, "'layers.0.weight' is claimed twice"),
        ({"embeddings": ("tokens", "layers.0")}, "'layers.0.weight' is claimed twice.*'layers.0' and by stack 'blocks'"),
        ({"embeddings": ("tokens", "positions")}, "pattern 'positions' matches no parameter.*write 'positions\\?'"),
        ({"stacks": {"blocks": "layer"}}, "'layer' is not in this Own.*found layers.*did you mean 'layers'"),
        ({"base": "encoder"}, "'encoder.layers' is not in this Own"),
        ({"stacks": {"blocks": "norm"}}, "stack 'blocks' \\('norm'\\) is a LayerNorm without blocks"),
    ],
)
def test_mistakes_of_a_family_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        partition(Own(), dataclasses.replace(OWN, **change))


def test_shared_blocks_are_refused() -> None:
    model = Own()
    model.layers = nn.ModuleList([nn.Linear(4, 4)] * 3)
    with pytest.raises(ModelError, match=r"holds one module several times.*freezing one freezes all"):
        partition(model, OWN)


def test_tensors_shared_between_blocks_or_with_the_head_are_refused() -> None:
    model = Own()
    model.layers[2].weight = model.layers[0].weight
    with pytest.raises(ModelError, match=r"one tensor but lie in block 0 of 'blocks' and block 2 of 'blocks'"):
        partition(model, OWN)
    model = Own()
    model.norm.bias = model.layers[1].bias
    with pytest.raises(ModelError, match=r"one tensor but lie in block 1 of 'blocks' and the head"):
        partition(model, OWN)
