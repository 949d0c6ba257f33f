"""What a task says: its data, how an example becomes tokens, the loss, predictions and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from progscale.errors import DataError
from progscale.models.family import HeadKind
from progscale.registry import Registry
from progscale.tasks.ragged import Ragged

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Tokenized:
    """One split, ready for the model.

    A row is what the model sees at once: an example for classification, a window of an example for SQuAD. Batches,
    steps and the loss count rows ("examples of the global batch"); scores count the original examples.

    Attributes:
        columns: model inputs by name ("input_ids"), a ragged row of token ids each; no attention mask, which is made
            while padding.
        lengths: tokens of each row, int64, shape `(rows,)`.
        labels: targets by name ("labels"; "start_positions" and "end_positions"), arrays of shape `(rows,)`; empty
            where there are none.
        source: whatever the task needs to score the split (the original rows); never sent to the model.
    """

    columns: Mapping[str, Ragged]
    lengths: np.ndarray
    labels: Mapping[str, np.ndarray]
    source: Any = None

    def __len__(self) -> int:
        return len(self.lengths)


class Task(Protocol):
    """A task, built from its config section: `TASKS.get(name)(config.task, seed=config.run.seed)`.

    Building it looks at the data where that is cheap (files, columns, labels) and never tokenises.

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

    def check(self) -> None:
        """Reads all of the data and raises DataError for its first fault, without a tokenizer or a model."""
        ...

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


def evaluate_task(task: Task, split: Tokenized, name: str, predictions: Mapping[int, Any]) -> dict[str, float]:
    """Scores a split after checking that every row is there once and no other.

    Args:
        task: the task.
        split: what was predicted.
        name: of the split, "validation".
        predictions: row → what `task.predict` gave for it, merged from all ranks.

    Returns:
        Metric → value.

    Raises:
        DataError: a row is missing, or there is one that the split does not have.
    """
    missing = [row for row in range(len(split)) if row not in predictions]
    extra = [row for row in predictions if not 0 <= row < len(split)]
    if missing or extra:
        raise DataError(
            f"{name}: predictions for {len(predictions)} rows, {len(split)} are needed; "
            f"{len(missing)} missing (first: {missing[:3]}), {len(extra)} unknown (first: {extra[:3]})"
        )
    return task.score(predictions, split, name)


TASKS: Registry[type[Any]] = Registry("task", "progscale.tasks", package="progscale.tasks")
register = TASKS.register
