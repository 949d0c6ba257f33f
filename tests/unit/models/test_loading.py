"""Configs and weights: what is loaded, and that mistakes are found before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.errors import ModelError
from progscale.models import ModelRequest, build_meta, find_family, load_config, load_model
from progscale.models.loading import check_attention
from tests.tiny import FAMILY_NAMES, SHARED_BLOCKS, tiny_model

CLASSIFY, ANSWER = "sequence_classification", "question_answering"
BUILT_IN = {"head": CLASSIFY, "random_weights": True}


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("head", [CLASSIFY, ANSWER])
@pytest.mark.parametrize("name", [*FAMILY_NAMES, *SHARED_BLOCKS])
def test_saved_weights_come_back(name: str, head: Any, saved: Callable[..., Path]) -> None:
    folder = saved(name, head=head)
    model = load_model(ModelRequest(str(folder), head=head))
    assert equal(model, tiny_model(name, head))
    assert build_meta(ModelRequest(str(folder), head=head)).state_dict().keys() == model.state_dict().keys()


def test_weights_are_float32_whatever_the_checkpoint_holds(saved: Callable[..., Path], tmp_path: Path) -> None:
    tiny_model("bert").half().save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    model = load_model(ModelRequest(str(tmp_path / "half"), head=CLASSIFY))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = load_model(ModelRequest(str(tmp_path / "half"), head=CLASSIFY, random_weights=True))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_new_head_depends_on_the_seed_alone(saved: Callable[..., Path]) -> None:
    request = ModelRequest(str(saved(base=True)), head=CLASSIFY, num_labels=3)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(load_model(request))
    assert equal(models[0], models[1])
    assert not torch.equal(models[0].classifier.weight, models[2].classifier.weight)  # type: ignore[union-attr]
    assert torch.equal(models[0].bert.pooler.dense.weight, models[2].bert.pooler.dense.weight)  # type: ignore[union-attr]


def test_a_head_of_another_size_is_drawn_anew(saved: Callable[..., Path]) -> None:
    folder = saved()
    model = load_model(ModelRequest(str(folder), head=CLASSIFY, num_labels=5))
    assert model.classifier.weight.shape == (5, 16)  # type: ignore[union-attr]
    assert torch.equal(model.bert.pooler.dense.weight, tiny_model("bert").bert.pooler.dense.weight)  # type: ignore[union-attr]


def test_labels_and_problem_type() -> None:
    config = load_config(ModelRequest("bert-base-uncased", num_labels=3, label_names=("no", "maybe", "yes"), **BUILT_IN))
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    config = load_config(ModelRequest("bert-base-uncased", num_labels=1, problem_type="regression", **BUILT_IN))
    assert (config.num_labels, config.problem_type) == (1, "regression")
    config = load_config(ModelRequest("bert-base-uncased", head=ANSWER, num_labels=7, random_weights=True))
    assert (config.num_labels, config.problem_type) == (2, None)


def test_overrides() -> None:
    overrides = {"hidden_dropout_prob": 0, "num_hidden_layers": 2, "classifier_dropout": 0.3}
    config = load_config(ModelRequest("bert-base-uncased", overrides=overrides, **BUILT_IN))
    assert (config.hidden_dropout_prob, config.num_hidden_layers, config.classifier_dropout) == (0, 2, 0.3)
    config = load_config(ModelRequest("distilbert-base-cased", overrides={"num_hidden_layers": 2}, **BUILT_IN))
    assert config.n_layers == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overrides": {"hiden_size": 8}}, "model.overrides.hiden_size: not in the config.*did you mean 'hidden_size'"),
        ({"overrides": {"hidden_size": "8"}}, "model.overrides.hidden_size: '8' is of type str; int such as 768"),
        ({"overrides": {"hidden_size": 8.5}}, "hidden_size: 8.5 is of type float"),
        ({"overrides": {"num_hidden_layers": True}}, "True is of type bool"),
        ({"overrides": {"num_labels": 3}}, "model.overrides.num_labels: cannot be changed here"),
        ({"overrides": {"dtype": "float16"}}, "train.precision"),
        ({"num_labels": 0}, "num_labels: 0; at least 1"),
        ({"label_names": ("a",)}, "label_names: 1 names \\(a\\) for 2 labels"),
        ({"label_names": ("a", "a")}, "every name may be used once"),
    ],
)
def test_requests_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_config(ModelRequest("bert-base-uncased", **{**BUILT_IN, **change}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-one/no-model", "neither a local folder nor reachable on the hub, and not in the cache"),
        ("bert-base-uncasd", "neither a local folder.*did you mean 'bert-base-uncased'"),
        ("roberta-base", "neither a local folder.*built in, so random weights"),
        ("./no-folder", "'./no-folder': no such folder"),
        ("a/b/c", "'a/b/c': no such folder"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelRequest(name, head=CLASSIFY))
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"the folder has no config.json \(it holds notes.txt\)"):
        load_model(ModelRequest(str(tmp_path), head=CLASSIFY))
    with pytest.raises(ModelError, match=r"is a file; give the folder"):
        load_model(ModelRequest(str(tmp_path / "notes.txt"), head=CLASSIFY))
    for content, message in (("{", "is not JSON"), ("[]", "holds a JSON list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            load_model(ModelRequest(str(tmp_path), head=CLASSIFY))


def test_code_of_the_repository_is_refused(saved: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    folder = saved()
    (folder / "evil.py").write_text(f"open({str(folder / 'marker')!r}, 'w')\n")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"})
    for call in (load_model, load_config, find_family, build_meta):
        with pytest.raises(ModelError, match=r"defined by code in its repository.*--trust-remote-code"):
            call(ModelRequest(str(folder), head=CLASSIFY))
    # A type that transformers knows is loaded with its code, never with the repository's.
    edit_config(folder, model_type="bert")
    load_model(ModelRequest(str(folder), head=CLASSIFY))
    assert not (folder / "marker").exists()


def test_code_of_the_repository_runs_when_allowed(saved: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    folder = saved()
    (folder / "mine.py").write_text("from transformers import BertConfig\nclass C(BertConfig):\n    model_type = 'mine'\n")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.C"})
    config = load_config(ModelRequest(str(folder), head=CLASSIFY, trust_remote_code=True))
    assert config.model_type == "mine"


def test_pickle_is_refused_unless_allowed(saved: Callable[..., Path]) -> None:
    folder = saved()
    torch.save(tiny_model("bert").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model.safetensors.*--allow-pickle"):
        load_model(ModelRequest(str(folder), head=CLASSIFY))
    assert equal(load_model(ModelRequest(str(folder), head=CLASSIFY, allow_pickle=True)), tiny_model("bert"))


def test_weights_of_another_model_are_refused(saved: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    folder = saved()
    edit_config(folder, num_hidden_layers=6)
    with pytest.raises(ModelError, match=r"nothing for 32 parameters of the embeddings and blocks.*6 blocks"):
        load_model(ModelRequest(str(folder), head=CLASSIFY))
    edit_config(folder, num_hidden_layers=4, vocab_size=77)
    with pytest.raises(ModelError, match=r"word_embeddings.weight' has shape \(101, 16\) in the weights and \(77, 16\)"):
        load_model(ModelRequest(str(folder), head=CLASSIFY))


@pytest.mark.parametrize(
    ("family", "lacking", "refused"),
    [
        ("bert", "bert.pooler", False),
        ("bert", "classifier", False),
        ("xlm-roberta-xl", "roberta.encoder.LayerNorm", True),
        ("modernbert", "model.final_norm", True),
        ("gpt2", "transformer.ln_f", True),
        ("gpt2", "score", False),
    ],
)
def test_what_a_checkpoint_may_lack(tmp_path: Path, family: str, lacking: str, refused: bool) -> None:
    """A classifier and a pooler begin anew; the norm above the blocks is part of what was pretrained."""
    model = tiny_model(family)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{lacking}.")}
    assert len(state) < len(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=state)
    if refused:
        with pytest.raises(ModelError, match=rf"nothing for \d parameters of the head, e\.g\. '{lacking}"):
            load_model(ModelRequest(str(tmp_path), head=CLASSIFY))
    else:
        load_model(ModelRequest(str(tmp_path), head=CLASSIFY))


def test_an_encoder_is_no_causal_language_model(saved: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    """transformers builds one, which sees the tokens that it is asked for."""
    request = ModelRequest("bert-base-uncased", head="causal_lm", random_weights=True)
    with pytest.raises(ModelError, match=r"a bert model reads a text from both sides, .*take a decoder"):
        build_meta(request)
    folder = saved("bert")
    edit_config(folder, is_decoder=True)
    build_meta(ModelRequest(str(folder), head="causal_lm"))


def test_fewer_blocks_may_be_asked_for(saved: Callable[..., Path]) -> None:
    model = load_model(ModelRequest(str(saved()), head=CLASSIFY, overrides={"num_hidden_layers": 2}))
    assert len(model.bert.encoder.layer) == 2  # type: ignore[union-attr, arg-type]


def test_a_config_that_its_class_refuses(saved: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    folder = saved()
    edit_config(folder, hidden_size="wide")
    with pytest.raises(ModelError):
        load_model(ModelRequest(str(folder), head=CLASSIFY))


def test_family_of_a_request_needs_no_weights() -> None:
    assert find_family(ModelRequest("microsoft/deberta-v3-base", head=CLASSIFY), weights=False).name == "deberta-v2"
    assert find_family(ModelRequest("anything", head=CLASSIFY), "bert").name == "bert"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("random_weights", [False, True])
def test_attention_is_what_was_asked_for(saved: Callable[..., Path], attention: str, random_weights: bool) -> None:
    request = ModelRequest(str(saved("bert")), "sequence_classification", attention=attention, random_weights=random_weights)
    check_attention(request, build_meta(request))
    assert load_model(request).config._attn_implementation == attention


def test_attention_that_is_not_here(saved: Callable[..., Path]) -> None:
    request = ModelRequest(str(saved("bert")), "sequence_classification", attention="flash_attention_2")
    # Looking at a plan needs no kernels.
    skeleton = build_meta(request)
    with pytest.raises(ModelError, match=r"model\.attention: 'flash_attention_2' is not possible here \(.*\); set it to auto"):
        check_attention(request, skeleton)
    without = ModelRequest(str(saved("deberta-v2")), "sequence_classification", attention="sdpa")
    with pytest.raises(ModelError, match=r"model\.attention: 'sdpa' is not possible here \(DebertaV2For.* does not support"):
        check_attention(without, build_meta(without))
    with pytest.raises(ModelError, match="Linear is none; set it to auto"):
        check_attention(request, torch.nn.Linear(1, 1))
