"""The frozen blocks at the bottom of a model: run in eval mode, cut off after, or skipped because their output is known.

A block is skipped from the inside: its module is still called, so that whatever hangs on the call (ZeRO-3's hooks, the mask
and the positions that the model makes for all blocks) stays as it is, but what it computes is left out. No model's code is
copied, and none is told.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from progscale.blocks import Partition, block_modules
from progscale.engine.base import Engine
from progscale.models.family import Family

Forward = Callable[..., Any]


class EndOfPrefixError(Exception):
    """Ends a forward pass that is to compute the prefix alone."""


@dataclass
class Passage:
    """One forward pass through the prefix.

    Attributes:
        start: blocks from the bottom that are skipped.
        hidden: what the last of them would have given, shape `(rows, length, width)`; None where none is skipped.
        stop: end the forward pass where the prefix ends.
        then: is given the output as soon as it is there.
        output: what the prefix gave, once it has run; of the shape that the model has there, which may be longer.
        seconds: that it took; on a GPU with a wait for it, where `timed`.
        timed: wait for the GPU before and after.
    """

    start: int = 0
    hidden: torch.Tensor | None = None
    stop: bool = False
    timed: bool = False
    then: Callable[[torch.Tensor], None] = lambda output: None
    output: torch.Tensor | None = None
    seconds: float = 0.0
    begun: float = 0.0


class Prefix:
    """The lowest blocks of a model's first stack, while they and all below them are frozen.

    Args:
        engine: that runs the model; the blocks of the prefix must not be compiled.
        family: of the model.
    """

    def __init__(self, engine: Engine, family: Family) -> None:
        self._engine = engine
        self._hand_on = family.hand_on
        stacks = block_modules(engine.module, family)
        every = {id(child) for blocks in stacks.values() for block in blocks.values() for child in block.modules()}
        self._blocks = list(next(iter(stacks.values())).values())
        self._around = [child for child in engine.module.modules() if id(child) not in every]
        self._inside: list[torch.nn.Module] = []
        # Beside the hidden states, what each block gives: None for a bare tensor, else the rest of a tuple.
        self._rest: dict[int, tuple[Any, ...] | None] = {}
        self._passage: Passage | None = None
        self._training = False
        self.depth = 0
        self.opaque: str | None = None

    def freeze(self, depth: int) -> None:
        """Makes the lowest `depth` blocks the prefix; 0 for none."""
        self.release()
        self.depth = depth
        self._inside = [child for block in self._blocks[:depth] for child in block.modules()]
        for index, block in enumerate(self._blocks[:depth]):
            block.forward = functools.partial(self._run, index, block, block.forward)

    def release(self) -> None:
        """Leaves every block as it was."""
        for block in self._blocks[: self.depth]:
            del block.forward
        # Blocks may be trained again, with dropout.
        self._set_mode(self._inside, self._engine.module.training)
        self.depth, self._inside = 0, []

    def understands(self, depth: int) -> bool:
        """Whether it is known what each of the lowest `depth` blocks gives, so that they can be skipped."""
        return self.opaque is None and all(index in self._rest for index in range(depth))

    @contextlib.contextmanager
    def running(self, start: int = 0, hidden: torch.Tensor | None = None, *, timed: bool = False) -> Iterator[Passage]:
        """Around a forward pass of the engine: dropout is off up to the end of the prefix, whose output is kept.

        Args:
            start: blocks from the bottom to skip; `understands` must say yes.
            hidden: what the last of them would give, shape `(rows, length, width)`; shorter than the model's own where that pads.
            timed: measure `seconds`, on a GPU by waiting for it.
        """
        passage = Passage(start, hidden, timed=timed)
        if self.depth == 0:
            yield passage
            return
        with self._entered(passage):
            yield passage

    def compute(self, inputs: Mapping[str, torch.Tensor], start: int = 0, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """The output of the prefix alone; the forward pass is cut off after it. Arguments as for `running`."""
        passage = Passage(start, hidden, stop=True)
        with self._entered(passage):
            self._engine.run_until(inputs, EndOfPrefixError)
        assert passage.output is not None, "the forward pass never came to the end of the prefix"
        return passage.output

    @contextlib.contextmanager
    def _entered(self, passage: Passage) -> Iterator[None]:
        assert self._passage is None, "one forward pass at a time"
        assert passage.start == 0 or self.understands(passage.start)
        self._training = self._engine.module.training
        self._passage = passage
        self._set_mode(self._inside, False)
        self._set_mode(self._around, False)
        if passage.timed:
            self._engine.synchronize()
        passage.begun = time.perf_counter()
        try:
            yield
        finally:
            self._passage = None
            self._set_mode(self._around, self._training)

    @staticmethod
    def _set_mode(modules: Iterable[torch.nn.Module], training: bool) -> None:
        for module in modules:
            # Past `Module.__setattr__`, which looks through parameters, buffers and children each time.
            module.__dict__["training"] = training

    def _run(self, index: int, block: torch.nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """In place of a block's `forward`."""
        passage = self._passage
        if passage is None or passage.output is not None:
            return forward(*args, **kwargs)
        if index < passage.start:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == passage.start - 1:
                assert passage.hidden is not None
                hidden = widened(passage.hidden, hidden)
            output = self._like(index, block, hidden, args, kwargs)
        else:
            output = forward(*args, **kwargs)
            self._learn(index, output)
        if index == self.depth - 1:
            self._end(passage, output[0] if isinstance(output, tuple) else output)
        return output

    def _end(self, passage: Passage, output: torch.Tensor) -> None:
        if passage.timed:
            self._engine.synchronize()
        passage.seconds = time.perf_counter() - passage.begun
        if torch.is_grad_enabled() and output.requires_grad:
            # A module of somebody's own model that no part of it names, say.
            self.opaque = "something below them is still trained"
        passage.output = output.detach()
        passage.then(passage.output)
        self._set_mode(self._around, self._training)
        if passage.stop:
            raise EndOfPrefixError

    def _learn(self, index: int, output: Any) -> None:
        """Notes what a block gives beside its hidden states."""
        hidden, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            self.opaque = "its blocks do not give hidden states of shape (rows, length, width)"
        elif self._hand_on is None and any(value is not None for value in rest or ()):
            self.opaque = "its blocks hand on more than hidden states"
        self._rest[index] = rest

    def _like(
        self, index: int, block: torch.nn.Module, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """`hidden` in the form in which the block gives it."""
        rest = self._rest[index]
        if rest is None:
            return hidden
        return (hidden, *(rest if self._hand_on is None else self._hand_on(block, hidden, *args[1:], **kwargs)))


def widened(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Hidden states with zeros in the places that a model has padded by itself, shape `(rows, length of like, width)`."""
    if hidden.shape[1] == like.shape[1]:
        return hidden
    wide = hidden.new_zeros(hidden.shape[0], like.shape[1], hidden.shape[2])
    wide[:, : hidden.shape[1]] = hidden
    return wide


def frozen_names(partition: Partition, depth: int) -> tuple[str, ...]:
    """Parameters that decide what the lowest `depth` blocks of the first stack give: theirs and the embeddings'."""
    first = next(iter(partition.num_blocks))
    return tuple(
        info.name
        for info in partition.parameters.values()
        if info.part == "embeddings" or (info.stack == first and info.block is not None and info.block < depth)
    )
