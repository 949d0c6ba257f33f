"""BitFit: the bias terms of the blocks, the pooler's bias and the task's head.

Source: Ben Zaken et al., BitFit (arXiv 2106.10199). Updated parameters are counted without the embeddings' own bias, as in
Progtuning (arXiv 2506.21119), table 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from progscale.blocks import partition
from progscale.config import Section
from progscale.errors import ModelError
from progscale.methods.base import Method, register, task_head

if TYPE_CHECKING:
    import torch

    from progscale.blocks import Partition


class BitFitOptions(Section):
    """Options of `bitfit`."""

    embeddings_bias: bool = Field(
        default=False,
        description="train the bias of the embeddings' norm too, where schedule.embeddings trains embeddings; the backward pass "
        "then runs through every block",
    )


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias term, by its name ("bias", and "in_proj_bias" of torch's own attention)."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


@register("bitfit")
class BitFit(Method[BitFitOptions]):
    """Trains bias terms; the model is left as it is, and exported whole."""

    name = "bitfit"
    Options = BitFitOptions

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Returns the model unchanged.

        Raises:
            ModelError: a block has no bias term.
        """
        parts = partition(model, self.subject.family)
        for stack, count in parts.num_blocks.items():
            without = [block for block in range(count) if not any(map(is_bias, parts.block_names(stack, block)))]
            if without:
                raise ModelError(
                    f"method 'bitfit' trains bias terms, and block {without[0]} of this {self.subject.family.name} model "
                    f"('{stack}', {len(without)} of {count} alike) has none; take lora or adapter"
                )
        return model

    def tensors(self, partition: Partition) -> frozenset[str]:
        """The biases of blocks and head, and the task's head."""
        biased = ("block", "head", "embeddings") if self.options.embeddings_bias else ("block", "head")
        biases = {info.name for info in partition.parameters.values() if info.part in biased and is_bias(info.name)}
        if not self.subject.fresh_head:
            return frozenset(biases)
        return frozenset(biases) | task_head(partition, self.subject)
