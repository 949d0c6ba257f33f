"""The names known without torch are those of the registries."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from progscale.config import load_config
from progscale.methods import METHODS
from progscale.models.family import FAMILIES
from progscale.names import BUILT_IN, known, name_faults
from progscale.optimizers import OPTIMIZERS
from progscale.registry import Registry
from progscale.schedule import SCHEDULES
from progscale.tasks.base import TASKS


@pytest.mark.parametrize("registry", [TASKS, METHODS, FAMILIES, SCHEDULES, OPTIMIZERS], ids=lambda registry: registry.kind)
def test_built_in_names_are_those_of_the_registries(registry: Registry) -> None:
    from_others = {point.name for point in entry_points(group=registry.group)}
    assert set(BUILT_IN[registry.group]) == set(registry.names()) - from_others
    assert known(registry.group) == registry.names()


def test_every_unknown_name_is_reported_with_its_nearest() -> None:
    config = load_config(
        [
            {
                "task": {"name": "cloa"},
                "model": {"name": "x", "family": "brt"},
                "method": {"name": "ful"},
                "schedule": {"name": "progtunning"},
            }
        ]
    )
    faults = {fault.key: fault.message for fault in name_faults(config)}
    nearest = {"task.name": "cola", "method.name": "full", "model.family": "bert", "schedule.name": "progtuning"}
    assert set(faults) == set(nearest)
    for key, name in nearest.items():
        assert f"did you mean '{name}'?" in faults[key]
        assert "known: " in faults[key]


def test_known_names_are_no_faults() -> None:
    assert name_faults(load_config()) == []
