"""From a request to a model: config, weights, meta build.

Everything that can be wrong is looked for before weights are read. Code from a model's repository is never run,
and pickle weights never read, unless the request allows it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from progscale.blocks import ParameterInfo, partition
from progscale.errors import ModelError, nearest
from progscale.models.architectures import ARCHITECTURES, architecture_config, find_architecture
from progscale.models.family import FAMILIES, LANGUAGE_MODEL_HEADS, Family, HeadKind, ModelRequest
from progscale.models.lookup import families_by_type, family_of
from progscale.models.weights import checkpoint_files, checkpoint_keys, checkpoint_names, find_safetensors, local_folder

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# These follow from the task or from the file format; an override would contradict them.
_NOT_OVERRIDABLE = {
    "add_cross_attention": "the family says what a block is",
    "architectures": "it is set from the task",
    "dtype": "weights are always loaded in float32; set train.precision instead",
    "id2label": "it is set from the task's labels",
    "is_decoder": "the family says what a block is",
    "is_encoder_decoder": "the family says what a block is",
    "label2id": "it is set from the task's labels",
    "model_type": "name another model instead",
    "num_labels": "it is set from the task's labels",
    "problem_type": "it is set from the task",
    "return_dict": "outputs are read by their names",
    "transformers_version": "it is not an option",
}
# Each has a name in the config; more is a slip of the pen.
MOST_LABELS = 1_000_000
# Sizes and counts, which transformers takes as they come; a model without any of them fails in its first step, or says nothing.
_AT_LEAST_ONE = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "embedding_size", "type_vocab_size", "max_position_embeddings"),
        *("num_hidden_layers", "num_attention_heads", "dim", "hidden_dim", "n_layers", "n_heads"),
        *("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "num_key_value_heads", "head_dim"),
        *("d_model", "d_ff", "d_kv", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets"),
    }
)


def load_config(request: ModelRequest, *, weights: bool | None = None) -> PretrainedConfig:
    """The transformers config for a request, with its labels, problem type and overrides.

    Args:
        request: what is to be loaded.
        weights: whether published weights will be loaded into it, so that the config must be the published one;
            otherwise a well-known architecture needs no network. Default: unless `request.random_weights`.

    Raises:
        ModelError: no such model, unreadable config, code of the repository needed but not allowed, an unknown
            override, or label names that do not fit.
    """
    weights = not request.random_weights if weights is None else weights
    folder = local_folder(request.name)
    if folder is None and not weights and find_architecture(request.name) is not None:
        config = architecture_config(request.name)
    else:
        config = _published_config(request)
    _set_labels(config, request)
    _override(config, request.overrides)
    if request.attention is not None:
        config._attn_implementation = request.attention
    return config


def find_family(request: ModelRequest, family: Family | str | None = None, *, weights: bool | None = None) -> Family:
    """The family of a request: the given one, or the one that has the config's model type.

    Raises:
        ModelError: the config cannot be read, or no family has its model type.
        RegistryError: no family of the given name.
    """
    if isinstance(family, Family):
        return family
    if family is not None:
        return FAMILIES.get(family)
    weights = not request.random_weights if weights is None else weights
    known = find_architecture(request.name) if local_folder(request.name) is None and not weights else None
    content = {"model_type": known.model_type} if known else _config_content(request)
    if content.get("model_type") not in families_by_type():
        _refuse_remote_code(request, content)
    return family_of(SimpleNamespace(**{"model_type": None, "is_encoder_decoder": False, **content}))


def load_model(request: ModelRequest, family: Family | str | None = None) -> torch.nn.Module:
    """Builds a model in float32 on the CPU, with published or random weights.

    A head that the checkpoint lacks, or has in another size, is drawn from torch's global generator: seed it before.

    Args:
        request: what is to be loaded.
        family: a family or its name; None looks it up by the config's model type.

    Raises:
        ModelError: see `load_config`; or no safetensors weights, a truncated file, or weights that leave parts of
            the embeddings or blocks unfilled.
        RegistryError: no family of the given name.
    """
    import torch

    found = find_family(request, family)
    if found.load is not None:
        return found.load(request)
    config = load_config(request)
    auto = auto_class(request, config)
    if request.random_weights:
        return adapted(auto.from_config(config, dtype=torch.float32, trust_remote_code=request.trust_remote_code), found)
    return _from_pretrained(request, found, config, auto)


def check_attention(request: ModelRequest, model: Any) -> None:
    """Refuses an implementation of attention that the model or this machine does not have.

    Args:
        request: which model.
        model: with or without weights.

    Raises:
        ModelError: with transformers' reason.
    """
    if request.attention is None:
        return
    asked = f"model.attention: '{request.attention}'"
    if not hasattr(model, "get_correct_attn_implementation"):
        raise ModelError(f"{asked} is for models of transformers, and {type(model).__name__} is none; set it to auto")
    try:
        model.get_correct_attn_implementation(request.attention, is_init_check=True)
    except (ValueError, ImportError) as error:
        raise ModelError(f"{asked} is not possible here ({_first_line(error)}); set it to auto") from error


def check_weights(request: ModelRequest, family: Family) -> None:
    """Finds a model's weights, and downloads those of a hub id, before time is spent on its data.

    Raises:
        ModelError: there are none in safetensors (and pickle is not allowed), or a file is missing or cut short.
    """
    if family.load is None and not request.random_weights and not request.allow_pickle:
        checkpoint_files(request.name, request.revision)


def build_meta(request: ModelRequest, family: Family | str | None = None) -> torch.nn.Module:
    """The model of a request on the meta device: names and shapes, no memory, no weights read.

    Raises:
        ModelError: see `load_config`.
        RegistryError: no family of the given name.
    """
    import torch

    found = find_family(request, family, weights=False)
    # The machine that looks at a plan need not have the kernels.
    request = dataclasses.replace(request, attention=None)
    with torch.device("meta"):
        if found.load is not None:
            return found.load(dataclasses.replace(request, random_weights=True))
        config = load_config(request, weights=False)
        auto = auto_class(request, config)
        try:
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=request.trust_remote_code)
        except Exception as error:  # sizes that do not divide, an activation that is not known, …: each class has its own
            raise ModelError(
                f"model '{request.name}': it cannot be built from its config and model.overrides "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from error
        return adapted(model, found)


def adapted(model: Any, family: Family) -> torch.nn.Module:
    """A model as its family mends it."""
    if family.adapt is not None:
        family.adapt(model)
    built: torch.nn.Module = model
    return built


def _from_pretrained(request: ModelRequest, family: Family, config: PretrainedConfig, auto: Any) -> torch.nn.Module:
    import torch

    pickled = request.allow_pickle and not find_safetensors(request.name, request.revision)
    if not pickled:
        checkpoint_files(request.name, request.revision)
    try:
        model, info = auto.from_pretrained(
            location(request.name),
            config=config,
            revision=request.revision or "main",
            use_safetensors=not pickled,
            # Since transformers 5 the default is the checkpoint's own dtype; master weights must be float32.
            dtype=torch.float32,
            trust_remote_code=request.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged pickle raises anything
        raise ModelError(f"model '{request.name}': its weights cannot be loaded ({_first_line(error)})") from error
    adapted(model, family)
    parts = partition(model, family).parameters
    unfilled = [name for name in info["missing_keys"] if name in parts and not may_lack(parts[name], request.head)]
    if unfilled:
        below = [name for name in unfilled if parts[name].part != "head"]
        raise ModelError(
            f"model '{request.name}': its weights have nothing for {len(below or unfilled)} parameters of the "
            f"{'embeddings and blocks' if below else 'head'}, e.g. '{min(below or unfilled)}'; is this a checkpoint of a "
            f"{family.name} model with {_sizes(partition(model, family).num_blocks)}"
            f"{'' if below else ', and was its ' + request.head.replace('_', ' ') + ' head saved with it'}?"
        )
    for name, stored, wanted in info["mismatched_keys"]:
        if name in parts and not may_lack(parts[name], request.head):
            raise ModelError(
                f"model '{request.name}': '{name}' has shape {tuple(stored)} in the weights and {tuple(wanted)} in "
                f"the config; check config.json and model.overrides"
            )
    loaded: torch.nn.Module = model
    return loaded


def may_lack(info: ParameterInfo, head: HeadKind) -> bool:
    """Whether a checkpoint may have nothing for a parameter, which then begins with random weights.

    A new head begins so; the head of a language model is part of what was pretrained, and so are the norms above the blocks.
    """
    return info.unused or (info.replaceable and head not in LANGUAGE_MODEL_HEADS)


def stored_otherwise(request: ModelRequest) -> bool:
    """Whether transformers renames or cuts the tensors of this type of model while it loads them (esm, nomic_bert, gte, …)."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # before transformers had it, names in files were names in models
        return False
    return bool(get_checkpoint_conversion_mapping(load_config(request).model_type))


