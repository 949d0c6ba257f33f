"""What a task says: its data, how an example becomes tokens, the loss, predictions and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from progscale.models.family import HeadKind
from progscale.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokenized:
    """One split, ready for the model.

    A row is what the model sees at once: an example for classification, a window of an example for SQuAD. Batches,
    steps and the loss count rows ("examples of the global batch"); scores count the original examples.

    Attributes:
        columns: model inputs by name, each a sequence of rows; ragged ones are lists of token ids.
        lengths: tokens of each row.
        labels: targets by name ("labels"; "start_positions" and "end_positions"), scalars; empty where there are none.
        source: whatever the task needs to score the split (the original rows); never sent to the model.
    """

    columns: Mapping[str, Sequence[Any]]
    lengths: Sequence[int]
    labels: Mapping[str, Sequence[Any]]
    source: Any = None

    def __len__(self) -> int:
        return len(self.lengths)


class Task(Protocol):
    """A task, built from its config section.

    Attributes:
        name: as registered.
        head: which model head it needs.
        num_labels: outputs of the head; 1 for regression.
        label_names: names of the classes in order; empty for regression and question answering.
        problem_type: as transformers names it, None for question answering.
        primary_metric: key of `score`'s result that decides which model is best.
        higher_is_better: direction of the primary metric.
    """

    name: str
    head: HeadKind
    num_labels: int
    label_names: tuple[str, ...]
    problem_type: str | None
    primary_metric: str
    higher_is_better: bool

    def tokenize(self, tokenizer: Any, max_length: int) -> dict[str, Tokenized]:
        """The splits: "train", and one or more evaluation splits ("validation", "validation_mismatched")."""
        ...

    def loss(self, outputs: Any, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each row, float32, shape `(rows,)`; the engine sums and divides by the rows of the global batch."""
        ...

    def predict(self, outputs: Any, rows: Sequence[int], split: Tokenized) -> list[Any]:
        """What `score` needs of each row, small and picklable: it is gathered from all ranks."""
        ...

    def score(self, predictions: Mapping[int, Any], split: Tokenized, name: str) -> dict[str, float]:
        """Metrics of a split from the predictions of every row exactly once (row → prediction)."""
        ...


TASKS: Registry[type[Any]] = Registry("task", "progscale.tasks", package="progscale.tasks")
register = TASKS.register
