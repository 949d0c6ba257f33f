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

# A place without a target, as torch's cross-entropy and transformers know it.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Tokenized:
    """One split, ready for the model.

    A row is what the model sees at once: an example for classification, a window of an example for SQuAD, a block of text for a
    language model. Batches and steps count rows; scores count the original examples.

    Attributes:
        columns: model inputs by name ("input_ids"), a ragged row of token ids each; no attention mask, which is made
            while padding.
        lengths: tokens of each row, the target's included where it is another sequence; int64, shape `(rows,)`.
        labels: targets by name ("labels"; "start_positions" and "end_positions"), arrays of shape `(rows,)`, or a ragged row of
            token ids each, with IGNORED where there is no target; empty where there are none.
        source: whatever the task needs to score the split (the original rows); never sent to the model.
        targets: target tokens of each row where the loss is the mean over tokens, int64, shape `(rows,)`, each at least 1; None
            where it is the mean over rows.
    """

    columns: Mapping[str, Ragged]
    lengths: np.ndarray
    labels: Mapping[str, np.ndarray | Ragged]
    source: Any = None
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def weight(self, rows: np.ndarray | None = None) -> int:
        """What the loss over these rows (all by default) is divided by: their number, or that of their target tokens."""
        if self.targets is None:
            return len(self) if rows is None else len(rows)
        return int(self.targets.sum() if rows is None else self.targets[rows].sum())


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
        """Loss of each row, float32, shape `(rows,)`: the sum over its targets where the split counts them.

        The engine sums, and divides by the rows or the target tokens of the global batch.
        """
        ...

    def predict(self, outputs: Any, rows: Sequence[int], split: Tokenized) -> list[Any]:
        """What `score` needs of each row, small and picklable: it is gathered from all ranks."""
        ...

    def score(self, predictions: Mapping[int, Any], split: Tokenized, name: str) -> dict[str, float]:
        """Metrics of a split from the predictions of every row exactly once (row → prediction)."""
        ...


class GeneratingTask(Task, Protocol):
    """A task that is scored by what the model writes.

    Its `predict` is called with the new token ids, shape `(rows, new tokens)`, in place of the model's outputs; None while
    `generation` is.

    Attributes:
        generation: options of `generate` (max_new_tokens, num_beams), or None for no generation.
    """

    generation: Mapping[str, Any] | None

    def prompts(self, inputs: Mapping[str, torch.Tensor], rows: Sequence[int], split: Tokenized) -> dict[str, torch.Tensor]:
        """What the model is to go on from, for rows whose padded inputs are `inputs`."""
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
