"""A run's model for others: its files with a model card, in a folder of their own or on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from progscale.errors import ReportError
from progscale.numbers import decode_scores
from progscale.report import read_run, render_run
from progscale.report.card import model_card

ORIGIN = "progscale.json"
ADAPTER = "adapter_config.json"


def export_run(folder: str | Path, target: str | Path) -> Path:
    """Writes the model of a finished run with its card and its report.

    Args:
        folder: of the run.
        target: to write; must not exist yet, or be empty.

    Raises:
        ReportError: the run has not ended, has no model, or the target cannot be written.
    """
    run, target = read_run(folder), Path(target).expanduser()
    model = run.path / "model"
    if not run.finished:
        raise ReportError(f"'{run.path}' has not ended ({run.step} of {run.total_steps} steps); go on with --resume auto")
    if any(stage["frozen_changed"] for stage in run.stages):
        raise ReportError(f"'{run.path}': frozen tensors have changed, so it is not the model that its card would describe")
    try:
        content = json.loads((model / ORIGIN).read_text(encoding="utf-8"))
        origin = {**content, "metrics": decode_scores(content["metrics"])}
    except FileNotFoundError:
        raise ReportError(f"'{run.path}' has no model (train.save_model was '{run.config['train']['save_model']}')") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"'{model / ORIGIN}' is damaged: {error}") from error
    card = model_card(run, origin, is_adapter=(model / ADAPTER).exists())
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ReportError(f"'{target}' exists and is not empty; choose another")
    try:
        shutil.copytree(model, target, dirs_exist_ok=True)
        (target / "README.md").write_text(card, encoding="utf-8")
        (target / "report.html").write_text(render_run(run), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"'{error.filename}' cannot be written ({error.strerror})") from error
    return target


def push(folder: Path, repository: str, *, private: bool, api: Any = None) -> str:
    """Uploads an exported folder to the hub; makes the repository where there is none.

    Args:
        folder: from `export_run`.
        repository: NAME, or OWNER/NAME.
        private: whether a new repository is.
        api: of huggingface_hub; by default one with the token that `hf auth login` has left, or HF_TOKEN.

    Returns:
        The repository's address.

    Raises:
        ReportError: the hub refuses, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = api or HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=made.repo_id, commit_message=f"{folder.name}, trained with progscale")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        lines = str(error).strip().splitlines()
        raise ReportError(
            f"--push-to-hub {repository}: {lines[0] if lines else type(error).__name__}; what was exported stays in {folder}"
        ) from error
    return str(made)
