"""How the frozen blocks at the bottom are run: as the others, in eval mode, or (in `cache`) from what they gave before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from progscale.data import GlobalBatch, MicroBatch
from progscale.prefix import Prefix


@dataclass(frozen=True)
class Repeats:
    """How often rows are run through the prefix again.

    Attributes:
        training: passes over the training rows after the one at work; a fraction where the last one is cut short.
        evaluation: evaluations after the next one.
    """

    training: float = 0.0
    evaluation: int = 0

    @classmethod
    def after(cls, step: int, total_steps: int, steps_per_epoch: int, evaluation: int = 0) -> Repeats:
        """When `step` of a run's `total_steps` optimizer steps are done; the end of an epoch still belongs to it."""
        end_of_epoch = (step // steps_per_epoch + 1) * steps_per_epoch
        return cls(max(0, total_steps - end_of_epoch) / steps_per_epoch, evaluation)


class Feed:
    """The frozen blocks are run like all others: dropout is on in them (the paper's way).

    Attributes:
        sign: called now and then while something takes long.
    """

    sign: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self._skipped: list[tuple[int, int]] = []

    def take_skipped(self) -> list[tuple[int, int]]:
        """What training micro-batches were spared since this was asked last: (tokens of a row, Σ over rows of blocks not run)."""
        taken, self._skipped = self._skipped, []
        return taken

    def begin_stage(self, stage: int, depth: int, repeats: Repeats) -> None:
        """A stage begins, whose weights are in place.

        Args:
            stage: 1-based.
            depth: blocks from the bottom of the first stack that are frozen with all below them, from now to the end.
            repeats: at its first step.
        """

    def at(self, repeats: Repeats) -> None:
        """Before each step and each evaluation."""

    def expect(self, batch: GlobalBatch) -> None:
        """Is told of the batch that comes after the one at hand."""

    @contextlib.contextmanager
    def around(self, micro: MicroBatch, split: str = "train") -> Iterator[None]:
        """Around forward and backward of a micro-batch. A collective in what it does, for one micro-batch of each rank.

        Args:
            micro: of this rank.
            split: to which its rows belong.
        """
        yield

    def counts(self) -> Mapping[str, int]:
        """Training rows of this rank in this stage by what was done for them; empty where nothing is kept."""
        return {}

    def restore(self, counts: Mapping[str, int]) -> None:
        """Goes on counting from what `counts` gave before the run was stopped."""

    @property
    def bytes(self) -> int:
        """Reserved on this node."""
        return 0

    def close(self, *, finished: bool) -> None:
        """Lets go of the model and of all memory.

        Args:
            finished: nobody will go on from here: files are removed.
        """


class EvalFeed(Feed):
    """The frozen blocks at the bottom run in eval mode: without dropout, they give the same for a row each time."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.prefix = prefix

    def begin_stage(self, stage: int, depth: int, repeats: Repeats) -> None:
        """The blocks below `depth` give the same from now on."""
        self.prefix.freeze(depth)

    @contextlib.contextmanager
    def around(self, micro: MicroBatch, split: str = "train") -> Iterator[None]:
        """Dropout is off up to the end of the prefix."""
        with self.prefix.running():
            yield

    def close(self, *, finished: bool) -> None:
        """The model is as it was."""
        self.prefix.release()
