"""A whole model into a folder that `from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progscale.errors import ModelError, nearest
from progscale.models.weights import SINGLE

if TYPE_CHECKING:
    import torch


def save_whole(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes weights and config of a model.

    Args:
        model: whose structure and config count; one that is no transformers model is saved as weights by parameter name.
        state: all parameters and persistent buffers, whole, on the CPU.
        folder: exists.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    if hasattr(model, "save_pretrained"):
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar of its own for each file would break into that of the run
        model.save_pretrained(folder, state_dict=dict(state))
        if shown:
            logging.enable_progress_bar()
        return
    save_tensors(state, folder / SINGLE)


def save_tensors(state: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes tensors by name as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, file, metadata={"format": "pt"})


def persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that `state_dict` holds, by name."""
    found = {}
    for prefix, child in module.named_modules():
        for key, buffer in child._buffers.items():
            if buffer is not None and key not in child._non_persistent_buffers_set:
                found[f"{prefix}.{key}" if prefix else key] = buffer
    return found


def fill_tensors(model: torch.nn.Module, file: Path) -> None:
    """Gives parameters and persistent buffers of a model the tensors of a safetensors file, by name.

    Raises:
        ModelError: the file has a tensor that the model has not, or has in another shape.
    """
    import torch
    from safetensors.torch import load_file

    # The state's tensors are the model's own memory, whatever way a module came by them.
    tensors = model.state_dict()
    with torch.no_grad():
        for name, value in load_file(file).items():
            if name not in tensors:
                raise ModelError(f"{file}: '{name}' is no tensor of this {type(model).__name__}{nearest(name, tensors)}")
            if tensors[name].shape != value.shape:
                raise ModelError(f"{file}: '{name}' has shape {tuple(value.shape)}, the model's {tuple(tensors[name].shape)}")
            tensors[name].copy_(value)
