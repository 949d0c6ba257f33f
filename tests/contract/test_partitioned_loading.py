"""ZeRO-3 reads a checkpoint tensor by tensor, and ends with just what `from_pretrained` gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from progscale.blocks import partition
from progscale.errors import ModelError
from progscale.models import ModelRequest, build_meta, family_of, find_family, load_model
from progscale.models.loading import adapted
from progscale.models.saving import persistent_buffers
from progscale.setup import check_as_planned
from tests.harness.cases import run
from tests.harness.worker import RankError, TwoRanks
from tests.tiny import FAMILY_NAMES, SHARED_BLOCKS, tiny_model

LOAD = "tests.harness.loading:load"


@pytest.fixture(params=(*FAMILY_NAMES, *SHARED_BLOCKS))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint in several files."""
    tiny_model(request.param, num_labels=2).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


@pytest.mark.parametrize("num_labels", [2, 5])
def test_equals_from_pretrained(two_ranks: TwoRanks, checkpoint: Path, num_labels: int) -> None:
    """Also with a new head (5 labels), which every rank draws alike from the seed."""
    torch.manual_seed(7)
    expected = load_model(ModelRequest(str(checkpoint), head="sequence_classification", num_labels=num_labels))
    results = two_ranks.run(LOAD, path=str(checkpoint), seed=7, num_labels=num_labels)
    total = sum(parameter.numel() for parameter in expected.parameters())
    for result in results:
        assert not result["training"]
        assert set(result["parameters"]) == {name for name, _ in expected.named_parameters()}
        for name, parameter in expected.named_parameters():
            assert torch.equal(result["parameters"][name], parameter), name
        for name, buffer in expected.named_buffers():
            assert torch.equal(result["buffers"][name], buffer), name
        # Half of the model, and the padding of tensors of odd length.
        assert result["held"] <= total / 2 + len(result["parameters"])


