"""The names a config may use for registered things, and the options that go with them, checked without importing torch.

Importing all registries' packages takes seconds; a misspelt name should answer at once. Built-in names whose modules need torch
stand here once more for that reason, and a test holds them equal to the registries. Names of other packages come from their
entry points.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from progscale.config import Config, Option
from progscale.config.faults import from_pydantic
from progscale.config.kinds import type_text
from progscale.config.schema import ADAM_OPTIMIZERS, GLUE_TASKS, LANGUAGE_TASKS, LION_OPTIMIZERS, SQUAD_TASKS
from progscale.errors import Fault, nearest
from progscale.methods import METHODS
from progscale.models.family import FAMILIES
from progscale.registry import Registry, registered
from progscale.schedule import SCHEDULES

# Registries whose modules import no torch answer for themselves.
LIGHT: dict[str, Registry[Any]] = {registry.group: registry for registry in (METHODS, FAMILIES, SCHEDULES)}
BUILT_IN = {
    "progscale.tasks": ("demo", *GLUE_TASKS, *LANGUAGE_TASKS, *SQUAD_TASKS, "table"),
    "progscale.optimizers": (*ADAM_OPTIMIZERS, *LION_OPTIMIZERS),
}


def known(group: str) -> list[str]:
    """Names of an entry-point group: built in, from other installed packages, and what a plug-in has registered."""
    if group in LIGHT:
        return LIGHT[group].names()
    return sorted({*BUILT_IN[group], *(point.name for point in entry_points(group=group)), *registered(group)})


def name_faults(config: Config) -> list[Fault]:
    """Every name in the config that nothing is registered under, and what is wrong with the options of a method.

    Plug-ins are to be imported before.
    """
    faults = []
    for key, given, group in (
        ("task.name", config.task.name, "progscale.tasks"),
        ("method.name", config.method.name, "progscale.methods"),
        ("model.family", config.model.family, "progscale.families"),
        ("schedule.name", config.schedule.name, "progscale.schedules"),
        ("optimizer.name", config.optimizer.name, "progscale.optimizers"),
    ):
        if given is None or given in (allowed := known(group)):
            continue
        # An entry point may name a module that registers other names than its own; only importing it tells.
        for point in entry_points(group=group):
            point.load()
        allowed = known(group)
        if given not in allowed:
            faults.append(Fault(key, f"'{given}' is unknown; known: {', '.join(allowed)}{nearest(given, allowed)}"))
    return faults + method_faults(config)


def method_faults(config: Config) -> list[Fault]:
    """Wrong options of the config's method, and what it cannot be combined with; nothing for a method that is not known."""
    if config.method.name not in METHODS:
        return []
    method = METHODS.get(config.method.name)
    fields = method.Options.model_fields
    try:
        options = method.Options.model_validate(config.method.options)
    except ValidationError as error:
        faults = []
        for fault, path in from_pydantic(error, lambda path: "", prefix=("method", "options"), fields=fields):
            has = f"'{config.method.name}' has {', '.join(fields)}" if fields else f"'{config.method.name}' takes none"
            hint = "" if path[2] in fields else f"{nearest(path[2], fields)}; {has}"
            faults.append(Fault(fault.key, fault.message + hint))
        return faults
    return method.refusals(options, config)


def metric_faults(config: Config, *, trust_remote_code: bool) -> list[Fault]:
    """A metric of `evaluate` is somebody's Python code, which no config file may run by itself."""
    metric = config.task.metric
    if metric is None or not metric.startswith("evaluate:") or trust_remote_code:
        return []
    return [Fault("task.metric", f"'{metric}' runs Python code that comes with the metric; allow it with --trust-remote-code")]


def method_options() -> list[Option]:
    """The options of all methods, as `describe_schema` lists those of the sections."""
    found = []
    for name, method in sorted(METHODS.items()):
        for key, field in method.Options.model_fields.items():
            default = field.get_default(call_default_factory=True)
            found.append(Option(f"method.options.{key}[{name}]", type_text(field), default, field.description or ""))
    return found


def with_options(config: Config) -> Config:
    """The config with the options of its method written out, so that records and comparisons have the defaults too.

    Raises:
        RegistryError: no such method.
        pydantic.ValidationError: wrong options.
    """
    options = METHODS.get(config.method.name).Options.model_validate(config.method.options)
    method = config.method.model_copy(update={"options": options.model_dump(mode="json")})
    return config.model_copy(update={"method": method})
