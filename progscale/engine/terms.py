"""What goes into an engine and what comes out: settings, micro-batches, the report of a switch and of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from progscale.optimizers import AdamW, Optimizer

Precision = Literal["fp32", "bf16", "bf16_params", "fp16"]
LossFunction = Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]


class MicroBatch(Protocol):
    """What one rank runs at once: `inputs` and `labels` by name, and a weight of 0 for a mere filler."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Of the model."""

    @property
    def labels(self) -> dict[str, torch.Tensor]:
        """Of the loss."""

    @property
    def weight(self) -> float:
        """1, or 0 for a filler."""


@dataclass(frozen=True)
class EngineSettings:
    """What every engine needs to know.

    Attributes:
        precision: "fp32"; "bf16": fp32 parameters under bf16 autocast; "bf16_params": bf16 parameters with fp32 masters
            (DeepSpeed); "fp16": autocast with a loss scale (one GPU, DDP), fp16 parameters under DeepSpeed.
        optimizer: its settings.
        max_grad_norm: clip the global gradient norm; None leaves it.
        micro_batch_size: rows of a micro-batch at most (DeepSpeed wants a number in its config).
    """

    precision: Precision = "fp32"
    optimizer: Optimizer = field(default_factory=AdamW)
    max_grad_norm: float | None = 1.0
    micro_batch_size: int = 1


@dataclass(frozen=True)
class Switch:
    """What beginning a stage did.

    Attributes:
        rebuilt: False when the stage trains just what the one before did.
        seconds: wall time.
        carried: how the state moved: "none" (nothing to move), "shards" (rank-local) or "slices".
        requantized: values of moments in 8 bits, over all ranks, that were quantised anew on their way as slices.
    """

    rebuilt: bool
    seconds: float
    carried: Literal["none", "shards", "slices"]
    requantized: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        loss: mean over the rows, or the target tokens, of the global batch.
        grad_norm: global L2 norm before clipping.
        applied: False when the update was left out.
        fault: "loss" or "gradient" when it was not finite on some rank; None when the loss scale of fp16 skipped the step.
        ranks: the ranks where the fault was seen; none when the wrapped optimizer alone saw one.
        notices: what each rank passed to the step as its notice.
    """

    loss: float
    grad_norm: float
    applied: bool
    fault: Literal["loss", "gradient"] | None = None
    ranks: tuple[int, ...] = ()
    notices: tuple[int, ...] = ()
