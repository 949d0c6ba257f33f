"""Checkpoints on disk that the loading tests read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from tests.tiny import tiny_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(90))]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # The client reads its environment when it is imported, so the flag itself is set.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model (its base model alone with `base=True`) and gives the folder."""

    def save(family: str = "bert", *, base: bool = False, shard: str = "5GB", **kw: object) -> Path:
        folder = tmp_path / f"{family}-{base}"
        model = tiny_model(family, **kw)  # type: ignore[arg-type]
        (model.base_model if base else model).save_pretrained(folder, max_shard_size=shard)
        return folder

    return save


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Changes entries of a saved config.json."""

    def edit(folder: Path, **entries: object) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return edit
