"""Adapter tuning: a bottleneck behind the self-attention and the feed-forward part of each block, before the residual is added.

Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP (arXiv 1902.00751), and its code. The `adapters` library
holds transformers below 5, so these are modules of our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import Field

from progscale.blocks import block_modules
from progscale.config import Section
from progscale.config.schema import Count, Text
from progscale.errors import ModelError, nearest
from progscale.methods.base import Method, register, task_head

if TYPE_CHECKING:
    import torch

    from progscale.blocks import Partition

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = "progscale-adapter"


class AdapterOptions(Section):
    """Options of `adapter`."""

    size: Count = Field(default=48, description="width of the bottleneck")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field(default="gelu", description="between down and up")
    init_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1e-3, description="standard deviation of the first weights (a normal distribution cut off at two of them)"
    )
    norms: bool = Field(default=False, description="train the norms of a live block too, as Houlsby et al. do")
    sublayers: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="paths in a block of the modules that an adapter follows; null: those of the model's family"
    )


@register("adapter")
class Adapter(Method[AdapterOptions]):
    """Adds a `Bottleneck` behind each sublayer of each block; the rest of the block is frozen."""

    name = "adapter"
    Options = AdapterOptions
    saves_whole = False

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Adds the adapters.

        Raises:
            ModelError: the family does not say where they go, or the width is unknown.
        """
        from progscale.layers import Bottleneck, follow

        for stack, blocks in block_modules(model, self.subject.family).items():
            for path, block in blocks.items():
                inside = dict(block.named_modules())
                for place in self._places(stack, inside, path):
                    module = inside[place]
                    width = self._width(model, module)
                    follow(module, Bottleneck(width, self.options.size, self.options.activation, self.options.init_scale))
        return model

    def _places(self, stack: str, inside: Mapping[str, Any], path: str) -> tuple[str, ...]:
        places = tuple(self.options.sublayers or self.subject.family.sublayers.get(stack, ()))
        if not places:
            raise ModelError(
                f"method 'adapter': family '{self.subject.family.name}' does not say which modules of a block of '{stack}' "
                f'feed the residual stream; name them, e.g. --set \'method.options.sublayers=["attention.output", "output"]\' '
                f"(a block has {', '.join(name for name in inside if name)})"
            )
        for place in places:
            if place not in inside:
                raise ModelError(
                    f"method.options.sublayers: '{place}' is no module of block '{path}'{nearest(place, inside)}; "
                    f"it has {', '.join(name for name in inside if name)}"
                )
        return places

    def _width(self, model: Any, module: Any) -> int:
        width = getattr(module, "out_features", None) or getattr(getattr(model, "config", None), "hidden_size", None)
        if not isinstance(width, int):
            raise ModelError(
                f"method 'adapter': the width of this {type(model).__name__} is unknown: it has no config.hidden_size, and the "
                f"modules that adapters follow are no linear layers"
            )
        return width

    def tensors(self, partition: Partition) -> frozenset[str]:
        """The adapters' parameters, the norms of blocks where asked for, and the task's head."""
        inside = (info for info in partition.parameters.values() if info.part == "block")
        chosen = (info.name for info in inside if ".adapter." in info.name or (self.options.norms and _is_norm(info.name)))
        return frozenset(chosen) | task_head(partition, self.subject)

    def exported(self, partition: Partition) -> frozenset[str]:
        """What was trained; the rest is the base model's."""
        return self.tensors(partition)

    def save(self, model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Adapters and head by parameter name, and a config that says what they belong to."""
        from progscale.models.saving import save_tensors

        save_tensors(state, folder / WEIGHTS)
        config = {"format": FORMAT, "base_model_name_or_path": self.subject.base, **self.options.model_dump()}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def restore(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """Adds adapters, and gives them and the head the weights of a folder.

        Raises:
            ModelError: the folder's tensors are not those of this model.
        """
        from progscale.models.saving import fill_tensors

        prepared = self.prepare(model)
        fill_tensors(prepared, folder / WEIGHTS)
        return prepared

    def merge(self, model: torch.nn.Module, folder: Path) -> NoReturn:
        """Refused.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"{folder}: adapters have an activation between their two layers, so they cannot be merged into the weights of a "
            f"plain model; progscale.export.load_exported(folder) gives the model with its adapters"
        )


def _is_norm(name: str) -> bool:
    """Whether a parameter is a norm's, by the names that transformers gives its norms (LayerNorm, ln_1, attn_norm, …)."""
    module = name.rpartition(".")[0].rpartition(".")[2].lower()
    return "norm" in module or module.startswith("ln_")
