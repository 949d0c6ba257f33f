"""What the optimizers of bitsandbytes have in common: their state, and how it is begun."""

from __future__ import annotations

import importlib
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from progscale.errors import UserError
from progscale.optim import GroupSpec
from progscale.optimizers.base import Blockwise, Optimizer, Request, param_groups

# Tensors with fewer elements keep float32 moments (bitsandbytes' default).
SMALLEST_QUANTIZED = 4096
FIRST = Blockwise("absmax1", "qmap1", signed=True)
SECOND = Blockwise("absmax2", "qmap2", signed=False)


@dataclass(frozen=True)
class BitsandbytesOptimizer(Optimizer):
    """An optimizer of bitsandbytes.

    Attributes:
        betas: decay rates of the moments.
        eps: added to the root of the second moment, where there is one.
        paged: its state can be moved out of the memory of a GPU that is full.
    """

    paged: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @classmethod
    def of(cls, request: Request) -> BitsandbytesOptimizer:
        """With the betas and eps of the request."""
        return cls(request.betas, request.eps)

    @abstractmethod
    def _make(self, optim: Any, parameters: list[Any], is_paged: bool) -> torch.optim.Optimizer:
        """The optimizer of the module `bitsandbytes.optim`."""

    def build(self, parameters: Mapping[str, torch.nn.Parameter], groups: Sequence[GroupSpec]) -> torch.optim.Optimizer:
        """A fresh optimizer over `groups`; the learning rate is set before each step."""
        return self._built(param_groups(parameters, groups))

    def _built(self, parameters: list[Any]) -> torch.optim.Optimizer:
        # Under DeepSpeed the parameters are not on the GPU yet, so the machine is asked and not they. Without a GPU
        # bitsandbytes would fall back to the same, with a warning for each stage.
        return self._make(load_bitsandbytes(self.name).optim, parameters, self.paged and torch.cuda.is_available())

    def check(self, device: torch.device) -> str | None:
        """Tells that paging is off on a CPU.

        Raises:
            UserError: bitsandbytes cannot be imported.
        """
        load_bitsandbytes(self.name)
        if self.paged and device.type != "cuda":
            plain = self.name.removeprefix("paged_")
            return f"optimizer.name: {self.name} pages its state out of a GPU's memory; on this {device.type} it is {plain}"
        return None

    def is_blockwise(self, numel: int) -> bool:
        """Small tensors keep float32 moments."""
        return bool(self.blockwise) and numel >= SMALLEST_QUANTIZED

    def start(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state that bitsandbytes makes before the first step: buffers of zeros, paged ones too, and a step of 0."""
        optimizer: Any = self._built([tensor])
        optimizer.init_state(optimizer.param_groups[0], tensor, 0, 0)
        state = dict(optimizer.state[tensor])
        for entry in self.blockwise.values():
            if entry.table in state:
                state[entry.table] = entry.values(tensor.device)
        return state


def load_bitsandbytes(name: str) -> Any:
    """The package bitsandbytes.

    Args:
        name: of the optimizer, for the message.

    Raises:
        UserError: it cannot be imported.
    """
    # It recommends a package for 4-bit inference on the CPU to whoever imports it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError) as error:
        raise UserError(
            f"optimizer.name: '{name}' needs bitsandbytes, which cannot be imported here ({error}); "
            "pip install 'bitsandbytes>=0.50', or take 'adamw'"
        ) from error
