"""progscale: exact progressive fine-tuning of Transformers.

What stands here is for programs of yours, and stays; what the modules have besides may change. Nothing heavy is imported before
it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from progscale.api import train
    from progscale.config import Config, load_config
    from progscale.integrations.accelerate import Progressive
    from progscale.integrations.transformers import make_progressive
    from progscale.plan import plan_for
    from progscale.report import compare, read_run, write_report

__version__ = "0.1.0"

# Name → the module that has it.
_WHERE = {
    "Config": "progscale.config",
    "Progressive": "progscale.integrations.accelerate",
    "compare": "progscale.report",
    "load_config": "progscale.config",
    "make_progressive": "progscale.integrations.transformers",
    "plan_for": "progscale.plan",
    "read_run": "progscale.report",
    "train": "progscale.api",
    "write_report": "progscale.report",
}

__all__ = [
    "Config",
    "Progressive",
    "__version__",
    "compare",
    "load_config",
    "make_progressive",
    "plan_for",
    "read_run",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'progscale' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
