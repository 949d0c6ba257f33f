"""The names a config may use for registered things, known without importing torch.

Importing the registries' packages takes seconds; a misspelt name should answer at once. The built-in names stand here once
more for that reason, and a test holds them equal to the registries. Names of other packages come from their entry points.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from progscale.config.schema import GLUE_TASKS, SQUAD_TASKS, Config
from progscale.errors import Fault, nearest
from progscale.registry import registered
from progscale.schedule import SCHEDULES

BUILT_IN = {
    "progscale.tasks": ("demo", *GLUE_TASKS, *SQUAD_TASKS, "table"),
    "progscale.methods": ("full",),
    "progscale.families": ("bert", "deberta-v2", "distilbert", "electra", "roberta", "xlm-roberta-xl"),
}


def known(group: str) -> list[str]:
    """Names of an entry-point group: built in, from other installed packages, and what a plug-in has registered."""
    return sorted({*BUILT_IN[group], *(point.name for point in entry_points(group=group)), *registered(group)})


def name_faults(config: Config) -> list[Fault]:
    """Every name in the config that nothing is registered under; plug-ins are to be imported before."""
    faults = []
    for key, given, allowed in (
        ("task.name", config.task.name, known("progscale.tasks")),
        ("method.name", config.method.name, known("progscale.methods")),
        ("model.family", config.model.family, known("progscale.families")),
        ("schedule.name", config.schedule.name, SCHEDULES.names()),
    ):
        if given is not None and given not in allowed:
            faults.append(Fault(key, f"'{given}' is unknown; known: {', '.join(allowed)}{nearest(given, allowed)}"))
    return faults