def missing_weights(request: ModelRequest, family: Family, model: Any, *, local_only: bool = False) -> frozenset[str]:
    """Parameters of the base model's own head (a pooler) that its checkpoint lacks, and that begin with random weights.

    What stands in pickle files, or under names that transformers converts, is not looked at.

    Args:
        request: which model.
        family: of the model.
        model: with or without weights, as transformers builds it.
        local_only: look into a local folder alone, so that nothing is downloaded.

    Raises:
        ModelError: the files are damaged.
    """
    if request.random_weights or family.load is not None or (local_only and local_folder(request.name) is None):
        return frozenset()
    parts = partition(model, family)
    own = {name for name, info in parts.parameters.items() if info.replaceable and parts.base and name.startswith(parts.base)}
    if not own or not find_safetensors(request.name, request.revision) or stored_otherwise(request):
        return frozenset()
    keys = checkpoint_keys(checkpoint_files(request.name, request.revision))
    return frozenset(own - set(checkpoint_names(model, keys).values()))


def _published_config(request: ModelRequest) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    content = _config_content(request)
    _refuse_remote_code(request, content)
    if content.get("model_type") not in CONFIG_MAPPING and "auto_map" not in content:
        found = family_of(SimpleNamespace(**{"model_type": None, **content}))
        raise ModelError(
            f"model '{request.name}': transformers has no config for model type '{content.get('model_type')}'; "
            f"family '{found.name}' must load it itself (Family.load)"
        )
    try:
        return AutoConfig.from_pretrained(
            location(request.name), revision=request.revision or "main", trust_remote_code=request.trust_remote_code
        )
    except Exception as error:  # a config is validated by whatever class it names
        raise ModelError(f"model '{request.name}': its config cannot be read ({_first_line(error)})") from error


