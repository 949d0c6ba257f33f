"""AdamW of bitsandbytes: moments in 8 bits, and state that can be paged out of a GPU's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from progscale.optimizers.base import register
from progscale.optimizers.quantized import FIRST, SECOND, BitsandbytesOptimizer


@register("adamw_8bit")
@dataclass(frozen=True)
class AdamW8bit(BitsandbytesOptimizer):
    """AdamW with both moments in 8 bits, a scale for each block of 256 elements (Dettmers et al., arXiv 2110.02861)."""

    name = "adamw_8bit"
    moments = ("state1", "state2")
    blockwise = {"state1": FIRST, "state2": SECOND}

    def _make(self, optim: Any, parameters: list[Any], is_paged: bool) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = optim.AdamW8bit(
            parameters, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, is_paged=is_paged
        )
        return made


@register("paged_adamw_8bit")
@dataclass(frozen=True)
class PagedAdamW8bit(AdamW8bit):
    """The same in memory that the driver pages between GPU and CPU."""

    name = "paged_adamw_8bit"
    paged = True


@register("paged_adamw")
@dataclass(frozen=True)
class PagedAdamW(BitsandbytesOptimizer):
    """AdamW with float32 moments in memory that the driver pages between GPU and CPU."""

    name = "paged_adamw"
    moments = ("state1", "state2")
    paged = True

    def _make(self, optim: Any, parameters: list[Any], is_paged: bool) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = optim.AdamW(
            parameters, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, is_paged=is_paged
        )
        return made
