"""Tiny random models of every built-in family: small enough for hundreds of cases, complete enough to train."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from progscale.methods import Method, Subject, make_method
from progscale.models.family import FAMILIES, HeadKind

ENCODERS = (
    *("bert", "roberta", "xlm-roberta-xl", "electra", "distilbert", "deberta-v2"),
    *("modernbert", "mpnet", "longformer", "big_bird", "deberta", "ernie"),
)
DECODERS = ("gpt2", "llama")
FAMILY_NAMES = (*ENCODERS, *DECODERS, "t5")
# One block stands for many layers: no schedule in stages is allowed.
SHARED_BLOCKS = ("albert",)

_ROBERTA: dict[str, Any] = {"pad_token_id": 1, "max_position_embeddings": 66, "type_vocab_size": 1}
_EXTRA: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    # Embeddings narrower than the blocks, so that the projection exists.
    "electra": {"embedding_size": 8},
    "distilbert": {},
    # Attention in turn global and over four tokens, fewer than a batch has.
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 0, "classifier_pooling": "mean"},
    "mpnet": {"max_position_embeddings": 66, "relative_attention_num_buckets": 32},
    "longformer": {**_ROBERTA, "attention_window": 4, "sep_token_id": 2},
    "big_bird": {"attention_type": "original_full", "sep_token_id": 3},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "type_vocab_size": 0},
    "ernie": {},
    "albert": {"embedding_size": 8},
    # With relative positions, their norm and the convolution, as v2 xlarge has them.
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
}


def tiny_config(family_name: str, *, blocks: int = 4, dropout: float = 0.0, **kw: Any) -> PreTrainedConfig:
    """A config of the family with `blocks` blocks of width 16, 101 tokens, 64 positions.

    Args:
        family_name: one of FAMILY_NAMES, or a model type that shares a family ("qwen3").
        blocks: number of blocks.
        dropout: of hidden states, attention and classifier.
        **kw: further entries of the transformers config (`num_labels=3`).
    """
    size: dict[str, Any] = {"vocab_size": 101, "max_position_embeddings": 64}
    if family_name in ("gpt2", "llama", "mistral", "gemma", "qwen2", "qwen3", "t5"):
        return AutoConfig.for_model(family_name, **{**_language_model(family_name, blocks, dropout), **kw})
    if family_name == "distilbert":
        size |= {"dim": 16, "n_layers": blocks, "n_heads": 2, "hidden_dim": 32}
        size |= {"dropout": dropout, "attention_dropout": dropout, "qa_dropout": dropout, "seq_classif_dropout": dropout}
    else:
        size |= {"hidden_size": 16, "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": 32}
        size |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "classifier_dropout": dropout}
    if family_name == "modernbert":
        size |= dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), dropout)
        size |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
        del size["hidden_dropout_prob"], size["attention_probs_dropout_prob"]
    if family_name == "albert":
        size["classifier_dropout_prob"] = size.pop("classifier_dropout")
    if family_name == "electra":
        size["summary_last_dropout"] = dropout
    if family_name in ("deberta", "deberta-v2"):
        size |= {"pooler_dropout": dropout, "cls_dropout": dropout}
        del size["classifier_dropout"]
    return AutoConfig.for_model(family_name, **{**size, **_EXTRA[family_name], **kw})


def method_for(family_name: str, name: str = "full", head: HeadKind = "sequence_classification", **options: Any) -> Method[Any]:
    """A method applied to a family, with its own options."""
    return make_method(name, Subject(FAMILIES.get(family_name), head), options)


def _language_model(model_type: str, blocks: int, dropout: float) -> dict[str, Any]:
    """Entries of a decoder's or an encoder-decoder's config; the pad token is 0, the end token 1."""
    size: dict[str, Any] = {"vocab_size": 101, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if model_type == "gpt2":
        size |= {"n_positions": 64, "n_embd": 16, "n_layer": blocks, "n_head": 2, "n_inner": 32}
        return size | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), dropout)
    if model_type == "t5":
        size |= {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": blocks, "num_heads": 2, "decoder_start_token_id": 0}
        # Of the usual size, T5 amplifies the rounding of sums that are split over ranks in another way.
        size |= {"relative_attention_num_buckets": 8, "initializer_factor": 0.3}
        return size | {"dropout_rate": dropout, "classifier_dropout": dropout}
    # Two query heads share one of keys and values, as in all but the smallest of the published ones.
    size |= {"hidden_size": 16, "num_hidden_layers": blocks, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return size | {"intermediate_size": 32, "max_position_embeddings": 64, "attention_dropout": dropout}


def tiny_model(
    family_name: str,
    head: str = "sequence_classification",
    blocks: int = 4,
    seed: int = 0,
    dropout: float = 0.0,
    **kw: Any,
) -> PreTrainedModel:
    """A float32 model with random weights, the same for the same seed; torch's generator is left as it was."""
    config = tiny_config(family_name, blocks=blocks, dropout=dropout, **kw)
    auto = {
        "sequence_classification": AutoModelForSequenceClassification,
        "question_answering": AutoModelForQuestionAnswering,
        "causal_lm": AutoModelForCausalLM,
        "seq2seq_lm": AutoModelForSeq2SeqLM,
    }[head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model
