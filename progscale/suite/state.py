"""How far a run of a suite is, by what lies in its folder."""

from __future__ import annotations

import json
from typing import Literal

from progscale.config import config_hash
from progscale.suite.grid import Cell

State = Literal["finished", "begun", "missing", "other"]


def state_of(cell: Cell) -> State:
    """Whether the run has ended, can go on, has not begun, or another run lies in its folder."""
    config = cell.folder / "config.json"
    try:
        owner = json.loads(config.read_text(encoding="utf-8"))["hash"]
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "other"
    if owner != config_hash(cell.config):
        return "other"
    return "finished" if (cell.folder / "summary.json").exists() else "begun"
