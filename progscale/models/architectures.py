"""Well-known architectures by name: enough to plan a run, or to start from random weights, with no network.

Only shapes are kept here, never weights. The names are those of the model hub, with or without the organisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """One published model's shape.

    Attributes:
        organisation: the owner's name on the hub ("google-bert").
        model_type: as transformers names it.
        config: what differs from the defaults of that type's config class.
    """

    organisation: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)


def _size(hidden: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **more,
    }


_BASE = _size(768, 12, 12, 3072)
_LARGE = _size(1024, 24, 16, 4096)
_ROBERTA: dict[str, Any] = {
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_EN, _MULTI = 50265, 250002
_DEBERTA: dict[str, Any] = {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "max_position_embeddings": 512,
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
}


def _deberta(hidden: int, layers: int, heads: int, inner: int, **more: Any) -> Architecture:
    config = {**_DEBERTA, "vocab_size": 128100, "pooler_hidden_size": hidden, **more}
    return Architecture("microsoft", "deberta-v2", _size(hidden, layers, heads, inner, **config))


def _roberta(organisation: str, model_type: str, size: Mapping[str, Any], vocab: int) -> Architecture:
    return Architecture(organisation, model_type, {**_ROBERTA, **size, "vocab_size": vocab})


def _albert(hidden: int, layers: int, heads: int) -> Architecture:
    return Architecture("albert", "albert", _size(hidden, layers, heads, 4 * hidden, vocab_size=30000, embedding_size=128))


def _longformer(size: Mapping[str, Any]) -> Architecture:
    window, positions = [512] * int(size["num_hidden_layers"]), {"max_position_embeddings": 4098}
    return Architecture("allenai", "longformer", {**_ROBERTA, **size, **positions, "attention_window": window, "vocab_size": _EN})


def _deberta_v1(hidden: int, layers: int, heads: int) -> Architecture:
    later = ("position_buckets", "norm_rel_ebd", "share_att_key")
    config = {key: value for key, value in _DEBERTA.items() if key not in later}
    config |= {"pos_att_type": ["c2p", "p2c"], "vocab_size": _EN, "pooler_hidden_size": hidden}
    return Architecture("microsoft", "deberta", _size(hidden, layers, heads, 4 * hidden, **config))


def _mpnet(organisation: str) -> Architecture:
    positions = {"max_position_embeddings": 514, "layer_norm_eps": 1e-5}
    return Architecture(organisation, "mpnet", {**_BASE, **positions, "vocab_size": 30527})


_V2_CONV: dict[str, Any] = {"conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 64}
_DISTILBERT: dict[str, Any] = {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}


def _gpt2(hidden: int, layers: int, heads: int) -> Architecture:
    return Architecture("openai-community", "gpt2", {"n_embd": hidden, "n_layer": layers, "n_head": heads})


def _llama3(hidden: int, layers: int, heads: int, inner: int, *, rope_factor: float, **more: Any) -> Architecture:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config: dict[str, Any] = {
        **{"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": hidden // heads, "max_position_embeddings": 131072},
        **{"rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": 128001},
        "rope_parameters": {**rope, "original_max_position_embeddings": 8192},
    }
    return Architecture("meta-llama", "llama", _size(hidden, layers, heads, inner, **config, **more))


def _qwen(model_type: str, hidden: int, layers: int, heads: int, inner: int, key_values: int, **more: Any) -> Architecture:
    config: dict[str, Any] = {
        **{"vocab_size": 151936, "num_key_value_heads": key_values, "max_position_embeddings": 131072, "bos_token_id": 151643},
        **{"rms_norm_eps": 1e-6, "eos_token_id": 151643, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **more},
    }
    return Architecture("Qwen", model_type, _size(hidden, layers, heads, inner, **config))


def _t5(organisation: str, hidden: int, layers: int, heads: int, inner: int, **more: Any) -> Architecture:
    config = {"d_model": hidden, "d_kv": 64, "d_ff": inner, "num_layers": layers, "num_heads": heads, "vocab_size": 32128}
    return Architecture(organisation, "t5", {**config, "decoder_start_token_id": 0, **more})


# Version 1.1, which Flan-T5 goes on from: a gated feed-forward layer, and an output layer with weights of its own.
_V1_1: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_QWEN3: dict[str, Any] = {"head_dim": 128, "max_position_embeddings": 40960, "eos_token_id": 151645}

ARCHITECTURES: dict[str, Architecture] = {
    "bert-base-uncased": Architecture("google-bert", "bert", {**_BASE, "vocab_size": 30522}),
    "bert-base-cased": Architecture("google-bert", "bert", {**_BASE, "vocab_size": 28996}),
    "bert-large-uncased": Architecture("google-bert", "bert", {**_LARGE, "vocab_size": 30522}),
    "bert-large-cased": Architecture("google-bert", "bert", {**_LARGE, "vocab_size": 28996}),
    "bert-base-multilingual-cased": Architecture("google-bert", "bert", {**_BASE, "vocab_size": 119547}),
    "roberta-base": _roberta("FacebookAI", "roberta", _BASE, _EN),
    "roberta-large": _roberta("FacebookAI", "roberta", _LARGE, _EN),
    "distilroberta-base": _roberta("distilbert", "roberta", {**_BASE, "num_hidden_layers": 6}, _EN),
    "xlm-roberta-base": _roberta("FacebookAI", "xlm-roberta", _BASE, _MULTI),
    "xlm-roberta-large": _roberta("FacebookAI", "xlm-roberta", _LARGE, _MULTI),
    "xlm-roberta-xl": _roberta("facebook", "xlm-roberta-xl", _size(2560, 36, 32, 10240), 250880),
    "xlm-roberta-xxl": _roberta("facebook", "xlm-roberta-xl", _size(4096, 48, 32, 16384), 250880),
    "electra-small-discriminator": Architecture(
        "google", "electra", _size(256, 12, 4, 1024, embedding_size=128, vocab_size=30522)
    ),
    "electra-base-discriminator": Architecture("google", "electra", {**_BASE, "embedding_size": 768}),
    "electra-large-discriminator": Architecture("google", "electra", {**_LARGE, "embedding_size": 1024}),
    "distilbert-base-uncased": Architecture("distilbert", "distilbert", {**_DISTILBERT, "vocab_size": 30522}),
    "distilbert-base-cased": Architecture("distilbert", "distilbert", {**_DISTILBERT, "vocab_size": 28996}),
    "deberta-v3-xsmall": _deberta(384, 12, 6, 1536),
    "deberta-v3-small": _deberta(768, 6, 12, 3072),
    "deberta-v3-base": _deberta(768, 12, 12, 3072),
    "deberta-v3-large": _deberta(1024, 24, 16, 4096),
    "deberta-base": _deberta_v1(768, 12, 12),
    "deberta-large": _deberta_v1(1024, 24, 16),
    "deberta-xlarge": _deberta_v1(1024, 48, 16),
    "deberta-v2-xlarge": _deberta(1536, 24, 24, 6144, **_V2_CONV),
    "deberta-v2-xxlarge": _deberta(1536, 48, 24, 6144, **_V2_CONV),
    # The pooling is the published one; the config class's own default is "cls".
    "ModernBERT-base": Architecture("answerdotai", "modernbert", {**_size(768, 22, 12, 1152), "classifier_pooling": "mean"}),
    "ModernBERT-large": Architecture("answerdotai", "modernbert", {**_size(1024, 28, 16, 2624), "classifier_pooling": "mean"}),
    "mpnet-base": _mpnet("microsoft"),
    "all-mpnet-base-v2": _mpnet("sentence-transformers"),
    "longformer-base-4096": _longformer(_BASE),
    "longformer-large-4096": _longformer(_LARGE),
    "bigbird-roberta-base": Architecture("google", "big_bird", _BASE),
    "bigbird-roberta-large": Architecture("google", "big_bird", _LARGE),
    "albert-base-v2": _albert(768, 12, 12),
    "albert-large-v2": _albert(1024, 24, 16),
    "albert-xlarge-v2": _albert(2048, 24, 16),
    "albert-xxlarge-v2": _albert(4096, 12, 64),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "Llama-3.2-1B": _llama3(2048, 16, 32, 8192, rope_factor=32.0, tie_word_embeddings=True),
    "Llama-3.2-3B": _llama3(3072, 28, 24, 8192, rope_factor=32.0, tie_word_embeddings=True),
    "Llama-3.1-8B": _llama3(4096, 32, 32, 14336, rope_factor=8.0),
    "Qwen2.5-0.5B": _qwen("qwen2", 896, 24, 14, 4864, 2, max_position_embeddings=32768, tie_word_embeddings=True),
    "Qwen2.5-1.5B": _qwen("qwen2", 1536, 28, 12, 8960, 2, tie_word_embeddings=True),
    "Qwen2.5-7B": _qwen("qwen2", 3584, 28, 28, 18944, 4, vocab_size=152064),
    "Qwen3-0.6B": _qwen("qwen3", 1024, 28, 16, 3072, 8, **_QWEN3, tie_word_embeddings=True),
    "Qwen3-1.7B": _qwen("qwen3", 2048, 28, 16, 6144, 8, **_QWEN3, tie_word_embeddings=True),
    "Qwen3-8B": _qwen("qwen3", 4096, 36, 32, 12288, 8, **_QWEN3),
    "t5-small": _t5("google-t5", 512, 6, 8, 2048),
    "t5-base": _t5("google-t5", 768, 12, 12, 3072),
    "t5-large": _t5("google-t5", 1024, 24, 16, 4096),
    "flan-t5-base": _t5("google", 768, 12, 12, 2048, **_V1_1),
    "flan-t5-large": _t5("google", 1024, 24, 16, 2816, **_V1_1),
    "flan-t5-xl": _t5("google", 2048, 24, 32, 5120, **_V1_1),
}


def find_architecture(name: str) -> Architecture | None:
    """The architecture of that name, with or without its own organisation; None if there is none.

    >>> find_architecture("google-bert/bert-base-uncased") is find_architecture("bert-base-uncased")
    True
    """
    organisation, _, short = name.rpartition("/")
    found = ARCHITECTURES.get(short)
    if found is None or organisation not in ("", found.organisation):
        return None
    return found


def architecture_config(name: str) -> PretrainedConfig:
    """The transformers config of a well-known architecture, without labels.

    Raises:
        KeyError: no such architecture.
    """
    from transformers import AutoConfig

    found = find_architecture(name)
    if found is None:
        raise KeyError(name)
    config = AutoConfig.for_model(found.model_type, **found.config)
    config.name_or_path = name
    return config
