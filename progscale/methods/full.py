"""Full fine-tuning: every tensor of a live part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from progscale.methods.base import register

if TYPE_CHECKING:
    import torch

    from progscale.blocks import Partition


@register("full")
class Full:
    """Trains all parameters; the model is left as it is."""

    name = "full"

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Returns the model unchanged."""
        return model

    def tensors(self, partition: Partition) -> frozenset[str]:
        """Names of all parameters."""
        return frozenset(partition.parameters)
