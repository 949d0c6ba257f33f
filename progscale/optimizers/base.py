"""What an optimizer says of itself: how it is built, and how its state lies in memory.

Engines and checkpoints move state by flat ranges, so they must know which entries of an optimizer's state hold a value for
each element, which of these are 8-bit codes with a scale for each block, and how the state of a tensor begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch

from progscale.optim import GroupSpec
from progscale.registry import Registry

# Elements of a flat tensor that share a scale, from its first one on (bitsandbytes' own number).
BLOCK = 256
# Memory that quantising takes beside the values: some 10 MB.
_BLOCKS_AT_ONCE = 4096


@dataclass(frozen=True)
class Request:
    """What an optimizer is asked for.

    Attributes:
        betas: `optimizer.betas`.
        eps: `optimizer.eps`.
        fused: `train.fused_optimizer`.
        options: `optimizer.options`, of optimizers from other packages.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    fused: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Blockwise:
    """How an entry of uint8 codes is meant: value = table[code] x scale of its block of `BLOCK` elements.

    Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).

    Attributes:
        scales: the state's entry with one float32 for each block.
        table: the state's entry with the table, the same for all tensors.
        signed: whether the table has negative values.
    """

    scales: str
    table: str
    signed: bool

    def values(self, device: torch.device) -> torch.Tensor:
        """The table: 256 float32, ascending."""
        return _table(self.signed, device)

    def code_of_zero(self) -> int:
        """The code that means 0 whatever the scale."""
        return int(self.values(torch.device("cpu")).abs().argmin())

    def quantize(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of flat float32 values, whole blocks of them.

        The nearest code each, and 0 stays 0: on a CPU bitsandbytes' own has no code below 2e-5 of the scale.
        """
        table = self.values(values.device)
        blocks = values.view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        codes = torch.empty_like(blocks, dtype=torch.uint8)
        for begin in range(0, len(blocks), _BLOCKS_AT_ONCE):
            part = slice(begin, begin + _BLOCKS_AT_ONCE)
            relative = blocks[part] / scales[part, None].clamp(min=torch.finfo(torch.float32).tiny)
            codes[part] = torch.bucketize(relative, (table[:-1] + table[1:]) / 2, out_int32=True)
        return codes.view(-1), scales


@cache
def _table(signed: bool, device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import create_dynamic_map

    table: torch.Tensor = create_dynamic_map(signed=signed)
    return table.to(device)


class Optimizer(ABC):
    """An optimizer's settings, a value that every stage builds its optimizer from.

    Attributes:
        name: in a config.
        moments: entries of the state that hold one value for each element.
        blockwise: those of them that are 8-bit codes, where `is_blockwise` says so of the tensor.
        state_bytes_per_element: of a large tensor, without the weights and their masters.
    """

    name: ClassVar[str]
    moments: ClassVar[tuple[str, ...]]
    blockwise: ClassVar[Mapping[str, Blockwise]] = {}

    @classmethod
    @abstractmethod
    def of(cls, request: Request) -> Optimizer:
        """The optimizer for a config's settings.

        Raises:
            ConfigError: an option that it does not have.
        """

    @abstractmethod
    def build(self, parameters: Mapping[str, torch.nn.Parameter], groups: Sequence[GroupSpec]) -> torch.optim.Optimizer:
        """A fresh optimizer over `groups`; the learning rate is set before each step."""

    def check(self, device: torch.device) -> str | None:
        """What the user must be told of this optimizer on `device`; None where there is nothing.

        Raises:
            UserError: it cannot be had here.
        """
        return None

    def is_blockwise(self, numel: int) -> bool:
        """Whether the state of a tensor of so many elements is kept in 8 bits."""
        return False

    def start(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a tensor before its first step, as the optimizer itself would make it."""
        # Torch's optimizers keep their step as a float32 tensor; where it lies matters to fused kernels only.
        step = torch.zeros((), dtype=torch.float32, device=tensor.device)
        zeros = {key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in self.moments}
        return {"step": step, **zeros}

    def moment_bytes(self, numel: int) -> list[int]:
        """Bytes of each tensor that the state of a tensor of so many elements has."""
        sizes = []
        for key in self.moments:
            quantized = key in self.blockwise and self.is_blockwise(numel)
            sizes += [numel, 4 * -(-numel // BLOCK)] if quantized else [4 * numel]
        return sizes

    @property
    def state_bytes_per_element(self) -> float:
        """Of a large tensor."""
        many = 2**20
        return sum(self.moment_bytes(many)) / many


def param_groups(parameters: Mapping[str, torch.nn.Parameter], groups: Sequence[GroupSpec]) -> list[dict[str, Any]]:
    """The param groups as torch's optimizers take them."""
    return [{"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups]


OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer", "progscale.optimizers", package="progscale.optimizers")
register = OPTIMIZERS.register
