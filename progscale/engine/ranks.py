"""Talk between ranks before and beside an engine; without a process group there is one rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this is rank 0."""
    return not is_distributed() or dist.get_rank() == 0


def gather_objects(thing: Any) -> list[Any]:
    """`thing` of every rank, in the order of ranks. A collective."""
    if not is_distributed():
        return [thing]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, thing)
    return gathered


def barrier() -> None:
    """Waits for all ranks."""
    if is_distributed():
        dist.barrier()
