"""A plug-in: rank 1 stops in optimizer step 4 in compiled code that holds the interpreter, so that none of its threads runs."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from tests.harness import patches

STEP, RANK, SECONDS = 4, "1", 600


def at_step(original: Any) -> Any:
    """progscale.loop.seed_step."""

    def seed_step(seed: int, step: int, rank: int) -> Any:
        if step == STEP and os.environ.get("RANK") == RANK:
            os.write(2, b"injected on rank 1: holds the interpreter\n")
            ctypes.PyDLL(None).sleep(SECONDS)
        return original(seed, step, rank)

    return seed_step


patches.add("progscale.loop", "seed_step", at_step)
