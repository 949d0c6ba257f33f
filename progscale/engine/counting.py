"""What a step sends between the ranks and what it computes: counted where torch hands it to a backend, whoever asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Which argument of a collective is the whole of what it moves: its result where parts are put together, else what goes in.
_WHOLE = {"_reduce_scatter_base_": 1, "reduce_scatter_": 1, "reduce_scatter_tensor_coalesced_": 1}


def _attention_on_cpu(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    query, key, value = args[:3]
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_back_on_cpu(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    gradient, query, key, value = args[:4]
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# Torch's own list knows the kernels of a GPU alone.
_OPERATIONS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back_on_cpu,
}


class StepCounter(TorchDispatchMode):
    """Counts what a step does: the bytes of all collectives begun inside of it, those that DDP's reducer begins in C++ too, and
    the floating-point operations of matrix products and attention, forward and backward.

    A collective counts with the size of the whole tensor that it reduces, gathers or scatters; how much of it crosses a wire
    hangs on the backend's algorithm (a ring of n ranks sends 2 (n - 1) / n of an all-reduce, and half of that for the others).

    Attributes:
        bytes: by kind, as torch names it ("allreduce_", "_allgather_base_").
        operations: by torch's own rules. Kernels that it has no rule for count nothing: those of a compiler, of
            bitsandbytes, and flash attention from outside torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.operations = 0

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
        result = func(*args, **(kwargs or {}))
        rule = _OPERATIONS.get(getattr(func, "_overloadpacket", None))
        if rule is not None:
            self.operations += int(rule(*args, **(kwargs or {}), out_val=result))
        return result


def _size(thing: Any) -> int:
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.element_size()
    return sum(map(_size, thing)) if isinstance(thing, list | tuple) else 0
