"""Tokenizers: loading, and whether they fit the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, BertTokenizerFast

from progscale.errors import ModelError
from progscale.models import check_tokenizer, family_of, load_tokenizer, max_tokens
from progscale.models.tokenizers import drop_token_types, ensure_padding, set_pad_token
from tests.harness.language import word_tokenizer
from tests.tiny import tiny_config, tiny_model
from tests.unit.models.conftest import WORDS


def fake(size: int = 101, pad: int | None = 0) -> SimpleNamespace:
    return SimpleNamespace(pad_token_id=pad, get_vocab=lambda: {f"w{i}": i for i in range(size)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


def test_a_local_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 95
    check_tokenizer(tokenizer, tiny_config("bert"), 64)


def test_tokenizers_that_cannot_be_loaded(folder: Path, tmp_path: Path, saved: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"the folder has no vocabulary.*it holds config.json, model.safetensors"):
        load_tokenizer(str(saved()))
    with pytest.raises(ModelError, match=r"neither a local folder nor reachable"):
        load_tokenizer("no-one/no-tokenizer")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"its files cannot be read"):
        load_tokenizer(str(folder))


def test_a_familys_own_tokenizer_comes_first() -> None:
    family = SimpleNamespace(load_tokenizer=lambda name: f"mine of {name}")
    assert load_tokenizer("x", family=family) == "mine of x"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokenizer", "family", "length", "message"),
    [
        (fake(pad=None), "bert", 64, "the tokenizer has no pad token"),
        (fake(102), "bert", 64, r"token ids up to 101, the model's embeddings 101 rows \(0 to 100\)"),
        (fake(), "bert", 65, "train.max_length: 65; this model takes 1 to 64 tokens"),
        (fake(), "bert", 0, "train.max_length: 0"),
        (fake(pad=1), "roberta", 65, "takes 1 to 64 tokens"),
        (fake(pad=1), "xlm-roberta-xl", 65, "takes 1 to 64 tokens"),
        (fake(pad=1), "mpnet", 65, "takes 1 to 64 tokens"),
        (fake(pad=1), "longformer", 65, "takes 1 to 64 tokens"),
        (fake(pad=0), "mpnet", 64, "pads with id 0, the config says pad_token_id 1"),
        (fake(pad=0), "longformer", 64, "a longformer model counts positions from padding"),
        (fake(pad=0), "roberta", 64, "pads with id 0, the config says pad_token_id 1"),
        (fake(), "deberta-v2", 0, "takes at least 1 tokens"),
    ],
)
def test_what_does_not_fit(tokenizer: SimpleNamespace, family: str, length: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_tokenizer(tokenizer, tiny_config(family), length)


def test_lengths_that_fit() -> None:
    check_tokenizer(fake(), tiny_config("bert"), 64)
    check_tokenizer(fake(pad=1), tiny_config("roberta"), 64)
    check_tokenizer(fake(), tiny_config("deberta-v2"), 100_000)
    assert max_tokens(AutoConfig.for_model("deberta-v2")) == 512
    assert max_tokens(tiny_config("deberta-v2"), family_of(tiny_config("deberta-v2"))) is None
    assert max_tokens(AutoConfig.for_model("roberta", max_position_embeddings=514)) == 512
    assert max_tokens(None) is None
    # A type without a family of its own: the family that is named says nothing of lengths.
    assert max_tokens(AutoConfig.for_model("xmod", max_position_embeddings=514), family_of(None, "generic")) == 512


def test_a_tokenizer_that_only_has_a_length() -> None:
    class Plain:
        pad_token_id = 0

        def __len__(self) -> int:
            return 200

    with pytest.raises(ModelError, match=r"token ids up to 199"):
        check_tokenizer(Plain(), tiny_config("bert"), 8)


def test_token_types_of_a_model_that_knows_one_type_only() -> None:
    """A RoBERTa with BERT's tokenizer has no row for type 1; its default is 0 for every token."""
    tokenizer = SimpleNamespace(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    drop_token_types(tokenizer, tiny_config("bert"))
    assert "token_type_ids" in tokenizer.model_input_names
    drop_token_types(tokenizer, tiny_config("roberta"))
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, padded = word_tokenizer(pad=False), word_tokenizer()
    with caplog.at_level(logging.INFO, "progscale.data"):
        ensure_padding(tokenizer)
        ensure_padding(padded)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, padded.pad_token) == ("</s>", 1, "<pad>")
    assert caplog.messages == ["the tokenizer has no pad token: it pads with its end token '</s>'"]


def test_a_model_pads_like_its_tokenizer() -> None:
    """After it was built: an embedding that knows of a pad token keeps the gradient of that row at zero."""
    model = tiny_model("llama", "causal_lm", pad_token_id=None)
    set_pad_token(model, word_tokenizer().pad_token_id)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert model.model.embed_tokens.padding_idx is None
