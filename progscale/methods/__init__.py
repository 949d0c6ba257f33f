"""Methods, and the rule that meets them with the schedule: live = stage ∩ the method's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from progscale.blocks import Partition
from progscale.errors import ModelError
from progscale.methods.base import METHODS, Method, Subject, register
from progscale.schedule import Stage

__all__ = ["METHODS", "Method", "Subject", "Trainable", "live_parameters", "make_method", "register"]


def make_method(name: str, subject: Subject, options: Mapping[str, Any] | None = None) -> Method[Any]:
    """A registered method, applied to a model.

    Args:
        name: as registered.
        subject: what it is applied to.
        options: its own; what is left out takes its default.

    Raises:
        RegistryError: unknown method.
        ModelError: the model's family refuses it.
        pydantic.ValidationError: wrong options; `progscale.names` has told the user of them before.
    """
    kind = METHODS.get(name)
    if name in subject.family.refuses:
        raise ModelError(f"method '{name}' cannot be had for a {subject.family.name} model: {subject.family.refuses[name]}")
    return kind(subject, kind.Options.model_validate(dict(options or {})))


class Trainable(Protocol):
    """Names what is trained at most: a method, or whoever has prepared a model already."""

    def tensors(self, partition: Partition) -> frozenset[str]:
        """Names of parameters."""
        ...


def live_parameters(stage: Stage, partition: Partition, method: Trainable) -> tuple[str, ...]:
    """Names of the parameters that stage `stage` trains, in the order of the model.

    A tied tensor belongs to the embeddings, so the embeddings policy decides about it; the head is always live,
    but for what no loss depends on.
    """
    tensors = method.tensors(partition)
    names = []
    for info in partition.parameters.values():
        if info.name not in tensors or info.unused:
            continue
        if info.part == "block":
            assert info.stack is not None and info.block is not None
            live = stage.is_live(info.stack, info.block)
        else:
            live = info.part == "head" or stage.embeddings
        if live:
            names.append(info.name)
    return tuple(names)
