"""torch's AdamW: two float32 moments, 8 bytes an element."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from progscale.optim import GroupSpec
from progscale.optimizers.base import Optimizer, Request, param_groups, register


@register("adamw")
@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW's settings (Loshchilov and Hutter, arXiv 1711.05101).

    Attributes:
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        fused: one kernel for all tensors; None takes it where the device has it.
    """

    name = "adamw"
    moments = ("exp_avg", "exp_avg_sq")

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    fused: bool | None = None

    @classmethod
    def of(cls, request: Request) -> AdamW:
        """With all settings but the options."""
        return cls(request.betas, request.eps, request.fused)

    def build(self, parameters: Mapping[str, torch.nn.Parameter], groups: Sequence[GroupSpec]) -> torch.optim.Optimizer:
        """A fresh optimizer over `groups`; the learning rate is set before each step."""
        made, fused = param_groups(parameters, groups), self.fused
        if fused is None:
            fused = fused_available(parameter for group in made for parameter in group["params"])
        # False would turn off what torch takes by itself on a GPU too, one kernel for many tensors.
        return torch.optim.AdamW(made, lr=0.0, betas=self.betas, eps=self.eps, fused=fused or None)


def fused_available(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether torch has a fused AdamW for the device of every tensor."""
    return all(parameter.device.type in {"cpu", "cuda", "xpu", "mps"} for parameter in parameters)
