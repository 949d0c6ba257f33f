"""Sends results with many small tensors from process to process: torch's own pickling writes a whole file for each of them."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from progscale.engine.base import Engine


def packed(thing: Any) -> bytes:
    """What `unpacked` makes `thing` of again: values, types and shapes of its tensors, without gradients and shared memory.

    A connection's own pickling would not do: it shares tensors through file descriptors.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    """What was packed."""
    return pickle.loads(data)


def gathered(engine: Engine, thing: Any) -> list[Any]:
    """`thing` of every rank, in the order of ranks, for what holds tensors. A collective."""
    return [unpacked(data) for data in engine.gather_objects(packed(thing))]


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor or obj.device.type != "cpu":
            return NotImplemented
        values = obj.detach().contiguous()
        return _tensor, (values.view(-1).view(torch.uint8).numpy().tobytes(), obj.dtype, tuple(obj.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