def test_bf16_parameters(two_ranks: TwoRanks, tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    result = two_ranks.run(LOAD, path=str(tmp_path), seed=1, dtype="bfloat16")[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(result["parameters"][name], parameter.detach().to(torch.bfloat16)), name


def test_a_checkpoint_of_another_size_is_refused(two_ranks: TwoRanks, tmp_path: Path) -> None:
    tiny_model("bert", blocks=2).save_pretrained(tmp_path)
    with pytest.raises(RankError, match=r"encoder\.layer\.2.*is missing in its weights"):
        two_ranks.run(LOAD, path=str(tmp_path), seed=1, overrides={"num_hidden_layers": 3})


@pytest.mark.parametrize("lacking", ["lm_head.weight", "model.norm.weight"])
def test_a_language_model_without_its_head_or_last_norm_is_refused(two_ranks: TwoRanks, tmp_path: Path, lacking: str) -> None:
    model: Any = tiny_model("llama", "causal_lm", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, state_dict={name: value for name, value in model.state_dict().items() if name != lacking})
    with pytest.raises(RankError, match=rf"'{lacking}' is missing in its weights"):
        two_ranks.run(LOAD, path=str(tmp_path), seed=1, head="causal_lm")
    with pytest.raises(ModelError, match=rf"nothing for 1 parameters of the head, e\.g\. '{lacking}'.*causal lm head saved"):
        load_model(ModelRequest(str(tmp_path), head="causal_lm"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains_through_a_switch(two_ranks: TwoRanks, tmp_path: Path, checkpointing: bool) -> None:
    """What was never whole on a rank trains like a model that was."""
    tiny_model("bert").save_pretrained(tmp_path)
    losses, weights = two_ranks.run("tests.harness.loading:train", path=str(tmp_path), checkpointing=checkpointing)[0]
    expected = run(engine="plain", schedule="progtuning", embeddings="first_stage", stages=2, steps=4, blocks=4, micro=4)
    assert losses == pytest.approx(expected.losses, abs=2e-6)
    for name, value in expected.parameters.items():
        assert (weights[name] - value).abs().max().item() < 5e-5, name


@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"init": "pissa", "rank": 4}, {"init": "orthogonal", "rank": 4}], ids=str
)
def test_low_rank_matrices_beside_what_was_never_whole(two_ranks: TwoRanks, tmp_path: Path, options: dict[str, Any]) -> None:
    """DoRA and PiSSA compute with the weights that they stand beside, which are in parts by then."""
    tiny_model("bert").save_pretrained(tmp_path)
    given: dict[str, Any] = {"method": "lora", "method_options": options}
    losses, weights = two_ranks.run("tests.harness.loading:train", path=str(tmp_path), **given)[0]
    case: dict[str, Any] = {
        "schedule": "progtuning",
        "embeddings": "first_stage",
        "stages": 2,
        "steps": 4,
        "blocks": 4,
        "micro": 4,
    }
    expected = run(engine="plain", **case, **given)
    assert losses == pytest.approx(expected.losses, abs=2e-6)
    assert weights.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        assert (weights[name] - value).abs().max().item() < 5e-5, name


def test_a_family_that_is_found_in_the_model_itself(two_ranks: TwoRanks, tmp_path: Path) -> None:
    tiny_model("mpnet").save_pretrained(tmp_path)
    named, found = (two_ranks.run(LOAD, path=str(tmp_path), seed=7, family=family)[0] for family in ("mpnet", "generic"))
    assert named["parameters"].keys() == found["parameters"].keys()
    assert all(torch.equal(found["parameters"][name], value) for name, value in named["parameters"].items())
    with pytest.raises(RankError, match=r"encoder\.layer\.4.*is missing in its weights"):
        two_ranks.run(LOAD, path=str(tmp_path), seed=1, family="generic", overrides={"num_hidden_layers": 5})


@pytest.mark.parametrize("kind", ["ibert", "nomic_bert"])
def test_buffers_and_tensors_that_are_stored_otherwise(two_ranks: TwoRanks, tmp_path: Path, kind: str) -> None:
    """I-BERT keeps scales in buffers; NomicBERT's files have other names and joint projections."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 101}
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes, max_position_embeddings=40))
    for number, buffer in enumerate(persistent_buffers(model).values()):
        buffer.fill_(number % 100)
    model.save_pretrained(tmp_path)
    for result in two_ranks.run(LOAD, path=str(tmp_path), seed=7, family="generic"):
        for name, parameter in model.named_parameters():
            assert torch.equal(result["parameters"][name], parameter), name
        for name, buffer in persistent_buffers(model).items():
            assert torch.equal(result["buffers"][name], buffer), name
        total = sum(parameter.numel() for parameter in model.parameters())
        assert result["held"] == total if kind == "nomic_bert" else result["held"] < 0.6 * total


@pytest.mark.parametrize(("family", "head"), [("gpt2", "causal_lm"), ("t5", "seq2seq_lm")])
def test_language_models(two_ranks: TwoRanks, tmp_path: Path, family: str, head: Any) -> None:
    """Tied outputs stay tied, those of their own (T5 v1.1) too, and what the model says about generation is kept."""
    model = tiny_model(family, head, tie_word_embeddings=family == "gpt2")
    adapted(model, family_of(model))
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path)
    expected = load_model(ModelRequest(str(tmp_path), head=head))
    for result in two_ranks.run(LOAD, path=str(tmp_path), seed=7, head=head):
        assert set(result["parameters"]) == {name for name, _ in expected.named_parameters()}
        assert ("lm_head.weight" in result["parameters"]) == (family == "t5")
        for name, parameter in expected.named_parameters():
            assert torch.equal(result["parameters"][name], parameter), name
        assert result["generation"].num_beams == 3


def test_weights_that_contradict_their_config_are_refused(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """transformers unties what differs; the plan was made of the config, and a partitioned model would lose a tensor."""
    tiny_model("gpt2", "causal_lm", tie_word_embeddings=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    says = r"two tensors, 'lm_head.weight' and 'transformer.wte.weight', for what is one .*tie_word_embeddings"
    with pytest.raises(RankError, match=says):
        two_ranks.run(LOAD, path=str(tmp_path), seed=1, head="causal_lm")
    request = ModelRequest(str(tmp_path), head="causal_lm")
    parts = partition(build_meta(request), find_family(request))
    with pytest.raises(ModelError, match=says):
        check_as_planned(load_model(request), parts)
    mended = dataclasses.replace(request, overrides={"tie_word_embeddings": False})
    check_as_planned(load_model(mended), partition(build_meta(mended), find_family(mended)))
