"""How much memory some work needs at its peak, beside what is there before it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from progscale.memory import available_bytes


@dataclass
class Peak:
    """Bytes at the peak of what ran inside; 0 until it has ended."""

    bytes: int = 0


@contextlib.contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measures what torch allocates inside beyond what it holds at the beginning.

    On a GPU that is the caching allocator's own figure, whose peak begins anew; on a CPU torch's profiler sees every tensor come
    and go, where the resident size of the process would show what the C library keeps.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    # Else the profiler writes lines about its own beginning and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak.bytes = max(peak.bytes, held)


def free_bytes(device: torch.device, local_ranks: int) -> int:
    """Bytes that this rank may still take: of its GPU, what torch keeps in reserve included; of the CPU its share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_bytes() // max(1, local_ranks)
