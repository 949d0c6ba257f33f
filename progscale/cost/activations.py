"""What a forward pass keeps for the backward pass, counted without computing it: fake tensors have shapes and no memory."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn import functional

LOG = logging.getLogger(__name__)


def activation_bytes(
    model: torch.nn.Module, live: Collection[str], *, rows: int, length: int, precision: str = "fp32", on_gpu: bool = False
) -> int | None:
    """Bytes that autograd keeps of one micro-batch at the end of its forward pass, the casts of weights under autocast included.

    Args:
        model: on the meta device, as the method prepared it; stays as it is.
        live: names of the trained parameters.
        rows: of the micro-batch.
        length: tokens of each.
        precision: "bf16" and "fp16" are autocast, "bf16_params" has parameters of 16 bits.
        on_gpu: attention with dropout keeps no matrix of length x length there, where torch has kernels for it; on a CPU it does.

    Returns:
        None where the model's forward pass looks at the data (T5 at the end of each text), which a fake tensor has not.
    """
    mode = FakeTensorMode()
    fake = faked(model, live, mode, torch.bfloat16 if precision == "bf16_params" else None).train()
    own = {parameter.untyped_storage()._cdata for parameter in (*fake.parameters(), *fake.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Beside its size the tensor, so that no other storage comes by the same number.
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    config: Any = model.config
    try:
        with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = torch.zeros(rows, length, dtype=torch.long)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            if config.is_encoder_decoder:
                inputs["decoder_input_ids"] = tokens
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
            autocast = torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()
            attention = without_attention_dropout() if on_gpu else contextlib.nullcontext()
            with autocast, attention:
                outputs = fake(**inputs)
            logits = getattr(outputs, "logits", None)
            if logits is not None and logits.dim() > 1 and logits.shape[-1] > 1:
                flat = logits.float().flatten(0, -2)
                functional.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long), reduction="none")
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        LOG.debug("activations of %s: %s", type(model).__name__, error)
        return None
    return sum(size for size, _ in kept.values())


def faked(model: torch.nn.Module, live: Collection[str], mode: FakeTensorMode, dtype: torch.dtype | None) -> torch.nn.Module:
    """A copy with the same shapes on a pretended CPU, its floating-point numbers of another dtype where one is given."""
    fake = copy.deepcopy(model)
    trained = {id(parameter) for name, parameter in fake.named_parameters() if name in live}
    made: dict[int, torch.Tensor] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        with mode:
            return torch.empty(tensor.shape, dtype=kind, device="cpu")

    for module in fake.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = torch.nn.Parameter(of(parameter), requires_grad=id(parameter) in trained)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else of(buffer)
    return fake


@contextlib.contextmanager
def without_attention_dropout() -> Iterator[None]:
    """Torch then takes the kernel that keeps no matrix of the attention, as it does on a GPU with dropout too."""
    attention = functional.scaled_dot_product_attention

    def plain(*args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(*args[:4], **{**kwargs, "dropout_p": 0.0})

    functional.scaled_dot_product_attention = plain
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention
