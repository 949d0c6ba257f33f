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


@pytest.mark.parametrize("name", ARCHITECTURES)
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
