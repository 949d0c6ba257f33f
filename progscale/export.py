"""The trained model in the format that `from_pretrained` loads, with its label names and its tokenizer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from progscale.checkpoint.store import sync, write_durably
from progscale.engine.base import Engine
from progscale.errors import ModelError, UserError, WriteError
from progscale.methods import Method, Subject, make_method
from progscale.models.family import FAMILIES, ModelRequest
from progscale.models.loading import load_model
from progscale.models.saving import persistent_buffers, save_whole
from progscale.models.tokenizers import set_pad_token
from progscale.numbers import decode_scores, encode_numbers

log = logging.getLogger("progscale")

PARTIAL, OLD = ".partial", ".old"
# What the exported weights are: the optimizer step and the scores they had.
ORIGIN = "progscale.json"
# Beside it, where a run that trains an adapter keeps the random weights that it begins with.
BASE = "base_model"
# Of an exported folder, what is the adapter and not its tokenizer.
ADAPTER_FILES = (ORIGIN, "adapter_model.safetensors", "adapter_config.json", "quantization_config.json", "README.md")


Save = Callable[[Any, Mapping[str, torch.Tensor], Path], None]


def export_model(
    engine: Engine,
    tokenizer: Any,
    path: Path,
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    save: Save = save_whole,
    names: Iterable[str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model to `path`, replacing what is there only when the new one is whole. A collective.

    Parameters are gathered one at a time; the main process holds them all on the CPU while it writes.

    Args:
        engine: whose model it is.
        tokenizer: saved beside it; None for none.
        path: of the folder.
        step: optimizer steps done.
        metrics: the scores of the model.
        save: writes structure and weights, as `Method.save`.
        names: of the parameters that `save` needs; None for all.
        about: from `describe`: what `load_exported` needs to know.

    Raises:
        WriteError: on all ranks, when it cannot be written.
    """
    wanted = None if names is None else set(names)
    chosen = [name for name in engine.parameters if wanted is None or name in wanted]
    state = {name: value for name, value in engine.full_parameters(chosen) if value is not None}
    origin = {"step": step, "metrics": encode_numbers(dict(metrics or {})), **(about or {})}

    def write() -> None:
        try:
            _write(engine.module, state, tokenizer, path, origin, save)
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
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    path: Path,
    origin: Mapping[str, Any],
    save: Save,
) -> None:
    state |= {name: buffer.detach().cpu() for name, buffer in persistent_buffers(module).items()}
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + OLD)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(module, state, partial)
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


def describe(method: Method[Any], request: ModelRequest, tokenizer: Any = None) -> dict[str, Any]:
    """What an export says of itself, as JSON values: the method with its options, and the model that it was applied to."""
    # What may run code is allowed by a command line, never by a file.
    model = {key: value for key, value in asdict(request).items() if key not in ("allow_pickle", "trust_remote_code")}
    model |= {"name": method.subject.base or request.name, "family": method.subject.family.name}
    options = method.options.model_dump(mode="json")
    pad = getattr(tokenizer, "pad_token_id", None)
    return {
        **{"method": method.name, "options": options, "precision": method.subject.precision, "model": model},
        "pad_token_id": pad,
    }


def load_exported(
    folder: str | Path,
    *,
    base: str | None = None,
    merge: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """A model as a run exported it, whatever its method, in eval mode on the CPU.

    Args:
        folder: `RUN/model`.
        base: where the base model of an adapter lies now; by default where it lay in the run.
        merge: merge what was trained into the base model, and give that: a plain transformers model.
        allow_pickle: the base model's weights may be pickle files, which can run code when they are read.
        trust_remote_code: the base model may bring Python code.

    Raises:
        UserError: the folder is no export; its base model is not there; or merging was asked for and cannot be.
    """
    path = Path(folder).expanduser()
    content = _description(path)
    known = content["model"]
    family = FAMILIES.get(known["family"])
    wanted = {field.name: known[field.name] for field in fields(ModelRequest) if field.name in known}
    request = replace(ModelRequest(**wanted), label_names=tuple(known["label_names"]), random_weights=False)
    # Whoever loads it may have another device.
    request = replace(request, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, attention=None)
    subject = Subject(family, request.head, known["name"], content["precision"])
    method = make_method(content["method"], subject, content["options"])
    if method.saves_whole:
        if merge:
            raise UserError(f"{path}: method '{method.name}' exports a whole model, there is nothing to merge: use it as it is")
        return load_model(replace(request, name=str(path), overrides={}), family).eval()
    beside = path.parent / BASE
    if base is None and beside.is_dir() and Path(request.name).name == BASE:
        base = str(beside)  # the random weights that the run began with, wherever it lies now
    model = load_model(replace(request, name=base or request.name), family)
    if content.get("pad_token_id") is not None:
        set_pad_token(model, content["pad_token_id"])
    model = method.merge(model, path) if merge else method.restore(model, path)
    return model.eval()


def merge_exported(
    folder: str | Path,
    target: str | Path,
    *,
    base: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Writes an adapter's folder as a plain model that needs no PEFT, with its tokenizer.

    Args:
        folder: `RUN/model`.
        target: must not exist yet, or be empty.
        base: where the base model of the adapter lies now; by default where it lay in the run.
        allow_pickle: as for `load_exported`.
        trust_remote_code: as for `load_exported`.

    Raises:
        UserError: as for `load_exported`; or there is something in the target.
        WriteError: it cannot be written.
    """
    source, path = Path(folder).expanduser(), Path(target).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: there is something already; name a folder that does not exist yet")
    model = load_exported(source, base=base, merge=True, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_whole(model, {name: value.detach() for name, value in model.state_dict().items()}, path)
        for file in source.iterdir():
            # Whatever a tokenizer consists of: all that is no part of the adapter.
            if file.is_file() and file.name not in ADAPTER_FILES:
                shutil.copy2(file, path / file.name)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"the merged model could not be written to {path}: {error}") from error


def _description(path: Path) -> dict[str, Any]:
    """What `describe` said, read from an export.

    Raises:
        ModelError: the folder is no export, or one of an older release.
    """
    file = path / ORIGIN
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content["model"], dict) and content["method"]:
            return content
    except FileNotFoundError:
        inside = path / "model"
        hint = f"; did you mean {inside}?" if (inside / ORIGIN).exists() else ""
        raise ModelError(f"{path}: no exported model: there is no {ORIGIN}{hint}") from None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as what an export says of itself ({error})") from error
    raise ModelError(f"{file}: does not say which method and model were exported")
