"""The names a config may use for registered things, known without importing torch.

Importing the registries' packages takes seconds; a misspelt name should answer at once. The built-in names stand here once
more for that reason, and a test holds them equal to the registries. Names of other packages come from their entry points.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from progscale.config.schema import GLUE_TASKS, LANGUAGE_TASKS, SQUAD_TASKS, Config
from progscale.errors import Fault, nearest
from progscale.registry import registered

BUILT_IN = {
    "progscale.tasks": ("demo", *GLUE_TASKS, *LANGUAGE_TASKS, *SQUAD_TASKS, "table"),
    "progscale.methods": ("full",),
    "progscale.schedules": ("custom", "growing", "none", "progtuning", "weighted", "without_low_blocks"),
    "progscale.families": ("bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "roberta", "t5", "xlm-roberta-xl"),
}


def known(group: str) -> list[str]:
    """Names of an entry-point group: built in, from other installed packages, and what a plug-in has registered."""
    return sorted({*BUILT_IN[group], *(point.name for point in entry_points(group=group)), *registered(group)})


def name_faults(config: Config) -> list[Fault]:
    """Every name in the config that nothing is registered under; plug-ins are to be imported before."""
    faults = []
    for key, given, group in (
        ("task.name", config.task.name, "progscale.tasks"),
        ("method.name", config.method.name, "progscale.methods"),
        ("model.family", config.model.family, "progscale.families"),
        ("schedule.name", config.schedule.name, "progscale.schedules"),
    ):
        if given is None or given in (allowed := known(group)):
            continue
        # An entry point may name a module that registers other names than its own; only importing it tells.
        for point in entry_points(group=group):
            point.load()
        allowed = known(group)
        if given not in allowed:
            faults.append(Fault(key, f"'{given}' is unknown; known: {', '.join(allowed)}{nearest(given, allowed)}"))
    return faults
