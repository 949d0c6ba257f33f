"""Combinations of method, engine and family that the product refuses, as the product itself says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import product
from typing import Any

import torch

from progscale.config import Config, Engine
from progscale.errors import ModelError
from progscale.methods import METHODS
from tests.harness.cases import deepspeed_of
from tests.tiny import FAMILY_NAMES, method_for, tiny_model


@cache
def by_engine(method: str, engine: str) -> str | None:
    """Why a method cannot run on an engine; None where it can."""
    kind, deepspeed = METHODS.get(method), deepspeed_of(engine)
    config = Config(engine=Engine(name="auto" if deepspeed is None else "deepspeed", deepspeed=deepspeed))
    faults = kind.refusals(kind.Options(), config)
    return faults[0].message if faults else None


@cache
def by_family(method: str, family: str) -> str | None:
    """Why a method with its default options cannot be applied to a family; None where it can."""
    try:
        with torch.device("meta"):
            method_for(family, method).prepare(tiny_model(family))
    except ModelError as error:
        return str(error)
    return None


def is_allowed(case: Mapping[str, Any]) -> bool:
    """Whether the factors of a case that are decided so far go together."""
    method = case.get("method")
    if method is None:
        return True
    refused = "engine" in case and by_engine(method, case["engine"]) is not None
    return not refused and not ("family" in case and by_family(method, case["family"]) is not None)


def accepted(methods: Iterable[str]) -> list[tuple[str, str]]:
    """(method, family) that go together."""
    return [(name, family) for name, family in product(methods, FAMILY_NAMES) if by_family(name, family) is None]
