"""What a forward pass keeps for the backward pass, counted without computing it: fake tensors have shapes and no memory."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from progscale.blocks import FOUR_BIT

LOG = logging.getLogger(__name__)


def activation_bytes(
    model: torch.nn.Module,
    live: Collection[str],
    *,
    rows: int,
    length: int,
    target_length: int | None = None,
    precision: str = "fp32",
    attention: str = "auto",
    on_gpu: bool = False,
) -> int | None:
    """Bytes that autograd keeps of one micro-batch at the end of its forward pass, the casts of weights under autocast included.

    Args:
        model: on the meta device, as the method prepared it; stays as it is.
        live: names of the trained parameters.
        rows: of the micro-batch.
        length: tokens of each.
        target_length: tokens that a decoder beside an encoder reads of each; None for as many.
        precision: "bf16" and "fp16" are autocast, "bf16_params" has parameters of 16 bits.
        attention: transformers' implementation.
        on_gpu: attention with dropout keeps no matrix of length x length there, where torch has kernels for it; on a CPU it does.

    Returns:
        None where the model cannot be run so: its forward pass looks at the data (T5 at the end of each text), which a fake
        tensor has not; it takes no `input_ids`, or no rows of this length.
    """
    mode = FakeTensorMode()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    fake = faked(model, live, mode, torch.bfloat16 if precision == "bf16_params" else None, dtype).train()
    config: Any = getattr(fake, "config", None)
    if attention in ("eager", "sdpa") and config is not None:
        config._attn_implementation = attention
    own = {parameter.untyped_storage()._cdata for parameter in (*fake.parameters(), *fake.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Beside its size the tensor, so that no other storage comes by the same number.
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    try:
        with quiet(), mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = torch.zeros(rows, length, dtype=torch.long)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            if getattr(config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = tokens[:, : target_length or length].repeat(1, 1)
            autocast = torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()
            kernels = without_attention_dropout() if on_gpu else contextlib.nullcontext()
            with autocast, kernels:
                outputs = fake(**inputs)
            logits = getattr(outputs, "logits", None)
            if logits is not None and logits.dim() > 1 and logits.shape[-1] > 1:
                flat = logits.float().flatten(0, -2)
                functional.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long), reduction="none")
    except Exception as error:  # of each kind of model another one; what is lost is a figure of a table
        LOG.debug("activations of %s: %s", type(model).__name__, error)
        return None
    return sum(size for size, _ in kept.values())


def faked(
    model: torch.nn.Module,
    live: Collection[str],
    mode: FakeTensorMode,
    dtype: torch.dtype | None,
    of_quantised: torch.dtype | None,
) -> torch.nn.Module:
    """A copy with the same shapes on a pretended CPU.

    Args:
        model: to be copied.
        live: names of the trained parameters.
        mode: in which the copy's tensors are made.
        dtype: of its floating-point numbers; None leaves theirs.
        of_quantised: of weights that will be quantised, which no cast of is kept.
    """
    quantised = {name for name, parameter in model.named_parameters() if getattr(parameter, FOUR_BIT, False)}
    fake = copy.deepcopy(model)
    trained = {id(parameter) for name, parameter in fake.named_parameters() if name in live}
    cast_before = {id(parameter) for name, parameter in fake.named_parameters() if name in quantised}
    made: dict[int, torch.Tensor] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        if of_quantised is not None and id(tensor) in cast_before:
            with mode:
                return torch.empty(tensor.shape, dtype=of_quantised, device="cpu")
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
def quiet() -> Iterator[None]:
    """Torch writes a traceback of what a fake tensor cannot do."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


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
