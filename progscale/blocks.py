"""A model cut into embeddings, ordered blocks and head: every parameter in exactly one part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from progscale.models.family import Family

Part = Literal["embeddings", "block", "head"]


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter tensor and where it belongs.

    Attributes:
        name: as in `model.named_parameters()` (a tied tensor appears once, under its first name).
        shape: of the whole tensor, also under ZeRO-3 and on the meta device.
        part: embeddings, block or head.
        stack: the stack of a block parameter, else None.
        block: 0-based index in the stack, else None.
        tied: further names of the same tensor.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    stack: str | None = None
    block: int | None = None
    tied: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Partition:
    """All parameters of a model, in the order of `named_parameters`, each in exactly one part.

    Attributes:
        parameters: by name.
        num_blocks: blocks of each stack.
    """

    parameters: Mapping[str, ParameterInfo]
    num_blocks: Mapping[str, int]