def _config_content(request: ModelRequest) -> dict[str, Any]:
    """What config.json says, without interpreting it."""
    name, folder = request.name, local_folder(request.name)
    if folder is not None:
        file = folder / "config.json"
        if not os.path.isfile(file):
            present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise ModelError(f"model '{name}': the folder has no config.json (it holds {present})")
    else:
        file = _hub_config(name, request.revision)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model '{name}': {file} is not JSON ({error})") from error
    except OSError as error:
        raise ModelError(f"model '{name}': {file} cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise ModelError(f"model '{name}': {file} holds a JSON {type(content).__name__}; an object is needed")
    kind = content.get("model_type", "")
    if not isinstance(kind, str):
        raise ModelError(f"model '{name}': {file}: model_type is {kind!r:.40}; a string is needed")
    if not kind and "auto_map" not in content:
        known = ", ".join(sorted(families_by_type()))
        raise ModelError(f"model '{name}': {file} has no model_type, which says what to build; known: {known}")
    return content


def _hub_config(name: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    hint = nearest(name, [*ARCHITECTURES, *(f"{a.organisation}/{short}" for short, a in ARCHITECTURES.items())])
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        raise ModelError(f"model '{name}': is a file; give the folder that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model '{name}': no such folder{hint}")
    try:
        found = cached_file(name, "config.json", revision=revision)
    except Exception as error:  # the hub's client raises its own, its HTTP library's and OSError
        known = (
            "; its architecture is built in, so random weights (model.random_weights) work without the network"
            if find_architecture(name)
            else hint
        )
        raise ModelError(
            f"model '{name}': neither a local folder nor reachable on the hub, and not in the cache ({_first_line(error)}){known}"
        ) from error
    assert found is not None
    return Path(found)


def _refuse_remote_code(request: ModelRequest, content: Mapping[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    known = content.get("model_type") in CONFIG_MAPPING
    if "auto_map" in content and not known and not request.trust_remote_code:
        raise ModelError(
            f"model '{request.name}': model type '{content.get('model_type')}' is defined by code in its repository, "
            f"which is only run with --trust-remote-code on the command line"
        )


def _set_labels(config: PretrainedConfig, request: ModelRequest) -> None:
    if request.head in LANGUAGE_MODEL_HEADS:
        return
    if request.head == "question_answering":
        # transformers sizes the span head by num_labels: start and end.
        config.num_labels = 2
        config.problem_type = None
        return
    if not 1 <= request.num_labels <= MOST_LABELS:
        what = "at least 1 is needed (1 for regression)" if request.num_labels < 1 else f"at most {MOST_LABELS} are possible"
        raise ModelError(f"num_labels: {request.num_labels}; {what}")
    names = request.label_names
    if names and len(names) != request.num_labels:
        raise ModelError(f"label_names: {len(names)} names ({', '.join(names)}) for {request.num_labels} labels")
    if len(set(names)) != len(names):
        raise ModelError(f"label_names: {', '.join(names)}; every name may be used once")
    config.num_labels = request.num_labels
    names = names or tuple(f"LABEL_{index}" for index in range(request.num_labels))
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    config.problem_type = request.problem_type


def _override(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    content = config.to_dict()
    allowed = (set(content) | set(config.attribute_map)) - set(_NOT_OVERRIDABLE)
    allowed = {key for key in allowed if not key.startswith("_")}
    for key, value in overrides.items():
        if key in _NOT_OVERRIDABLE:
            raise ModelError(f"model.overrides.{key}: cannot be changed here; {_NOT_OVERRIDABLE[key]}")
        if key not in allowed:
            raise ModelError(
                f"model.overrides.{key}: not in the config of a {config.model_type} model{nearest(key, allowed)}"
                f" (it has {', '.join(sorted(allowed))})"
            )
        before = getattr(config, key, None)
        if key in _AT_LEAST_ONE and type(before) is type(value) is int and value < 1 <= before:
            raise ModelError(f"model.overrides.{key}: {value}; at least 1 is needed")
        if not _fits(before, value, key):
            raise ModelError(
                f"model.overrides.{key}: {value!r} is of type {type(value).__name__}; {type(before).__name__} such as "
                f"{before!r} is needed"
            )
        try:
            setattr(config, key, value)
        except Exception as error:  # newer transformers validate on assignment
            raise ModelError(f"model.overrides.{key}: {value!r} is refused ({_first_line(error)})") from error


def _fits(before: Any, value: Any, key: str) -> bool:
    """Whether an override has the type of what it replaces; what was None takes anything."""
    if before is None or value is None or type(value) is type(before):
        return True
    if isinstance(before, float):
        return type(value) is int
    # Files write a probability of zero as 0, which must not turn the key into a count.
    return type(before) is int and isinstance(value, float) and ("dropout" in key or "prob" in key)


def auto_class(request: ModelRequest, config: PretrainedConfig) -> Any:
    """The transformers auto class for the head; raises ModelError when the model type has no such head."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    auto = {
        "sequence_classification": transformers.AutoModelForSequenceClassification,
        "question_answering": transformers.AutoModelForQuestionAnswering,
        "causal_lm": transformers.AutoModelForCausalLM,
        "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    }[request.head]
    custom = auto.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto._model_mapping and not custom:
        raise ModelError(
            f"model '{request.name}': transformers has no {request.head.replace('_', ' ')} head for model type "
            f"'{config.model_type}'"
        )
    both_sides = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if request.head == "causal_lm" and both_sides:
        raise ModelError(
            f"model '{request.name}': a {config.model_type} model reads a text from both sides, so it sees the tokens that "
            f"task 'causal_lm' asks it for; take a decoder (gpt2, llama, qwen, …)"
        )
    return auto


def location(name: str) -> str:
    """What transformers is to load from: a folder's path with its `~` expanded, or a hub id as it is."""
    folder = local_folder(name)
    return str(folder) if folder is not None else name


def _sizes(num_blocks: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {stack}" for stack, count in num_blocks.items())


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    # Validators name the field in the first line, and what is wrong with it in the second.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
