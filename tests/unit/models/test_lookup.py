"""Which family a model has, and what is said about those that have none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from progscale.errors import ModelError, RegistryError
from progscale.models import family_of
from tests.tiny import FAMILY_NAMES, SHARED_BLOCKS, tiny_config, tiny_model


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *SHARED_BLOCKS])
def test_models_and_configs_find_their_family(name: str) -> None:
    assert family_of(tiny_model(name)).name == name
    assert family_of(tiny_config(name)).name == name
    assert family_of(torch.nn.Linear(1, 1), name).name == name


@pytest.mark.parametrize(
    ("model_type", "family"),
    [("xlm-roberta", "roberta"), ("camembert", "roberta"), *((kind, "llama") for kind in ("mistral", "qwen2", "qwen3", "gemma"))],
)
def test_model_types_that_share_a_family(model_type: str, family: str) -> None:
    assert family_of(AutoConfig.for_model(model_type)).name == family


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("bloom", ("'bloom' is decoder-only: progscale/models/families/llama.py", "register_family")),
        ("bart", ("'bart' is an encoder-decoder: name both", "progscale/models/families/t5.py", "register_family")),
        (
            "nystromformer",
            ("register_family", 'model_types=("nystromformer",)', "--plugin my_module", "progscale.families", "deberta-v2"),
        ),
        ("nystromformer", ("one list of like modules, model.family=generic finds them",)),
    ],
)
def test_what_is_said_about_others(model_type: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=f"no model family for model type '{model_type}'") as caught:
        family_of(AutoConfig.for_model(model_type))
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


def test_no_config_and_wrong_names() -> None:
    with pytest.raises(ModelError, match=r"this Linear has no config.model_type.*set model.family"):
        family_of(torch.nn.Linear(1, 1))
    with pytest.raises(RegistryError, match=r"no model family 'bertt'.*did you mean 'bert'"):
        family_of(None, "bertt")
