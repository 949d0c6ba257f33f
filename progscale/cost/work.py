"""Floating-point operations of a training step: forward pass, gradient of activations, gradient of weights.

A product of a token's activations with a matrix of n elements takes 2 n operations; the gradient of the activations takes as
many, and so does that of the matrix. Attention between the tokens of a row (scores, and the sum they weight) takes
4 · length · width a token and block, its gradient twice as many. What is left (norms, activations, dropout, softmax) is not
counted, as usual.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from progscale.blocks import ParameterInfo, Partition


@dataclass(frozen=True)
class Flops:
    """Floating-point operations."""

    forward: int
    activation_gradient: int
    weight_gradient: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.forward + self.activation_gradient + self.weight_gradient

    def times(self, count: int) -> Flops:
        """Of so many."""
        return Flops(self.forward * count, self.activation_gradient * count, self.weight_gradient * count)

    def to_json(self) -> dict[str, int]:
        """As plain data."""
        return {
            "forward": self.forward,
            "activation_gradient": self.activation_gradient,
            "weight_gradient": self.weight_gradient,
            "total": self.total,
        }


@dataclass(frozen=True)
class Work:
    """What a stage computes, whatever the batch.

    Attributes:
        forward: elements of the matrices that every token passes.
        activation: of those through which a gradient goes back to an input.
        weight: of those that are trained.
        forward_row, activation_row, weight_row: the same for what one token of each row passes (pooler, classifier).
        blocks: in which tokens attend to each other.
        blocks_back: of them with a backward pass.
        recomputed: matrix elements that run forward once more (gradient checkpointing).
        recomputed_blocks: blocks that do.
    """

    forward: int
    activation: int
    weight: int
    forward_row: int
    activation_row: int
    weight_row: int
    blocks: int
    blocks_back: int
    recomputed: int = 0
    recomputed_blocks: int = 0

    def flops(self, length: int, width: int) -> Flops:
        """Of one row of `length` tokens in a model whose attention is `width` wide."""
        attention = 4 * length * length * width
        return Flops(
            2 * length * (self.forward + self.recomputed)
            + 2 * self.forward_row
            + attention * (self.blocks + self.recomputed_blocks),
            2 * length * self.activation + 2 * self.activation_row + 2 * attention * self.blocks_back,
            2 * length * self.weight + 2 * self.weight_row,
        )


def work_of(
    parts: Partition, live: Collection[str], lowest: int, *, head_by_row: bool, output: int = 0, checkpointing: bool = False
) -> Work:
    """What a stage computes.

    Args:
        parts: of the model as the method prepared it.
        live: names of the trained parameters.
        lowest: the block, counted through all stacks, down to which the gradient has to run; 0 with the embeddings.
        head_by_row: the head sees one token of each row (a classifier), else every token.
        output: elements of an output matrix that is tied to the embeddings.
        checkpointing: blocks with a backward pass run forward once more.
    """
    first_of, blocks = parts.first_block, parts.total_blocks

    def is_above(info: ParameterInfo) -> bool:
        return info.stack is not None and info.block is not None and first_of[info.stack] + info.block >= lowest

    matrices = [info for info in parts.parameters.values() if len(info.shape) > 1 and not info.unused]
    inside = [info for info in matrices if info.part == "block"]
    above = elements(filter(is_above, inside))
    head = [info for info in matrices if info.part == "head"]
    of_head, trained_head = elements(head), trained(head, live)
    by_token, by_row = (0, 1) if head_by_row else (1, 0)
    back = blocks - min(lowest, blocks)
    return Work(
        forward=elements(inside) + by_token * of_head + output,
        activation=above + by_token * of_head + output,
        weight=trained(inside, live) + by_token * trained_head,
        forward_row=by_row * of_head,
        activation_row=by_row * of_head,
        weight_row=by_row * trained_head,
        blocks=blocks,
        blocks_back=back,
        recomputed=above if checkpointing else 0,
        recomputed_blocks=back if checkpointing else 0,
    )


def elements(infos: Iterable[ParameterInfo]) -> int:
    """Of all these parameters."""
    return sum(info.numel for info in infos)


def trained(infos: Iterable[ParameterInfo], live: Collection[str]) -> int:
    """Of those that are trained."""
    return elements(info for info in infos if info.name in live)
