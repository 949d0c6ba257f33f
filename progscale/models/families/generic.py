"""`model.family: generic`: a model of any type that transformers builds, whose blocks are one ModuleList of like modules.

The blocks are the outermost ModuleList below the base model whose modules are of one class with parameters of the same names
and shapes, as many as the config's `num_hidden_layers` where it says so. In the base model, what is registered before the
list on its path is embeddings, what is registered after it is head. Wherever it stands, an `nn.Embedding` is a table and
belongs to the embeddings, and what is called `pooler` or `final_…` belongs to the head. It never has a family's care: a
module of another name that is registered after the blocks and used before them is trained always. Which projections and
sublayers a method is to change cannot be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from progscale.blocks import true_shape, unwrapped
from progscale.errors import ModelError
from progscale.models.family import Family, Places, register_family
from progscale.models.lookup import how_to_register

if TYPE_CHECKING:
    from torch import nn


# Modules that some models (OPT, NomicBERT) register before the blocks and use behind them.
_HEAD = ("pooler", "final_")


def infer(model: nn.Module) -> Places:
    """Finds the blocks of a model as transformers builds it, and what stands before and after them.

    Args:
        model: with or without memory, partitioned by ZeRO-3, wrapped by PEFT.

    Raises:
        ModelError: there is no such list of blocks, more than one, or another number of them than of layers.
    """
    model = unwrapped(model)
    base_name = str(getattr(model, "base_model_prefix", "") or "")
    base: nn.Module = getattr(model, base_name) if base_name and hasattr(model, base_name) else model
    lists = dict(_lists(base))
    candidates = {path: blocks for path, blocks in lists.items() if _alike(blocks)}
    if len(candidates) != 1:
        raise ModelError(_ambiguous(model, candidates, lists))
    ((path, blocks),) = candidates.items()
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", len(blocks))
    if layers != len(blocks):
        raise ModelError(
            f"model family 'generic': '{path}' of this {type(model).__name__} is a list of {len(blocks)}, but its config "
            f"has num_hidden_layers {layers}; blocks that are applied several times cannot be frozen one by one.\n"
            f"{how_to_register(model)}"
        )
    before, after = _around(base, path, base_is_model=base is model)
    return Places(base_name if base is not model else "", tuple(before), {"blocks": path}, tuple(after))


def _lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Every ModuleList with parameters by its path; of those inside a list of blocks only where the blocks are unlike."""
    from torch import nn

    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
            yield below, child
            if _alike(child):
                continue
        yield from _lists(child, below)


def _alike(blocks: nn.ModuleList) -> bool:
    """Whether all are of one class, each a module of its own, and parameters of one name have one shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in blocks:
        for name, parameter in block.named_parameters():
            if shapes.setdefault(name, true_shape(parameter)) != true_shape(parameter):
                return False
    return len({type(block) for block in blocks}) == 1 and len({id(block) for block in blocks}) == len(blocks)


def _around(base: nn.Module, path: str, *, base_is_model: bool) -> tuple[list[str], list[str]]:
    """Paths of what has parameters beside the blocks: embeddings, head."""
    from torch import nn

    embeddings: list[str] = []
    head: list[str] = []
    module, above = base, ""
    for step in path.split("."):
        # A parameter of the module itself is there before its submodules.
        embeddings += [above + name for name, _ in module.named_parameters(recurse=False)]
        passed = False
        for name, child in module.named_children():
            if name == step:
                passed = True
                continue
            behind = passed or name.startswith(_HEAD)
            for key, owner in child.named_modules(prefix=above + name):
                own = [f"{key}.{parameter}" for parameter, _ in owner.named_parameters(recurse=False)]
                whole = len(own) == len(list(owner.parameters()))
                part = head if behind and not isinstance(owner, nn.Embedding) else embeddings
                # A checkpoint of a model with another head often has no pooler; and beside the blocks of a model that is its
                # own base stands the task's head.
                optional = "?" if part is head and (base_is_model or name.startswith("pooler")) else ""
                part += [one + optional for one in ([key] if own and whole else own)]
        module, above = module.get_submodule(step), f"{above}{step}."
    return embeddings, head


def _ambiguous(model: nn.Module, candidates: dict[str, nn.ModuleList], lists: dict[str, nn.ModuleList]) -> str:
    """What was found instead of one list of blocks."""
    own = type(model).__name__
    if candidates:
        found = f"{len(candidates)} ModuleLists of this {own} hold like modules: {_described(candidates)}"
    elif lists:
        found = f"no ModuleList of this {own} holds like modules: {_described(lists)}"
    else:
        found = f"this {own} has no ModuleList below its base model"
    return f"model family 'generic': {found}; it takes models with exactly one.\n{how_to_register(model)}"


def _described(lists: dict[str, nn.ModuleList]) -> str:
    """The first of them by path, length and classes."""
    first = [
        f"{path} ({len(blocks)} x {', '.join(sorted({type(block).__name__ for block in blocks}))})"
        for path, blocks in list(lists.items())[:6]
    ]
    return ", ".join(first) + (", …" if len(lists) > 6 else "")


register_family(Family(name="generic", model_types=(), base="", embeddings=(), stacks={}, infer=infer))
