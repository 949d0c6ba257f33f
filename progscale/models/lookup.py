"""Which family a model belongs to, and what to tell the user when it belongs to none."""

from __future__ import annotations

from typing import Any

from progscale.errors import ModelError, nearest
from progscale.models.family import FAMILIES, Family

_SNIPPET = """\
    from progscale.models.family import Family, register_family
    register_family(Family(
        name="my-encoder", model_types=("{model_type}",), base="encoder",
        embeddings=("embeddings",), stacks={{"blocks": "layers"}}, head=("final_norm?",),
    ))
"""


def family_of(model_or_config: Any, explicit: str | None = None) -> Family:
    """The family of a model or of a transformers config.

    Args:
        model_or_config: a config with `model_type`, or a module whose `config` has one; not looked at when
            `explicit` is given.
        explicit: a registered name.

    Raises:
        ModelError: no family has this model type; the message shows how to register one.
        RegistryError: `explicit` is not registered; the message lists the names.
    """
    if explicit is not None:
        return FAMILIES.get(explicit)
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None) or ""
    for _, family in FAMILIES.items():
        if model_type and model_type in family.model_types:
            return family
    raise ModelError(_unknown(model_type, config, type(model_or_config).__name__))


def hidden_size(model: Any) -> int:
    """Of a transformers model; 0 where its config does not say."""
    return int(getattr(getattr(model, "config", None), "hidden_size", None) or 0)


def families_by_type() -> dict[str, Family]:
    """`config.model_type` → family, for all registered families."""
    return {model_type: family for _, family in FAMILIES.items() for model_type in family.model_types}


def _unknown(model_type: str, config: Any, given: str) -> str:
    known = sorted(families_by_type())
    if not model_type:
        return (
            f"this {given} has no config.model_type, so its family cannot be looked up; set model.family to one of "
            f"{', '.join(FAMILIES.names())}, or to your own:\n{_SNIPPET.format(model_type='my-encoder')}"
        )
    lines = [f"no model family for model type '{model_type}'; known: {', '.join(known)}{nearest(model_type, known)}"]
    kind = _why_not(model_type, config)
    if kind:
        lines.append(kind)
    lines.append("Where its blocks are one list of like modules, model.family=generic finds them.")
    lines.append(how_to_register(config))
    return "\n".join(lines)


def how_to_register(model_or_config: Any) -> str:
    """The call that adds a family for a model, and where it can stand."""
    config = getattr(model_or_config, "config", model_or_config)
    return (
        "A model with embeddings, lists of blocks and a head is added with one call (paths below the base model):\n"
        f"{_SNIPPET.format(model_type=getattr(config, 'model_type', None) or 'my-encoder')}"
        f"Import its module with --plugin my_module, or let a package name it under the entry-point group '{FAMILIES.group}'"
    )


def _why_not(model_type: str, config: Any) -> str:
    """What is known about architectures that do not fit as they are."""
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_encoder_decoder", False):
        return (
            f"'{model_type}' is an encoder-decoder: name both of its lists of blocks in `stacks`, as "
            "progscale/models/families/t5.py does"
        )
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"'{model_type}' is decoder-only: progscale/models/families/llama.py is an example of such a family"
    return ""
