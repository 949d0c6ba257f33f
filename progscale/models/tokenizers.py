"""Loading a tokenizer, and checking that it fits the model before anything is tokenised."""

from __future__ import annotations

import logging
from typing import Any

from progscale.errors import ModelError
from progscale.models.family import Family
from progscale.models.lookup import families_by_type
from progscale.models.weights import local_folder

log = logging.getLogger("progscale.data")

# One of these holds a vocabulary. Without any, transformers builds an empty tokenizer and says nothing.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# These compute positions from where padding is, so the two pad ids must agree.
_POSITIONS_FROM_PADDING = (
    *("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer", "mpnet"),
    *("data2vec-text", "ibert", "lilt", "luke", "roberta-prelayernorm", "xmod"),  # under the family `generic`
)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, family: Family | None = None
) -> Any:
    """The tokenizer of a hub id or local folder; the family's own loader comes first.

    Raises:
        ModelError: there is none, or it needs code of the repository that is not allowed.
    """
    if family is not None and family.load_tokenizer is not None:
        return family.load_tokenizer(name)
    from transformers import AutoTokenizer

    folder = local_folder(name)
    if folder is not None and not any((folder / file).is_file() for file in _VOCABULARIES):
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ModelError(f"tokenizer '{name}': the folder has no vocabulary ({', '.join(_VOCABULARIES)}); it holds {present}")
    try:
        return AutoTokenizer.from_pretrained(
            str(folder or name), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises bare Exception for a corrupt file
        text = str(error).strip().splitlines() or [type(error).__name__]
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"tokenizer '{name}': is defined by code in its repository, which is only run with "
                f"--trust-remote-code on the command line"
            ) from error
        where = "its files cannot be read" if folder else "neither a local folder nor reachable on the hub or cached"
        raise ModelError(f"tokenizer '{name}': {where} ({text[0].strip()})") from error


def ensure_padding(tokenizer: Any) -> None:
    """Lets a tokenizer without a pad token, as decoders have them, pad with its end token, and says so."""
    if getattr(tokenizer, "pad_token_id", None) is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer has no pad token: it pads with its end token '%s'", tokenizer.eos_token)


def set_pad_token(model: Any, pad_token_id: int) -> None:
    """Makes a model's configs name the pad token of its tokenizer.

    A decoder's classifier looks for the last token before it, generation fills with it, and who loads the exported model needs
    both. It is done after the model is built: its embeddings would leave out the gradient of a pad token that they know of.
    """
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if hasattr(config, "pad_token_id"):
            config.pad_token_id = pad_token_id


def drop_token_types(tokenizer: Any, config: Any) -> None:
    """Leaves token types out of a tokenizer's outputs where the model knows one type only (a RoBERTa with BERT's tokenizer)."""
    names = getattr(tokenizer, "model_input_names", None)
    if names is not None and getattr(config, "type_vocab_size", None) == 1:
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]


def max_tokens(config: Any, family: Family | None = None) -> int | None:
    """The longest input in tokens (special ones included) that a model takes; None for no limit."""
    family = family or families_by_type().get(getattr(config, "model_type", ""))
    if family is not None and family.max_tokens is not None:
        return family.max_tokens(config)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 0:
        return None
    behind_padding = getattr(config, "model_type", "") in _POSITIONS_FROM_PADDING
    return int(positions) - (int(config.pad_token_id) + 1 if behind_padding else 0)


def check_tokenizer(tokenizer: Any, config: Any, max_length: int, family: Family | None = None) -> None:
    """Refuses a tokenizer or a length that the model cannot take.

    Args:
        tokenizer: with `pad_token_id`, and `get_vocab()` or a length.
        config: the model's config.
        max_length: longest input in tokens, special ones included.
        family: None looks it up by the config's model type.

    Raises:
        ModelError: no pad token, token ids beyond the embeddings, pad ids that differ where positions depend on
            them, or `max_length` beyond the model's positions or without room for a token of the text.
    """
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ModelError("the tokenizer has no pad token, so examples cannot be batched; give it one (pad_token)")
    if "input_ids" not in getattr(tokenizer, "model_input_names", ["input_ids"]):
        names = ", ".join(map(str, tokenizer.model_input_names)) or "nothing"
        raise ModelError(f"the tokenizer's model_input_names are {names}; input_ids is needed")
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    size = max(vocabulary.values()) + 1 if vocabulary else len(tokenizer)
    rows = getattr(config, "vocab_size", None)
    if rows is not None and size > rows:
        raise ModelError(
            f"the tokenizer has token ids up to {size - 1}, the model's embeddings {rows} rows (0 to {rows - 1}); "
            f"this tokenizer belongs to another model"
        )
    model_type = getattr(config, "model_type", "")
    pad = getattr(config, "pad_token_id", None)
    if model_type in _POSITIONS_FROM_PADDING and tokenizer.pad_token_id != pad:
        raise ModelError(
            f"the tokenizer pads with id {tokenizer.pad_token_id}, the config says pad_token_id {pad}; "
            f"a {model_type} model counts positions from padding, so both must agree"
        )
    limit = max_tokens(config, family)
    if max_length < 1 or (limit is not None and max_length > limit):
        allowed = f"1 to {limit}" if limit is not None else "at least 1"
        raise ModelError(f"train.max_length: {max_length}; this model takes {allowed} tokens")
    # Below that, tokenizers do not cut at all, and say nothing.
    special = tokenizer.num_special_tokens_to_add(pair=True) if hasattr(tokenizer, "num_special_tokens_to_add") else 0
    if max_length <= special:
        raise ModelError(
            f"train.max_length: {max_length}; at least {special + 1} is needed: {special} tokens of a pair of texts are special"
        )
