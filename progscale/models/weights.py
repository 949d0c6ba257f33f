"""Where a checkpoint's tensors lie, and which parameter each of them fills. Only safetensors is read here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from progscale.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Names that TensorFlow exports gave to the weight and bias of a layer norm.
_LEGACY = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def checkpoint_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model, checked to be whole; downloads them if `name` is a hub id.

    Args:
        name: hub id or local folder.
        revision: hub revision.

    Raises:
        ModelError: there are none (pickle only, for example), one is missing, truncated or not safetensors, or the
            index names a file outside its folder.
    """
    files = find_safetensors(name, revision)
    if not files:
        raise ModelError(
            f"model '{name}': no {SINGLE} and no {INDEX}; weights in pickle files (*.bin) can run code when they are "
            f"read, so they are only loaded with --allow-pickle on the command line"
        )
    for file in files:
        _check_whole(file)
    return files


def find_safetensors(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model, unchecked; an empty list if it has none.

    Raises:
        ModelError: the index cannot be read, or names a file that does not exist or lies outside its folder.
    """
    single = _find(name, SINGLE, revision)
    if single is not None:
        return [single]
    index = _find(name, INDEX, revision)
    if index is None:
        return []
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"model '{name}': {index} is not an index of safetensors files ({error})") from error
    files = []
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"model '{name}': {index} names {shard!r}; only *.safetensors files beside it are read")
        file = _find(name, shard, revision)
        if file is None:
            raise ModelError(f"model '{name}': {shard} is missing; {INDEX} names it")
        files.append(file)
    return files


def checkpoint_keys(files: Iterable[Path]) -> dict[str, Path]:
    """The file of each tensor by the tensor's name; headers alone are read."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def checkpoint_names(model: torch.nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Which parameter or buffer of `model` each tensor of a checkpoint fills; keys that fill none are left out.

    Handles a base-model prefix that only one side has (`encoder.layer.0…` for `bert.encoder.layer.0…`, and the
    reverse), legacy layer norms (`LayerNorm.gamma`, `LayerNorm.beta`) and tied tensors (their first name). Shapes
    are not compared: a classifier of another size is the caller's to refuse.

    Args:
        model: as transformers builds it; meta and ZeRO-3 parameters will do.
        keys: tensor names in the checkpoint.

    Returns:
        checkpoint name → name in `model.named_parameters()` or `model.named_buffers()`. Nothing is filled twice: of several
        keys for one tensor, that of its first name wins.
    """
    first_name: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        aliases[name] = first_name.setdefault(id(tensor), name)
    aliases |= {name: name for name, _ in model.named_buffers()}
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    matches: dict[str, tuple[str, str]] = {}
    for key in keys:
        renamed = key
        for old, new in _LEGACY:
            renamed = renamed.replace(old, new)
        # The prefixed reading comes before the plain one only where the plain one does not exist.
        for candidate in (renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}.")):
            if candidate not in aliases:
                continue
            target = aliases[candidate]
            if target not in matches or candidate == target:
                matches[target] = (key, candidate)
            break
    return {key: target for target, (key, _) in matches.items()}


def local_folder(name: str) -> Path | None:
    """The folder that `name` means (`~` expanded), or None if it is not one."""
    folder = Path(os.path.expanduser(name))
    return folder if os.path.isdir(folder) else None


def _find(name: str, filename: str, revision: str | None) -> Path | None:
    folder = local_folder(name)
    if folder is not None:
        file = folder / filename
        return file if os.path.isfile(file) else None
    from transformers.utils import cached_file

    found = cached_file(
        name,
        filename,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _check_whole(file: Path) -> None:
    """Reads the header, which says how long the file must be; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); it is truncated or corrupt, fetch it again") from error
