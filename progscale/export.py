"""The trained model in the format that `from_pretrained` loads, with its label names and its tokenizer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from progscale.checkpoint.store import sync, write_durably
from progscale.engine.base import Engine
from progscale.errors import WriteError
from progscale.numbers import decode_scores, encode_numbers

log = logging.getLogger("progscale")

PARTIAL, OLD = ".partial", ".old"
# What the exported weights are: the optimizer step and the scores they had.
ORIGIN = "progscale.json"


def export_model(
    engine: Engine, tokenizer: Any, path: Path, *, step: int = 0, metrics: Mapping[str, float] | None = None
) -> None:
    """Writes the model to `path`, replacing what is there only when the new one is whole. A collective.

    Parameters are gathered one at a time; the main process holds them all on the CPU while it writes.

    Raises:
        WriteError: on all ranks, when it cannot be written.
    """
    state = {name: value for name, value in engine.full_parameters() if value is not None}
    origin = {"step": step, "metrics": encode_numbers(dict(metrics or {}))}

    def write() -> None:
        try:
            _write(engine.module, state, tokenizer, path, origin)
        except (OSError, SafetensorError) as error:
            raise WriteError(f"the model could not be written to {path}: {error}; the one before it is untouched") from error

    engine.on_main(write)


def exported_origin(path: Path) -> dict[str, Any] | None:
    """`step` and `metrics` of the model that lies at `path`; an export that was killed in the middle is mended first.

    Returns:
        None where there is no model of ours.
    """
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + OLD)
    if not path.exists():
        # The origin is written last: with it, the new model was whole.
        source = partial if (partial / ORIGIN).exists() else old
        if not (source / ORIGIN).exists():
            return None
        os.rename(source, path)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        content = json.loads((path / ORIGIN).read_text(encoding="utf-8"))
        return {"step": int(content["step"]), "metrics": decode_scores(content["metrics"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("%s is damaged (%s): the next evaluation counts as the best", path / ORIGIN, error)
        return None


def _write(
    module: torch.nn.Module, state: dict[str, torch.Tensor], tokenizer: Any, path: Path, origin: Mapping[str, Any]
) -> None:
    persistent = set(module.state_dict().keys())
    state |= {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in persistent}
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + OLD)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save(module, state, partial)
    if tokenizer is not None:
        if getattr(tokenizer, "is_fast", False):
            # What the last call cut, which no later user wants cut.
            tokenizer.backend_tokenizer.no_truncation()
        tokenizer.save_pretrained(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    # Under its name only when it is whole: it says that all the rest is.
    write_durably(partial / f".{ORIGIN}", (json.dumps(origin) + "\n").encode())
    os.rename(partial / f".{ORIGIN}", partial / ORIGIN)
    sync(partial)
    # At no moment is there no whole model: one of the three names always has one.
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)


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
