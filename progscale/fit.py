"""How many rows a rank runs at once: as many as memory holds in this stage, with the same global batch and the same gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from progscale.data import TrainLoader, collate
from progscale.engine.base import Engine, LossFunction
from progscale.engine.memory import free_bytes

# Of what is free; the rest is for what trials on small sizes do not see: fragments, and buckets that grow.
SHARE_OF_FREE = 0.85
# Rows; the first one once more, for what is allocated once and stays.
TRIALS = (1, 1, 2, 6)


@dataclass(frozen=True)
class Fit:
    """A micro-batch that fits.

    Attributes:
        rows: of a micro-batch at most.
        steps: micro-batches of a global batch.
        predicted_bytes: that one needs at its peak, beside weights and state.
        limit_bytes: that there are.
    """

    rows: int
    steps: int
    predicted_bytes: int
    limit_bytes: int

    def __str__(self) -> str:
        short = "" if self.predicted_bytes <= self.limit_bytes else ", which may not be enough for a single row"
        return (
            f"micro-batches of {self.rows} rows, {self.steps} a step: {self.predicted_bytes / 1e9:.3g} GB of "
            f"{self.limit_bytes / 1e9:.3g} GB free{short}"
        )


def fit_micro_batch(
    engine: Engine,
    loader: TrainLoader,
    loss: LossFunction,
    *,
    local_ranks: int,
    limit_bytes: int | None = None,
    share_of_free: float = SHARE_OF_FREE,
) -> Fit:
    """Tries a few small micro-batches of the longest rows, and takes the largest that memory will hold. A collective.

    What a micro-batch needs grows with its rows along a line: small ones tell of a large one. None is tried that would not fit by
    those before it.

    Args:
        engine: at the beginning of a stage.
        loader: whose rows are run.
        loss: of the rows.
        local_ranks: that share the CPU's memory.
        limit_bytes: for a rank's micro-batches; None takes a share of what is free, without what the optimizer will need.
        share_of_free: which.
    """
    share = loader.global_batch_size // loader.world_size
    if limit_bytes is None:
        limit_bytes = int(share_of_free * max(0, free_bytes(engine.device, local_ranks) - engine.missing_state_bytes()))
    # The rank that has least decides for all, and with each size the one that needs most.
    limit = min(engine.gather_objects(limit_bytes))
    longest = np.argsort(-np.asarray(loader.split.lengths), kind="stable")
    needs: dict[int, int] = {}
    for size in (min(rows, share) for rows in TRIALS):
        if size in needs and len(needs) > 1:
            continue
        if needs and size > 1 and _line(needs, size) > limit:
            break
        batch = collate(loader.split, longest[:size], loader.pad, multiple_of=loader.multiple_of, min_tokens=loader.min_tokens)
        needs[size] = max(engine.gather_objects(engine.trial(batch, loss)))
    most = 1
    while most < share and _line(needs, most + 1) <= limit:
        most += 1
    steps = -(-share // most)
    rows = -(-share // steps)
    return Fit(rows, steps, _line(needs, rows), limit)


def _line(needs: dict[int, int], rows: int) -> int:
    """Bytes for so many rows, by the line through the smallest and the largest size that were tried, or in proportion to one."""
    (first, low), (last, high) = min(needs.items()), max(needs.items())
    slope = (high - low) / (last - first) if last > first else high / last
    return int(high + max(slope, 0.0) * (rows - last))
