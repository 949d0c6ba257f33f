"""Full fine-tuning: every tensor of a live part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from progscale.methods.base import Method, NoOptions, register

if TYPE_CHECKING:
    from progscale.blocks import Partition


@register("full")
class Full(Method[NoOptions]):
    """Trains all parameters; the model is left as it is."""

    name = "full"

    def tensors(self, partition: Partition) -> frozenset[str]:
        """Names of all parameters."""
        return frozenset(partition.parameters)
