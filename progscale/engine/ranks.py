"""Talk between ranks before and beside an engine; without a process group there is one rank."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from progscale.errors import ProgscaleError

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Processes of the group."""
    return dist.get_world_size() if is_distributed() else 1


def gather_objects(thing: Any) -> list[Any]:
    """`thing` of every rank, in the order of ranks. A collective."""
    if not is_distributed():
        return [thing]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, thing)
    return gathered


def on_all(action: Callable[[], T]) -> T:
    """Does something on every rank; when it fails on any, every rank raises. A collective.

    An error meant for the user is the same on all ranks, the first rank's that has one; of any other, its own rank has the
    traceback.
    """
    result: list[T] = []
    failure: Exception | None = None
    try:
        result.append(action())
    except Exception as error:
        failure = error
    shared = failure
    if failure is not None and not isinstance(failure, ProgscaleError):
        # Any exception can be raised here, and not every one can be sent.
        shared = ProgscaleError(f"rank {rank()} failed: {type(failure).__name__}: {failure}")
    # Without this the other ranks would wait in their next collective until the launcher kills them.
    found = {index: error for index, error in enumerate(gather_objects(shared)) if error is not None}
    if failure is not None and (shared is not failure or min(found) == rank()):
        raise failure
    if found:
        raise found[min(found)]
    return result[0]


def on_main(action: Callable[[], T]) -> T | None:
    """Does something on rank 0 alone; when it fails there, every rank raises. A collective.

    Returns:
        What `action` gave, on rank 0; None elsewhere.
    """
    return on_all(lambda: action() if is_main() else None)


def connect_store(prefix: str, timeout_seconds: float) -> Any:
    """A connection of its own to the store that the launcher or rank 0 keeps: the process group's is not for two threads.

    Args:
        prefix: of the keys; those of another start of the same launch are never seen.
        timeout_seconds: of each call.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    run = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(f"{prefix}/{run}", store)


def barrier() -> None:
    """Waits for all ranks."""
    if is_distributed():
        dist.barrier()
