"""Weights onto ranks: the ordinary way, and under ZeRO-3 without any rank holding the whole model."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from progscale.blocks import partition
from progscale.config.deepspeed import nvme_folder
from progscale.engine import ranks
from progscale.engine.deepspeed import second_group
from progscale.engine.mapped import as_deepspeed_reads_it, give_back_pinned, to_files
from progscale.errors import ModelError
from progscale.models.family import Family, ModelRequest
from progscale.models.loading import adapted, auto_class, load_config, load_model, location, may_lack, stored_otherwise
from progscale.models.saving import persistent_buffers
from progscale.models.weights import checkpoint_files, checkpoint_keys, checkpoint_names, find_safetensors


def load_module(
    request: ModelRequest, family: Family, deepspeed: Mapping[str, Any] | None, *, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The model of a request, ready for an engine.

    Under ZeRO-3 a checkpoint in safetensors is read tensor by tensor, and each rank keeps only its partition. Everything
    else (random weights, a family's own loader, pickle, tensors that transformers must convert) is built whole and partitioned
    when the engine begins.

    Args:
        request: which model.
        family: of the model.
        deepspeed: the run's DeepSpeed JSON.
        dtype: of partitioned parameters.

    Raises:
        ModelError: the weights cannot be loaded, or do not fit.
    """
    stage = int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))
    if stage != 3 or family.load is not None or request.random_weights:
        return load_model(request, family)
    if not find_safetensors(request.name, request.revision) or stored_otherwise(request):
        return load_model(request, family)
    assert deepspeed is not None
    return load_partitioned(request, family, deepspeed, dtype)


@contextlib.contextmanager
def whole_for_peft(deepspeed: Mapping[str, Any] | None) -> Iterator[None]:
    """PEFT gathers partitioned weights where it computes with them (DoRA, PiSSA), if transformers knows of ZeRO-3."""
    known = None
    if int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0)) == 3:
        from transformers.integrations import HfDeepSpeedConfig

        known = HfDeepSpeedConfig(as_deepspeed_reads_it(deepspeed or {}))
    try:
        yield
    finally:
        del known  # transformers knows of it as long as it lives


