"""Checkpoint files and tensor names: the same mapping as transformers', and no file outside the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from progscale.errors import ModelError
from progscale.models import ModelRequest, checkpoint_files, checkpoint_names, load_model
from tests.tiny import FAMILY_NAMES, SHARED_BLOCKS, tiny_config, tiny_model


def fill(model: torch.nn.Module, folder: Path) -> set[str]:
    """Loads by the mapping alone; gives the names that were filled."""
    tensors = {key: value for file in checkpoint_files(str(folder)) for key, value in load_file(file).items()}
    parameters = dict(model.named_parameters())
    names = checkpoint_names(model, tensors)
    assert len(set(names.values())) == len(names)
    with torch.no_grad():
        for key, name in names.items():
            parameters[name].copy_(tensors[key])
    return set(names.values())


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("name", [*FAMILY_NAMES, *SHARED_BLOCKS])
def test_mapping_loads_what_from_pretrained_loads(name: str, base: bool, saved: Callable[..., Path]) -> None:
    folder = saved(name, base=base, shard="8KB")
    assert len(checkpoint_files(str(folder))) > 1
    torch.manual_seed(0)
    expected = dict(load_model(ModelRequest(str(folder), head="sequence_classification")).named_parameters())
    model = tiny_model(name, seed=1)
    filled = fill(model, folder)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[key], expected[key]) for key in filled)
    prefix = model.base_model_prefix
    assert {key for key in found if key.startswith(f"{prefix}.")} <= filled
    assert base or filled == set(found)


def test_legacy_names_and_unused_tensors(tmp_path: Path) -> None:
    config = tiny_config("bert")
    torch.manual_seed(3)
    source = BertForMaskedLM(config)
    legacy = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for key, value in source.state_dict().items()
    }
    config.save_pretrained(tmp_path)
    save_file(legacy, tmp_path / "model.safetensors", metadata={"format": "pt"})
    names = checkpoint_names(tiny_model("bert"), legacy)
    assert names["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"
    assert not any(key.startswith("cls.") for key in names)
    model = tiny_model("bert", seed=1)
    filled = fill(model, tmp_path)
    expected = dict(load_model(ModelRequest(str(tmp_path), head="sequence_classification")).named_parameters())
    assert all(torch.equal(dict(model.named_parameters())[key], expected[key]) for key in filled)
    assert {name for name in expected if name not in filled} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_tied_tensors_fill_their_first_name() -> None:
    model = BertForMaskedLM(tiny_config("bert"))
    word, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    assert checkpoint_names(model, [decoder]) == {decoder: word}
    assert checkpoint_names(model, [decoder, word]) == {word: word}
    assert checkpoint_names(model, [word, decoder]) == {word: word}


def test_a_checkpoint_with_a_prefix_fills_a_base_model() -> None:
    base = tiny_model("bert").base_model
    names = checkpoint_names(base, ["bert.encoder.layer.0.output.dense.bias", "classifier.bias"])
    assert names == {"bert.encoder.layer.0.output.dense.bias": "encoder.layer.0.output.dense.bias"}


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_files_are_named(keep: int, saved: Callable[..., Path]) -> None:
    folder = saved()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors: not a whole safetensors file.*truncated or corrupt"):
        load_model(ModelRequest(str(folder), head="sequence_classification"))


def test_missing_shards_and_broken_indexes(saved: Callable[..., Path]) -> None:
    folder = saved(shard="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[1]
    (folder / shard).rename(folder.parent / "elsewhere.safetensors")
    with pytest.raises(ModelError, match=f"{shard} is missing"):
        checkpoint_files(str(folder))
    for name in ("../elsewhere.safetensors", str(folder.parent / "elsewhere.safetensors"), "weights.bin", 3):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ModelError, match=r"only \*.safetensors files beside it are read"):
            checkpoint_files(str(folder))
    for text in ("{", "[]", '{"weight_map": [1]}', "{}"):
        index.write_text(text)
        with pytest.raises(ModelError, match=r"is not an index of safetensors files"):
            checkpoint_files(str(folder))
