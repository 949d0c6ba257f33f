"""A plug-in that writes down which rows each optimizer step was given: JSON lines in $PROGSCALE_ROWS/RANK, in that order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness import patches


def recorded(original: Any) -> Any:
    """TrainLoader.epoch; what a worker has prepared and nobody asked for is not written down."""

    def epoch(loader: Any, epoch: int, start: int = 0) -> Iterator[Any]:
        for batch in original(loader, epoch, start):
            real = [micro for micro in batch.micro_batches if micro.weight]
            line = {
                "step": epoch * loader.steps_per_epoch + batch.index,
                "rows": batch.rows.tolist(),
                "own": [row for micro in real for row in micro.rows.tolist()],
                "tokens": [token for micro in real for token in micro.inputs["input_ids"][:, 1].tolist()],
            }
            with (Path(os.environ["PROGSCALE_ROWS"]) / os.environ.get("RANK", "0")).open("a") as file:
                file.write(json.dumps(line) + "\n")
            yield batch

    return epoch


patches.add("progscale.data", "TrainLoader.epoch", recorded)