def load_partitioned(request: ModelRequest, family: Family, deepspeed: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """Builds the model without memory, then fills and partitions it module by module. A collective.

    The peak on a rank is its partition and the largest single module. A model with buffers that are made of its parameters is
    built whole.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open

    config = load_config(request)
    with init_empty_weights(include_buffers=False):
        module: Any = auto_class(request, config).from_config(
            config, dtype=torch.float32, trust_remote_code=request.trust_remote_code
        )
    module.tie_weights()
    adapted(module, family)
    sources = _sources(module, checkpoint_files(request.name, request.revision))
    if any(buffer.is_meta and name not in sources for name, buffer in module.named_buffers()):
        return load_model(request, family)
    missing = _missing(module, family, sources, request)
    draw(module, missing)
    partition_own = partitioner(deepspeed, dtype)
    # A tied tensor is filled where it stands first.
    first = {name for name, _ in module.named_parameters()}
    for name, child in module.named_modules():
        keys = [f"{name}.{key}" if name else key for key in child._parameters]
        own = [key for key in keys if key in first]
        if not own:
            continue
        _fill(child, [key for key in own if key not in missing], sources)
        partition_own(child)
        give_back_memory()
    for name, buffer in persistent_buffers(module).items():
        if name in sources:
            parent, _, own_name = name.rpartition(".")
            path, key = sources[name]
            with safe_open(path, framework="pt") as file:
                module.get_submodule(parent)._buffers[own_name] = file.get_tensor(key).to(buffer.dtype)
    if nvme_folder(deepspeed) is not None:
        give_back_pinned()
    # Tied names still point at the empty tensor that was there before.
    module.tie_weights()
    if module.can_generate():
        from transformers import GenerationConfig

        # Without the file the one that transformers has made of the model's config stays.
        with contextlib.suppress(OSError):
            module.generation_config = GenerationConfig.from_pretrained(
                location(request.name), revision=request.revision or "main"
            )
    module.eval()
    return module


def _sources(module: torch.nn.Module, files: list[Path]) -> dict[str, tuple[Path, str]]:
    """Name of a parameter or buffer → (file, key) of the tensor that fills it.

    Raises:
        ModelError: the checkpoint has several tensors for what is one in the model.
    """
    keys = checkpoint_keys(files)
    sources = {target: (keys[key], key) for key, target in checkpoint_names(module, keys).items()}
    first = {id(tensor): name for name, tensor in module.named_parameters()}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        own = first[id(tensor)]
        if name in keys and own in sources and sources[own][1] != name and not _equal(keys[name], name, *sources[own]):
            raise ModelError(untied(name, own))
    return sources


def _equal(path: Path, key: str, other_path: Path, other_key: str) -> bool:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file, safe_open(other_path, framework="pt") as other:
        return torch.equal(file.get_tensor(key), other.get_tensor(other_key))


def untied(name: str, other: str) -> str:
    """What is said of a checkpoint that contradicts its config."""
    return (
        f"the weights have two tensors, '{name}' and '{other}', for what is one in the model of config.json; "
        'set model.overrides to {"tie_word_embeddings": false}'
    )


def _missing(module: torch.nn.Module, family: Family, sources: dict[str, tuple[Path, str]], request: ModelRequest) -> set[str]:
    """Parameters that get fresh weights: of a new head, or that transformers never saves (sines of positions).

    Raises:
        ModelError: the checkpoint lacks others, or has them in another shape.
    """
    from safetensors import safe_open

    parts = partition(module, family)
    missing = set()
    for name, parameter in module.named_parameters():
        shape = None
        if name in sources:
            path, key = sources[name]
            with safe_open(path, framework="pt") as file:
                shape = tuple(file.get_slice(key).get_shape())
        if shape == tuple(parameter.shape):
            continue
        ignored = any(re.search(pattern, name) for pattern in getattr(module, "_keys_to_ignore_on_load_missing", None) or ())
        if not (ignored or may_lack(parts.parameters[name], request.head)):
            what = "is missing in" if shape is None else f"has shape {shape} instead of {tuple(parameter.shape)} in"
            raise ModelError(
                f"model '{request.name}': '{name}' {what} its weights; is this a checkpoint of the model in config.json?"
            )
        missing.add(name)
    return missing


def draw(module: Any, missing: set[str]) -> None:
    """Gives the missing parameters fresh weights, whole, on the CPU: by the model's own rule, in the order of transformers.

    A rule may be that of a module above (T5's classifier draws the weights of both layers in it).
    """
    for name, parameter in list(module.named_parameters()):
        if name not in missing:
            parameter._is_hf_initialized = True
            continue
        parent, _, key = name.rpartition(".")
        fresh = torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=parameter.requires_grad)
        module.get_submodule(parent)._parameters[key] = fresh
    prefixes = {name.rsplit(".", depth)[0] for name in missing for depth in range(1, name.count(".") + 1)}
    for name, child in _children_first(module):
        if name in prefixes or (missing and not name):
            module._init_weights(child)


def _children_first(module: torch.nn.Module, name: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    for key, child in module.named_children():
        yield from _children_first(child, f"{name}.{key}" if name else key)
    yield name, module


def _fill(child: torch.nn.Module, names: list[str], sources: dict[str, tuple[Path, str]]) -> None:
    """Gives the parameters that stand in `child` itself their weights, whole, on the CPU."""
    from safetensors import safe_open

    for name in names:
        key = name.rpartition(".")[2]
        old = child._parameters[key]
        assert old is not None
        tensor = torch.empty(old.shape, dtype=torch.float32)
        # The main process's values are broadcast when the module is partitioned; the others only need the room.
        if ranks.is_main():
            path, source = sources[name]
            # Opened for each tensor: pages of a mapping that stays open count as memory of the process.
            with safe_open(path, framework="pt") as file:
                tensor.copy_(file.get_tensor(source))
        child._parameters[key] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)


def give_back_memory() -> None:
    """Returns freed pages to the system, where the C library can: whole tensors freed between partitions leave holes.

    Without it a rank's resident memory reached 0.8 of a 1 GB model instead of 0.53.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def partitioner(deepspeed: Mapping[str, Any], dtype: torch.dtype) -> Callable[[torch.nn.Module], None]:
    """A function that partitions the parameters which stand in a module itself. Calling it is a collective."""
    import deepspeed as ds
    from deepspeed.utils import groups

    second_group(deepspeed)
    folder, deepspeed = nvme_folder(deepspeed), as_deepspeed_reads_it(deepspeed)
    config = {**deepspeed, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}}
    config["fp16"] = {"enabled": dtype == torch.float16}
    config["zero_optimization"] = {key: value for key, value in deepspeed["zero_optimization"].items() if value != "auto"}
    # It would make the group anew, which it can only once in a process.
    group = groups._get_zero_param_intra_parallel_group()
    # `zero.Init` partitions all parameters of the module that it is given; the others are partitioned already or empty.
    init = ds.zero.Init(config_dict_or_path=config, dtype=dtype, enabled=True, zero_param_parallel_group=group)

    def partition_own(child: torch.nn.Module) -> None:
        own = list(child.parameters(recurse=False))
        for parameter in own:
            if not hasattr(parameter, "ds_id"):  # a tied tensor is partitioned already
                parameter.data = parameter.data.to(dtype)
        init._convert_to_zero_parameters(own)
        if folder is not None:
            # One rank's disk alone may be full.
            ranks.on_all(lambda: to_files((vars(parameter)["ds_tensor"] for parameter in own), folder))

    return partition_own
