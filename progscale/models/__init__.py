"""Model families and loading: what a model is called, where its parts live, how its weights are read."""

from progscale.models.family import FAMILIES, Family, HeadKind, ModelRequest, register_family
from progscale.models.loading import build_meta, find_family, load_config, load_model
from progscale.models.lookup import family_of
from progscale.models.tokenizers import check_tokenizer, load_tokenizer, max_tokens
from progscale.models.weights import checkpoint_files, checkpoint_names

__all__ = [
    "FAMILIES",
    "Family",
    "HeadKind",
    "ModelRequest",
    "build_meta",
    "check_tokenizer",
    "checkpoint_files",
    "checkpoint_names",
    "family_of",
    "find_family",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_tokens",
    "register_family",
]
