"""A model cut into embeddings, ordered blocks and head: every parameter in exactly one part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, product
from typing import TYPE_CHECKING, Literal

from progscale.errors import ModelError, nearest

if TYPE_CHECKING:
    import torch

    from progscale.models.family import Family

Part = Literal["embeddings", "block", "head"]

_Rule = tuple[Part, str, re.Pattern[str]]

# PEFT keeps the model it wraps under this path.
_WRAPPERS = ("", "base_model.model.")

# Attribute by which a parameter without weights says that it will be quantised.
FOUR_BIT = "progscale_four_bit"


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter tensor and where it belongs.

    Attributes:
        name: as in `model.named_parameters()` (a tied tensor appears once, under its first name).
        shape: of the whole tensor, also under ZeRO-3 and on the meta device.
        part: embeddings, block or head.
        stack: the stack of a block parameter, else None.
        block: 0-based index in the stack, else None.
        tied: further names of the same tensor.
        unused: no loss depends on it, so that it has no gradient and is never trained.
        replaceable: of the head, and not in every checkpoint: outside of the base model, or optional in its family.
        four_bit: of a model without weights: it will be quantised to four bits an element.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    stack: str | None = None
    block: int | None = None
    tied: tuple[str, ...] = ()
    unused: bool = False
    replaceable: bool = False
    four_bit: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Partition:
    """All parameters of a model, in the order of `named_parameters`, each in exactly one part.

    Attributes:
        parameters: by name.
        num_blocks: blocks of each stack.
        base: path of the base model with its final dot ("bert."); "" when the model is its own base.
    """

    parameters: Mapping[str, ParameterInfo]
    num_blocks: Mapping[str, int]
    base: str = ""

    def names(self, part: Part | None = None) -> tuple[str, ...]:
        """Names of a part's parameters in the order of the model; of all parameters without `part`."""
        return tuple(info.name for info in self.parameters.values() if part is None or info.part == part)

    def block_names(self, stack: str, block: int) -> tuple[str, ...]:
        """Names of the parameters of block `block` (0-based) of `stack`; empty for a block without parameters.

        Raises:
            KeyError: no such stack.
            IndexError: no such block.
        """
        if not 0 <= block < self.num_blocks[stack]:
            raise IndexError(f"block {block} of stack '{stack}', which has {self.num_blocks[stack]}")
        return self._by_block.get((stack, block), ())

    def numel(self, part: Part | None = None) -> int:
        """Elements of a part's tensors, each tied tensor counted once; of all parameters without `part`."""
        return self.count(self.names(part))

    def count(self, names: Iterable[str]) -> int:
        """Elements of the named tensors."""
        return sum(self.parameters[name].numel for name in names)

    @cached_property
    def first_block(self) -> dict[str, int]:
        """The number of each stack's lowest block, counted from 0 through all stacks."""
        return dict(zip(self.num_blocks, accumulate([0, *self.num_blocks.values()]), strict=False))

    @property
    def total_blocks(self) -> int:
        """Of all stacks."""
        return sum(self.num_blocks.values())

    @cached_property
    def _by_block(self) -> dict[tuple[str, int], tuple[str, ...]]:
        blocks: dict[tuple[str, int], tuple[str, ...]] = {}
        for info in self.parameters.values():
            if info.stack is not None and info.block is not None:
                blocks[info.stack, info.block] = (*blocks.get((info.stack, info.block), ()), info.name)
        return blocks


@dataclass(frozen=True)
class _Place:
    """Where one parameter name lies."""

    part: Part
    stack: str | None = None
    block: int | None = None
    replaceable: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"block {self.block} of '{self.stack}'" if self.part == "block" else f"the {self.part}"


def partition(model: torch.nn.Module, family: Family) -> Partition:
    """Cuts a model into embeddings, blocks and head by the rules of its family.

    Works on real models, on the meta device, on ZeRO-3 partitioned parameters (the true shape is `ds_shape`) and
    on a model wrapped by PEFT. A tied tensor counts once: it belongs to the embeddings if one of its names does.

    Raises:
        ModelError: a path of the family is not in the model, a parameter of the base model is claimed by no part
            or by two, or two blocks share a tensor.
    """
    family = family.resolve(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    root = _base_path(modules, family)
    stacks = {stack: _stack_children(modules, family, stack, root + path) for stack, path in family.stacks.items()}
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.nn.Parameter] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor

    rules: list[_Rule] = [("embeddings", pattern, _compile(pattern)) for pattern in family.embeddings]
    idle: list[_Rule] = [("head", pattern, _compile(pattern)) for pattern in family.unused]
    rules += [("head", pattern, _compile(pattern)) for pattern in family.head] + idle
    used: set[str] = set()
    parameters = {}
    for key, (first, *tied) in names.items():
        places = [_place(name, root, rules, stacks, family, used) for name in (first, *tied)]
        place = _one_place((first, *tied), places, family)
        unused = first.startswith(root) and any(regex.match(first[len(root) :]) for _, _, regex in idle)
        shape, four_bit = true_shape(tensors[key]), getattr(tensors[key], FOUR_BIT, False)
        parameters[first] = ParameterInfo(
            first, shape, place.part, place.stack, place.block, tuple(tied), unused, place.replaceable, four_bit
        )
    for part, pattern, _ in rules:
        if pattern not in used and not pattern.endswith("?"):
            raise ModelError(
                f"model family '{family.name}': {part} pattern '{pattern}' matches no parameter below "
                f"'{root.rstrip('.') or type(model).__name__}' of this {type(model).__name__}; "
                f"write '{pattern}?' if it may be absent"
            )
    return Partition(parameters, {stack: len(children) for stack, children in stacks.items()}, root)


