"""What a fine-tuning method says: which tensors it trains, and how it changes the model to have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from progscale.registry import Registry

if TYPE_CHECKING:
    import torch

    from progscale.blocks import Partition


class Method(Protocol):
    """A fine-tuning method.

    `prepare` may change the model (add modules); it returns the model to train. `tensors` names what the method
    trains at most: what a stage trains is the intersection with the stage's live parts.
    """

    name: str

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model to train; it may be `model` itself, changed or not."""
        ...

    def tensors(self, partition: Partition) -> frozenset[str]:
        """Names of the parameters that the method trains at most."""
        ...


METHODS: Registry[type[Method]] = Registry("method", "progscale.methods", package="progscale.methods")
register = METHODS.register
