"""The trained model in the format that `from_pretrained` loads, with its label names and its tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from progscale.engine.base import Engine


def export_model(engine: Engine, tokenizer: Any, path: Path) -> None:
    """Writes the model to `path`, replacing what is there only when the new one is whole. A collective.

    Parameters are gathered one at a time; the main process holds them all on the CPU while it writes.
    """
    state = {name: value for name, value in engine.full_parameters() if value is not None}
    engine.on_main(lambda: _write(engine.module, state, tokenizer, path))


def _write(module: torch.nn.Module, state: dict[str, torch.Tensor], tokenizer: Any, path: Path) -> None:
    persistent = set(module.state_dict().keys())
    state |= {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in persistent}
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save(module, state, partial)
    if tokenizer is not None:
        if getattr(tokenizer, "is_fast", False):
            # What the last call cut, which no later user wants cut.
            tokenizer.backend_tokenizer.no_truncation()
        tokenizer.save_pretrained(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def _save(module: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    if hasattr(module, "save_pretrained"):
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar of its own for each file would break into that of the run
        module.save_pretrained(folder, state_dict=state)
        if shown:
            logging.enable_progress_bar()
        return
    # Somebody's own encoder that is no transformers model: weights by parameter name.
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
