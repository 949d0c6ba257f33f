"""Pickles that run code, as somebody would put them where weights are expected."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path, form: str) -> bytes:
    """Code to be executed, as pickle or torch would load it; it makes the folder `marker`."""
    if form == "pickle":
        return pickle.dumps(Evil(marker))
    buffer = io.BytesIO()
    torch.save({"model": Evil(marker)}, buffer, _use_new_zipfile_serialization=form == "torch")
    return buffer.getvalue()
