"""Modules that methods put into a model: bottleneck adapters, and linear layers in four bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

ADAPTER = "adapter"

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Bottleneck(nn.Module):
    """Down, activation, up, and the input added; close to the identity at first.

    Weights are drawn from a normal distribution cut off at two standard deviations, biases are 0, as in the source of Houlsby et
    al., Parameter-Efficient Transfer Learning for NLP (arXiv 1902.00751).

    Args:
        width: of the hidden states.
        size: of the bottleneck.
        activation: a key of `ACTIVATIONS`.
        init_scale: standard deviation of the first weights.
    """

    def __init__(self, width: int, size: int, activation: str, init_scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(size, width)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=init_scale, a=-2 * init_scale, b=2 * init_scale)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of shape `(…, width)` to the same shape."""
        return hidden + self.up(self.activation(self.down(hidden)))


def follow(module: nn.Module, adapter: Bottleneck) -> None:
    """Puts an adapter behind a module: it gets the module's output and takes its place.

    The module keeps its class and its parameters their names, so nothing of the model's code notices.
    """
    module.add_module(ADAPTER, adapter)
    module.register_forward_hook(_through_adapter)


def _through_adapter(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    # By the module's own attribute: a deep copy of the module must use its own copy of the adapter.
    adapter: Bottleneck = module.get_submodule(ADAPTER)  # type: ignore[assignment]
    return adapter(output)


def quantise(model: nn.Module, paths: list[str], *, quant_type: str, double: bool, compute: torch.dtype) -> None:
    """Replaces linear layers by bitsandbytes' four-bit ones, in place; the weights are quantised where they lie.

    Source: Dettmers et al., QLoRA (arXiv 2305.14314).

    Args:
        model: with its weights.
        paths: of the linear layers.
        quant_type: "nf4" or "fp4".
        double: quantise the blocks' scales too.
        compute: dtype of the products.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path in paths:
        old: Any = model.get_submodule(path)
        new = Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=compute,
            compress_statistics=double,
            quant_type=quant_type,
            device="meta",
        )
        weight: Any = Params4bit(
            old.weight.detach(), requires_grad=False, compress_statistics=double, quant_type=quant_type, module=new
        )
        new.weight = weight.to(old.weight.device)
        if old.bias is not None:
            # The layer would cast its bias in the first forward pass, and a frozen tensor would have changed.
            new.bias = nn.Parameter(old.bias.detach().to(compute), requires_grad=False)
        # On some processors a forward pass in eval mode would repack the weights in place.
        new.support_avx512bf16_for_cpu = False
        new.train(old.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def dequantise(model: nn.Module) -> None:
    """Replaces four-bit linear layers by plain ones with the values that they compute with, in place."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for path, old in list(model.named_modules()):
        if isinstance(old, Linear4bit):
            new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
            weight: Any = old.weight
            new.weight = nn.Parameter(dequantize_4bit(weight.data, weight.quant_state).float())
            if old.bias is not None:
                new.bias = nn.Parameter(old.bias.detach().float())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)


def quantisation_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what a quantised weight needs beside its codes; neither parameters nor buffers of the module."""
    # Of the module itself: PEFT's layers show the weight of the layer that they wrap as their own.
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    for prefix, part in (("quant", state), ("quant.nested", getattr(state, "state2", None))):
        for key in ("absmax", "offset"):
            tensor = getattr(part, key, None)
            if isinstance(tensor, torch.Tensor):
                yield f"{prefix}.{key}", tensor


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's generator of the CPU begins at `seed`, and is where it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
