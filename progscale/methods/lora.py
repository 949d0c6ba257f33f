"""LoRA through PEFT: low-rank matrices beside linear layers of the blocks.

Source: Hu et al., LoRA (arXiv 2106.09685). What is saved is PEFT's own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from progscale.blocks import Part, block_modules, partition
from progscale.config import Section
from progscale.config.schema import Text
from progscale.errors import ModelError, nearest
from progscale.methods.base import Method, register, task_head

if TYPE_CHECKING:
    import torch

    from progscale.blocks import Partition

ALL_LINEAR = "all-linear"
TASK_TYPES = {
    "sequence_classification": "SEQ_CLS",
    "question_answering": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
}
# PiSSA takes its first matrices out of the weights that it leaves frozen; what they were is needed to export a plain LoRA.
FIRST_A, FIRST_B = "first_lora_A", "first_lora_B"
NAME = "default"
# What PEFT puts beside a layer.
PEFT_MODULES = ("base_layer", "lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector")


class LoraOptions(Section):
    """Options of `lora`."""

    rank: Annotated[int, Field(ge=1, le=65536)] = Field(default=8, description="rank of the matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=8.0, description="the update is scaled by alpha / rank (by alpha / √rank with rslora)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of the low-rank branch's input")
    targets: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] | None = Field(
        default=None,
        description="endings of the paths of the layers to change, inside the blocks, or all-linear; null: the family's query "
        "and value projections",
    )
    rslora: bool = Field(default=False, description="rank-stabilised scaling (arXiv 2312.03732)")
    dora: bool = Field(default=False, description="weight-decomposed LoRA (arXiv 2402.09353)")
    init: Annotated[str, Field(pattern=r"^(default|gaussian|orthogonal|pissa|pissa_niter_[1-9][0-9]{0,2})$")] = Field(
        default="default",
        description="first weights: default (B is 0), gaussian, orthogonal, pissa (arXiv 2404.02948) or pissa_niter_N",
    )


class LowRank(Method[LoraOptions]):
    """What `lora` and `qlora` share."""

    saves_whole = False

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model wrapped by PEFT.

        Raises:
            ModelError: a target is missing in the model, is no linear layer, or lies outside of the blocks.
        """
        from peft import get_peft_model

        targets = self._targets(model)
        # On the meta device there is nothing to decompose; names and shapes are the same.
        first = "default" if next(model.parameters()).is_meta else self.options.init
        wrapped: Any = get_peft_model(model, self.peft_config(model, targets, first))
        if first.startswith("pissa"):
            remember_first(wrapped)
        return wrapped

    def peft_config(self, model: torch.nn.Module, targets: list[str], first: str) -> Any:
        """PEFT's config for these options."""
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        layers = [module for path, module in model.named_modules() if any(path.endswith(target) for target in targets)]
        options = self.options
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets,
            modules_to_save=self._fresh_modules(model) or None,
            use_rslora=options.rslora,
            use_dora=options.dora,
            init_lora_weights=True if first == "default" else first,
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
        )

    def _targets(self, model: torch.nn.Module) -> list[str]:
        """Endings of module paths, each of which is a linear layer of a block wherever it matches."""
        blocks = block_modules(model, self.subject.family)
        prefixes = tuple(f"{path}." for paths in blocks.values() for path in paths)
        linear = {path for path, module in model.named_modules() if is_linear(module)}
        inside = {path[len(prefix) :] for path in linear for prefix in prefixes if path.startswith(prefix)}
        given = sorted(inside) if self.options.targets == ALL_LINEAR else self.options.targets
        targets = list(given or self.subject.family.projections)
        if not targets:
            raise ModelError(
                f"method '{self.name}': family '{self.subject.family.name}' does not say which layers to change; name them, e.g. "
                f"--set method.options.targets=all-linear (a block has {', '.join(sorted(inside))})"
            )
        for target in targets:
            matched = [path for path, _ in model.named_modules() if path == target or path.endswith(f".{target}")]
            if not matched:
                raise ModelError(
                    f"method.options.targets: '{target}' is no module of this {type(model).__name__}{nearest(target, inside)}; "
                    f"the linear layers of its blocks: {', '.join(sorted(inside))}"
                )
            outside = [path for path in matched if not path.startswith(prefixes)]
            if outside:
                raise ModelError(
                    f"method.options.targets: '{target}' is also '{outside[0]}', which lies outside of the blocks: embeddings "
                    f"stay frozen with {self.name}, and the head is trained whole; give more of the path "
                    f"({', '.join(sorted(inside))})"
                )
            other = [path for path in matched if path not in linear]
            if other:
                kind = type(model.get_submodule(other[0])).__name__
                raise ModelError(f"method.options.targets: '{other[0]}' is a {kind}; linear layers are allowed")
        return targets

    def _fresh_modules(self, model: torch.nn.Module) -> list[str]:
        """Paths of the modules outside of the base model that hold the task's head, which is trained whole."""
        parts = partition(model, self.subject.family)
        found: dict[str, None] = {}
        for name in task_head(parts, self.subject):
            components = name.split(".")
            # Of a model that is its own base, the module of the parameter itself: what is above it may hold the blocks.
            depth = 1 if parts.base else max(1, len(components) - 1)
            while parts.base.startswith(".".join(components[:depth]) + "."):
                depth += 1
            found[".".join(components[:depth])] = None
        for path in (*(path for path, _ in model.named_modules()), *PEFT_MODULES):
            taken = [head for head in found if path.endswith(head) and path not in found]
            if taken:
                raise ModelError(
                    f"method '{self.name}': the head of this {type(model).__name__} lies in '{taken[0]}', and PEFT, which "
                    f"looks at the end of names, would take '{path}' for it too; give the module another name"
                )
        return sorted(found)

    def tensors(self, partition: Partition) -> frozenset[str]:
        """The low-rank matrices in the blocks, and PEFT's copy of the task's head."""
        marks: dict[Part, str] = {"block": ".lora_", "head": f".modules_to_save.{NAME}."}
        return frozenset(name for part, mark in marks.items() for name in partition.names(part) if mark in name)

    def exported(self, partition: Partition) -> frozenset[str]:
        """What was trained; the rest is the base model's."""
        return self.tensors(partition)

    def save(self, model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        """PEFT's `adapter_model.safetensors` and `adapter_config.json`; PiSSA is turned into a plain LoRA of twice the rank."""
        import copy

        from peft import get_peft_model_state_dict

        from progscale.models.saving import save_tensors

        tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
        config = copy.deepcopy(model.peft_config[NAME])
        if self.options.init.startswith("pissa"):
            tensors = plain_lora(tensors, state)
            config.r *= 2
            config.lora_alpha *= 2**0.5 if config.use_rslora else 2
        config.init_lora_weights = True
        # PEFT takes it from the model, which does not know where the run found it.
        config.base_model_name_or_path = self.subject.base
        config.revision = self.subject.revision
        config.task_type = TASK_TYPES[self.subject.head]
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_tensors(tensors, folder / "adapter_model.safetensors")

    def restore(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """PEFT's own loading, onto the base model."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(folder))

    def merge(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """The low-rank updates added to the weights, and the trained head in place of the other."""
        from peft import PeftModel

        merged: Any = PeftModel.from_pretrained(model, str(folder))
        return merged.merge_and_unload(safe_merge=True)


@register("lora")
class Lora(LowRank):
    """Trains low-rank matrices beside the frozen projections of each block, and the task's head."""

    name = "lora"
    Options = LoraOptions


def is_linear(module: torch.nn.Module) -> bool:
    """Whether PEFT can put low-rank matrices beside a module (GPT-2's Conv1D is a linear layer too)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def remember_first(model: torch.nn.Module) -> None:
    """Keeps the first matrices as buffers of their layers, so that they are in every checkpoint."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.register_buffer(FIRST_A, module.lora_A[NAME].weight.detach().clone())
            module.register_buffer(FIRST_B, module.lora_B[NAME].weight.detach().clone())


def plain_lora(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices for the untouched base model: B·A - B₀·A₀ = [B | -B₀] · [A over A₀].

    Args:
        tensors: of the adapter, as PEFT names them.
        state: with the buffers of `remember_first`.
    """
    import torch

    plain = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(".lora_A.weight"):
            plain[name] = torch.cat([value, state[name.replace("lora_A.weight", FIRST_A)]], dim=0)
        elif name.endswith(".lora_B.weight"):
            plain[name] = torch.cat([value, -state[name.replace("lora_B.weight", FIRST_B)]], dim=1)
    return plain
