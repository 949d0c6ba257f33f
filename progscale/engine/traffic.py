"""What the ranks send each other in a step: counted where torch hands it to the backend, whoever asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Which argument of a collective is the whole of what it moves: its result where parts are put together, else what goes in.
_WHOLE = {"_reduce_scatter_base_": 1, "reduce_scatter_": 1, "reduce_scatter_tensor_coalesced_": 1}


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes of all collectives begun inside of it, those that DDP's reducer begins in C++ too.

    A collective counts with the size of the whole tensor that it reduces, gathers or scatters; how much of it crosses a wire
    hangs on the backend's algorithm (a ring of n ranks sends 2 (n - 1) / n of an all-reduce, and half of that for the others).

    Attributes:
        bytes: by kind, as torch names it ("allreduce_", "_allgather_base_").
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this torch.compile would give up on whatever it has to trace while this mode is at work."""
        return True

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.bytes.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Sees every operation of torch; looks at those of its distributed backends."""
        if getattr(func, "namespace", "") == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.bytes[name] += _size(args[_WHOLE.get(name, 0)])
        return func(*args, **(kwargs or {}))


def _size(thing: Any) -> int:
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.element_size()
    return sum(map(_size, thing)) if isinstance(thing, list | tuple) else 0