def block_modules(model: torch.nn.Module, family: Family) -> dict[str, dict[str, torch.nn.Module]]:
    """For each stack the blocks by their path in the model, low to high.

    Raises:
        ModelError: a stack of the family is not in the model.
    """
    family = family.resolve(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    root = _base_path(modules, family)
    found = {}
    for stack, path in family.stacks.items():
        prefixes = _stack_children(modules, family, stack, root + path)
        found[stack] = {prefix.removesuffix("."): modules[prefix.removesuffix(".")] for prefix in prefixes}
    return found


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, where PEFT has wrapped it."""
    modules = dict(model.named_modules())
    return next(modules[path.rstrip(".")] for path in reversed(_WRAPPERS) if path.rstrip(".") in modules)


def _base_path(modules: Mapping[str, torch.nn.Module], family: Family) -> str:
    """The base model's path with its final dot ("bert.", "" for a model that is its own base)."""
    for wrapper, base in product(_WRAPPERS, family.bases):
        root = f"{wrapper}{base}." if base else wrapper
        if all(root + path in modules for path in family.stacks.values()):
            return root
    wanted = [".".join(filter(None, (family.bases[0], path))) for path in family.stacks.values()]
    missing = next(path for path in wanted if path not in modules)
    parent = missing
    while parent and parent not in modules:
        parent = parent.rpartition(".")[0]
    # Say what is there instead of the first missing component.
    depth = parent.count(".") + 1 if parent else 0
    beside = sorted({".".join(name.split(".")[: depth + 1]) for name in modules if name.startswith(parent) and name})
    beside = [name for name in beside if name != parent]
    raise ModelError(
        f"model family '{family.name}': '{missing}' is not in this {type(modules['']).__name__}; looked for its "
        f"blocks there and found {', '.join(beside[:12]) or 'no submodules'}{nearest(missing, modules)}"
    )


def _stack_children(modules: Mapping[str, torch.nn.Module], family: Family, stack: str, path: str) -> dict[str, int]:
    """Path prefix of each block (with the final dot) → its index."""
    children = [name for name, child in modules[path].named_children() if child is not None]
    every = [name for name in modules if name.startswith(f"{path}.") and "." not in name[len(path) + 1 :]]
    if len(every) > len(children):
        raise ModelError(
            f"model family '{family.name}': stack '{stack}' ('{path}') holds one module several times; with shared "
            f"blocks, freezing one freezes all of them, so progressive stages mean nothing"
        )
    if not children:
        raise ModelError(
            f"model family '{family.name}': stack '{stack}' ('{path}') is a {type(modules[path]).__name__} without "
            f"blocks; name the path of a ModuleList with at least one"
        )
    return {f"{path}.{child}.": index for index, child in enumerate(children)}


def _place(
    name: str,
    root: str,
    rules: list[_Rule],
    stacks: Mapping[str, Mapping[str, int]],
    family: Family,
    used: set[str],
) -> _Place:
    if not name.startswith(root):
        return _Place("head", replaceable=True)
    below = name[len(root) :]
    found: list[tuple[_Place, str]] = []
    claims = [rule for rule in rules if rule[2].match(below)]
    for part, pattern, _ in claims:
        used.add(pattern)
        place = _Place(part, replaceable=part == "head" and pattern.endswith("?"))
        found.append((place, f"{part} pattern '{pattern}'"))
    for stack, children in stacks.items():
        for prefix, index in children.items():
            if name.startswith(prefix) and not any(_reaches_into(prefix[len(root) :], rule) for rule in claims):
                found.append((_Place("block", stack, index), f"stack '{stack}'"))
    if not found:
        raise ModelError(
            f"model family '{family.name}': parameter '{name}' belongs to no part; embeddings: "
            f"{', '.join(family.embeddings)}; blocks: {', '.join(family.stacks.values())}; head: "
            f"{', '.join(family.head) or '(none)'}. Add a pattern that covers it to the family"
        )
    if len({place for place, _ in found}) > 1:
        raise ModelError(
            f"model family '{family.name}': parameter '{name}' is claimed twice, by "
            f"{' and by '.join(rule for _, rule in found)}; make the patterns of the family disjoint"
        )
    return found[0][0]


def _reaches_into(block: str, rule: _Rule) -> bool:
    """Whether a rule gives something inside a block ("encoder.block.0.") to the embeddings, and not the block as a whole."""
    part, pattern, _ = rule
    return part == "embeddings" and pattern.count(".") >= block.count(".")


def _one_place(names: tuple[str, ...], places: list[_Place], family: Family) -> _Place:
    """The part of a tensor that may have several names: embeddings before all others."""
    distinct = list(dict.fromkeys(places))
    if len(distinct) == 1:
        return distinct[0]
    for place in distinct:
        if place.part == "embeddings":
            return place
    raise ModelError(
        f"model family '{family.name}': '{names[0]}' and '{names[1]}' are one tensor but lie in "
        f"{distinct[0]} and {distinct[1]}; it cannot be frozen in one and trained in the other"
    )


def _compile(pattern: str) -> re.Pattern[str]:
    """A path pattern as a regular expression that matches the path itself and everything below it."""
    path = pattern.removesuffix("?")
    components = [re.escape(part).replace(r"\*", r"[^.]+") for part in path.split(".")]
    return re.compile(r"\.".join(components) + r"(\.|$)")


def true_shape(tensor: torch.nn.Parameter) -> tuple[int, ...]:
    """Of the whole tensor."""
    # Under ZeRO-3 a parameter that is not gathered has shape (0,); DeepSpeed keeps the whole tensor's here.
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
