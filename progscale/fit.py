"""How many rows a rank runs at once: as many as memory holds in this stage, with the same global batch and the same gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from progscale.data import TrainLoader, collate
from progscale.engine.base import Engine, LossFunction
from progscale.engine.memory import free_bytes

# Of what is free; the rest is for what a trial on two sizes does not see: fragments, and buckets that grow.
SHARE_OF_FREE = 0.85
TRIALS = (2, 6)


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
        return (
            f"micro-batches of {self.rows} rows, {self.steps} a step: {self.predicted_bytes / 1e9:.3g} GB of "
            f"{self.limit_bytes / 1e9:.3g} GB free"
        )


def fit_micro_batch(
    engine: Engine, loader: TrainLoader, loss: LossFunction, *, local_ranks: int, limit_bytes: int | None = None
) -> Fit:
    """Tries micro-batches of two sizes on the longest rows, and takes the largest that memory will hold. A collective.

    What a micro-batch needs grows with its rows along a line: two small ones tell of a large one, and nothing runs out of memory.

    Args:
        engine: at the beginning of a stage.
        loader: whose rows are run.
        loss: of the rows.
        local_ranks: that share the CPU's memory.
        limit_bytes: for a rank's micro-batches; None takes most of what is free.
    """
    share = loader.global_batch_size // loader.world_size
    small, large = (min(rows, share) for rows in TRIALS)
    longest = np.argsort(-np.asarray(loader.split.lengths), kind="stable")
    needs = []
    for rows in dict.fromkeys((small, large)):
        chosen = longest[:rows]
        batch = collate(loader.split, chosen, loader.pad, multiple_of=loader.multiple_of, min_tokens=loader.min_tokens)
        needs.append((rows, engine.trial(batch, loss)))
    limit = limit_bytes if limit_bytes is not None else int(SHARE_OF_FREE * free_bytes(engine.device, local_ranks))
    # The rank that has least, and needs most, decides for all.
    everyone = engine.gather_objects((needs, limit))
    needs = [(rows, max(part[index][1] for part, _ in everyone)) for index, (rows, _) in enumerate(needs)]
    limit = min(part for _, part in everyone)
    (first, low), (last, high) = needs[0], needs[-1]
    slope = (high - low) / (last - first) if last > first else high / last
    slope = max(slope, 1.0)
    fixed = high - slope * last
    most = max(1, min(share, int((limit - fixed) // slope)))
    steps = -(-share // most)
    rows = -(-share // steps)
    return Fit(rows, steps, int(fixed + slope * rows), limit)
