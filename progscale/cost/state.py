"""What a stage costs in memory: bytes of weights, gradients and the optimizer's state on a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a model's state on one rank, activations and buffers of the engine not counted."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    total_parameters: int,
    trainable_parameters: int,
    *,
    precision: Precision = "fp32",
    zero_stage: int = 0,
    world_size: int = 1,
    autocast: bool = False,
    moment_bytes: float = 8,
    four_bit: int = 0,
) -> StateBytes:
    """Bytes on one rank for weights, gradients and the state of the optimizer.

    With AdamW a trained parameter costs 16 bytes, a frozen one 2 (mixed precision) or 4 (float32). Mixed precision keeps
    half weights and half gradients, with float32 masters and the moments in the optimizer.

    Args:
        total_parameters: elements of the whole model.
        trainable_parameters: elements that the stage trains.
        precision: of weights and gradients.
        zero_stage: 0 to 3: 1 splits the optimizer's state over ranks, 2 the gradients too, 3 the weights too.
        world_size: ranks.
        autocast: weights stay in float32 and only the computation is in `precision`.
        moment_bytes: of the optimizer's moments for one element (`Optimizer.state_bytes_per_element`).
        four_bit: elements of the model that are quantised to four bits; ZeRO does not split them.

    Raises:
        ValueError: a ZeRO stage or world size that does not exist.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage {zero_stage}; 0 to 3 exist")
    if world_size < 1:
        raise ValueError(f"world_size {world_size}; at least 1 is needed")
    whole = precision == "fp32" or autocast
    width, optimizer_width = (4, moment_bytes) if whole else (2, 4 + moment_bytes)

    def split(size: int, from_stage: int) -> int:
        return -(-size // world_size) if zero_stage >= from_stage else size

    return StateBytes(
        weights=width * split(total_parameters - four_bit, 3) + -(-four_bit // 2),
        gradients=width * split(trainable_parameters, 2),
        optimizer=math.ceil(optimizer_width * split(trainable_parameters, 1)),
    )
