"""Lion of bitsandbytes: the sign of one moment decides each step (Chen et al., arXiv 2302.06675)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from progscale.optimizers.base import register
from progscale.optimizers.quantized import FIRST, BitsandbytesOptimizer


@register("lion")
@dataclass(frozen=True)
class Lion(BitsandbytesOptimizer):
    """Lion with a float32 moment."""

    name = "lion"
    moments = ("state1",)

    def _make(self, optim: Any, parameters: list[Any], is_paged: bool) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = optim.Lion(parameters, lr=0.0, betas=self.betas, is_paged=is_paged)
        return made


@register("lion_8bit")
@dataclass(frozen=True)
class Lion8bit(BitsandbytesOptimizer):
    """Lion with its moment in 8 bits."""

    name = "lion_8bit"
    moments = ("state1",)
    blockwise = {"state1": FIRST}

    def _make(self, optim: Any, parameters: list[Any], is_paged: bool) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = optim.Lion8bit(parameters, lr=0.0, betas=self.betas, is_paged=is_paged)
        return made
