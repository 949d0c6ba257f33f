"""Built-in architectures: the published sizes, offline."""

from __future__ import annotations

import pytest

from progscale.blocks import partition
from progscale.models.architectures import ARCHITECTURES, architecture_config, find_architecture
from progscale.models.family import ModelRequest
from progscale.models.loading import build_meta, find_family

# Millions of parameters with a classification head of two labels, and blocks.
SIZES = {
    "bert-base-uncased": (109.484, 12),
    "bert-base-cased": (108.312, 12),
    "bert-large-uncased": (335.144, 24),
    "bert-large-cased": (333.581, 24),
    "bert-base-multilingual-cased": (177.855, 12),
    "roberta-base": (124.647, 12),
    "roberta-large": (355.362, 24),
    "distilroberta-base": (82.120, 6),
    "xlm-roberta-base": (278.045, 12),
    "xlm-roberta-large": (559.892, 24),
    "xlm-roberta-xl": (3482.491, 36),
    "xlm-roberta-xxl": (10712.744, 48),
    "electra-small-discriminator": (13.549, 12),
    "electra-base-discriminator": (109.484, 12),
    "electra-large-discriminator": (335.144, 24),
    "distilbert-base-uncased": (66.955, 6),
    "distilbert-base-cased": (65.783, 6),
    "deberta-v3-xsmall": (70.831, 12),
    "deberta-v3-small": (141.896, 6),
    "deberta-v3-base": (184.424, 12),
    "deberta-v3-large": (435.064, 24),
    "deberta-base": (139.194, 12),
    "deberta-large": (406.215, 24),
    "deberta-xlarge": (758.856, 48),
    "deberta-v2-xlarge": (886.957, 24),
    "deberta-v2-xxlarge": (1566.914, 48),
    "ModernBERT-base": (149.606, 22),
    "ModernBERT-large": (395.833, 28),
    "mpnet-base": (109.488, 12),
    "all-mpnet-base-v2": (109.488, 12),
    "longformer-base-4096": (148.661, 12),
    "longformer-large-4096": (434.603, 24),
    "bigbird-roberta-base": (128.061, 12),
    "bigbird-roberta-large": (360.176, 24),
    "albert-base-v2": (11.685, 1),
    "albert-large-v2": (17.686, 1),
    "albert-xlarge-v2": (58.729, 1),
    "albert-xxlarge-v2": (222.604, 1),
}


# Parameters as published, with the language-model head, and blocks of each stack.
LANGUAGE_MODELS = {
    "gpt2": (124_439_808, 12),
    "gpt2-medium": (354_823_168, 24),
    "gpt2-large": (774_030_080, 36),
    "gpt2-xl": (1_557_611_200, 48),
    "Llama-3.2-1B": (1_235_814_400, 16),
    "Llama-3.2-3B": (3_212_749_824, 28),
    "Llama-3.1-8B": (8_030_261_248, 32),
    "Qwen2.5-0.5B": (494_032_768, 24),
    "Qwen2.5-1.5B": (1_543_714_304, 28),
    "Qwen2.5-7B": (7_615_616_512, 28),
    "Qwen3-0.6B": (596_049_920, 28),
    "Qwen3-1.7B": (1_720_574_976, 28),
    "Qwen3-8B": (8_190_735_360, 36),
    "t5-small": (60_506_624, 6),
    "t5-base": (222_903_552, 12),
    "t5-large": (737_668_096, 24),
    "flan-t5-base": (247_577_856, 12),
    "flan-t5-large": (783_150_080, 24),
    "flan-t5-xl": (2_849_757_184, 24),
}


def test_every_architecture_has_its_size_here() -> None:
    assert sorted([*SIZES, *LANGUAGE_MODELS]) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_have_the_published_parameters(name: str) -> None:
    encoder_decoder = "t5" in name
    request = ModelRequest(name, head="seq2seq_lm" if encoder_decoder else "causal_lm", random_weights=True)
    parts = partition(build_meta(request), find_family(request))
    count, blocks = LANGUAGE_MODELS[name]
    assert parts.numel() == count
    assert parts.num_blocks == ({"encoder": blocks, "decoder": blocks} if encoder_decoder else {"blocks": blocks})


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    request = ModelRequest(name, head="sequence_classification", random_weights=True)
    model = build_meta(request)
    assert all(parameter.is_meta for parameter in model.parameters())
    parts = partition(model, find_family(request))
    millions, blocks = SIZES[name]
    assert parts.numel() / 1e6 == pytest.approx(millions, abs=1e-3)
    assert parts.num_blocks == {"blocks": blocks}


def test_names_with_and_without_organisation() -> None:
    for name, architecture in ARCHITECTURES.items():
        assert find_architecture(name) is find_architecture(f"{architecture.organisation}/{name}")
    assert find_architecture("someone/bert-base-uncased") is None
    assert find_architecture("FacebookAI/roberta-base") is not None
    with pytest.raises(KeyError):
        architecture_config("nothing")
