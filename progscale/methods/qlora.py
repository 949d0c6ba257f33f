"""QLoRA: LoRA beside blocks whose linear layers are kept in four bits, by bitsandbytes; on the CPU too.

Source: Dettmers et al., QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from progscale.blocks import FOUR_BIT, block_modules
from progscale.config import Config
from progscale.errors import Fault, ModelError
from progscale.methods.base import register
from progscale.methods.lora import LoraOptions, LowRank, is_linear

if TYPE_CHECKING:
    import torch

# Modules that PEFT has added.
_PEFTS = re.compile(r"\.(modules_to_save|lora_\w+)\.")
QUANTISATION = "quantization_config.json"


class QLoraOptions(LoraOptions):
    """Options of `qlora`: those of `lora`, and how the frozen layers are kept."""

    quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="the four-bit data type")
    double_quant: bool = Field(default=True, description="quantise the blocks' scales too (0.4 bits a parameter less)")


@register("qlora")
class QLora(LowRank):
    """LoRA over blocks in four bits; embeddings, norms and head keep their precision."""

    name = "qlora"
    Options = QLoraOptions
    options: QLoraOptions

    @classmethod
    def refusals(cls, options: Any, config: Config) -> list[Fault]:
        """ZeRO-3, and PiSSA, whose rest would be quantised."""
        faults = []
        zero = (config.engine.deepspeed or {}).get("zero_optimization", {})
        if zero.get("stage") == 3:
            faults.append(
                Fault(
                    "method.name",
                    "'qlora' and ZeRO-3 do not go together: a weight is quantised whole, and ZeRO-3 keeps a part of it on each "
                    "rank; take ZeRO-2 (the frozen blocks need half a byte a parameter), or 'lora' with ZeRO-3",
                )
            )
        if options.init.startswith("pissa"):
            faults.append(
                Fault(
                    "method.options.init",
                    f"'{options.init}' changes the frozen weights before they are quantised, so what is trained would fit no "
                    f"quantised base model; take 'default', 'gaussian' or 'orthogonal', or method 'lora'",
                )
            )
        return faults

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Quantises the blocks' linear layers, and wraps the model by PEFT. A model on the meta device keeps its plain layers.

        Raises:
            ModelError: a block has linear layers that bitsandbytes cannot hold.
        """
        paths = self._paths(model)
        if not next(model.parameters()).is_meta:
            self._quantise(model, paths)
        else:
            for path in paths:
                setattr(model.get_submodule(path).weight, FOUR_BIT, True)
        return super().prepare(model)

    def _quantise(self, model: torch.nn.Module, paths: list[str]) -> None:
        import torch

        from progscale.layers import quantise

        compute = getattr(torch, self._compute_dtype())
        quantise(model, paths, quant_type=self.options.quant_type, double=self.options.double_quant, compute=compute)

    def _compute_dtype(self) -> str:
        precision = self.subject.precision
        return "bfloat16" if precision.startswith("bf16") else "float16" if precision == "fp16" else "float32"

    def _paths(self, model: torch.nn.Module) -> list[str]:
        import torch

        # T5 casts what goes into such a layer to the dtype of its weights, which would be that of the codes.
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        paths = []
        for blocks in block_modules(model, self.subject.family).values():
            for path, block in blocks.items():
                for name, module in block.named_modules():
                    if is_linear(module) and not isinstance(module, torch.nn.Linear):
                        raise ModelError(
                            f"method 'qlora': '{path}.{name}' is a {type(module).__name__}, which is not "
                            f"quantised here; take 'lora'"
                        )
                    if isinstance(module, torch.nn.Linear) and not kept & set(name.split(".")):
                        paths.append(f"{path}.{name}")
        return paths

    def save(self, model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        """As LoRA, and how the base model is to be loaded beside it: `BitsAndBytesConfig(**json)` of transformers."""
        import torch
        from bitsandbytes.nn import Linear4bit

        super().save(model, state, folder)
        plain = [
            path.removeprefix("base_model.model.").removesuffix(".original_module").removesuffix(".base_layer")
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not isinstance(module, Linear4bit) and not _PEFTS.search(path)
        ]
        config = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.options.quant_type,
            "bnb_4bit_use_double_quant": self.options.double_quant,
            "bnb_4bit_compute_dtype": self._compute_dtype(),
            # What transformers would quantise and was not: above all linear layers outside of the blocks.
            "llm_int8_skip_modules": sorted(plain),
        }
        (folder / QUANTISATION).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def restore(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """PEFT's own loading, onto the quantised base model."""
        self._quantise(model, self._paths(model))
        return super().restore(model, folder)

    def merge(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """The updates added to the values that the quantised layers compute with: what was trained, in full precision."""
        from progscale.layers import dequantise

        self._quantise(model, self._paths(model))
        dequantise(model)
        return super().merge(model, folder)
