"""Methods, and the rule that meets them with the schedule: live = stage ∩ the method's tensors."""

from __future__ import annotations

from progscale.blocks import Partition
from progscale.methods.base import METHODS, Method, register
from progscale.schedule import Stage

__all__ = ["METHODS", "Method", "live_parameters", "register"]


def live_parameters(stage: Stage, partition: Partition, method: Method) -> tuple[str, ...]:
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
