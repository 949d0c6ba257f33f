"""What all tasks over one or two texts share: tokenising, the loss of a class or a number, predictions and scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from progscale.errors import DataError
from progscale.models.family import HeadKind
from progscale.tasks.base import Tokenized
from progscale.tasks.cache import Arrays, batches_with_progress, cached, fingerprint_texts, fingerprint_tokenizer
from progscale.tasks.examples import ExampleTask, Texts
from progscale.tasks.metrics import own_scores
from progscale.tasks.ragged import Ragged

if TYPE_CHECKING:
    import torch

TOKENIZE_ROWS = 2000
log = logging.getLogger("progscale.data")


@dataclass(frozen=True, eq=False)
class Examples:
    """One split before tokenising.

    Attributes:
        texts: the first text of each example.
        pairs: the second one, or None where there is one text only.
        labels: class ids (int64) or numbers (float32), shape `(examples,)`.
        origin: where they come from, for messages.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    origin: str

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Examples:
        """The given examples, in the order given."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        return Examples([self.texts[row] for row in rows], pairs, self.labels[rows], self.origin)


class SentenceTask(ExampleTask[Examples]):
    """Base of the tasks that give one output to one text or a pair of texts.

    A task says `label_names` (none for regression) and `metric_names`, and defines `read`.

    Args:
        name: as registered.
        config: the `task` section.
        seed: of subsets and splits.
    """

    head: HeadKind = "sequence_classification"
    label_names: tuple[str, ...] = ()
    metric_names: tuple[str, ...] = ("accuracy",)

    @property
    def num_labels(self) -> int:
        """Outputs of the head; 1 for regression."""
        return len(self.label_names) or 1

    @property
    def problem_type(self) -> str | None:
        """As transformers names it."""
        return "single_label_classification" if self.label_names else "regression"

    def tokenize(self, tokenizer: Any, max_length: int) -> dict[str, Tokenized]:
        """The splits as tokens, cut to `max_length`; kept on disk for the next run.

        Raises:
            DataError: the data cannot be used.
        """
        result = {}
        for name, examples in self.splits().items():
            key = {
                "kind": "sentence",
                "content": fingerprint_texts(examples.texts, examples.pairs),
                "tokenizer": fingerprint_tokenizer(tokenizer),
                "max_length": max_length,
            }
            arrays = cached(key, lambda e=examples, n=name: encode(tokenizer, e, max_length, n))  # type: ignore[misc]
            offsets = arrays.pop("offsets")
            truncated = int(arrays.pop("truncated"))
            if not np.diff(offsets).all():
                row = int(np.flatnonzero(np.diff(offsets) == 0)[0])
                raise DataError(f"{examples.origin}: example {row} is no token for this tokenizer (an empty text?)")
            if truncated:
                log.warning(
                    "%s: %d of %d rows (%.1f %%) are longer than train.max_length %d and lose their end",
                    name,
                    truncated,
                    len(examples),
                    100 * truncated / len(examples),
                    max_length,
                )
            columns = {column: Ragged(values, offsets) for column, values in arrays.items()}
            result[name] = Tokenized(columns, np.diff(offsets), {"labels": examples.labels})
        return result

    def loss(self, outputs: Any, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy or squared error of each row in float32, shape `(rows,)`."""
        from torch.nn import functional

        logits = outputs.logits.float()
        if self.label_names:
            return functional.cross_entropy(logits, labels["labels"], reduction="none")
        return functional.mse_loss(logits.squeeze(-1), labels["labels"].float(), reduction="none")

    def predict(self, outputs: Any, rows: Sequence[int], split: Tokenized) -> list[list[float]]:
        """The outputs of each row, `num_labels` numbers."""
        return outputs.logits.detach().float().cpu().tolist()

    def score(self, predictions: Mapping[int, Any], split: Tokenized, name: str) -> dict[str, float]:
        """The task's metrics, and the user's own one; those of a second evaluation split end in its name.

        The split "validation_mismatched" gives "accuracy_mismatched", so that scores of several splits never collide.
        """
        outputs = np.asarray([predictions[row] for row in range(len(split))], dtype=np.float32)
        references = np.asarray(split.labels["labels"])
        guesses = outputs.argmax(axis=1) if self.label_names else outputs[:, 0]
        scores = compute_scores(self.metric_names, guesses, references, classes=len(self.label_names))
        if self._own_metric:
            scores.update(self._own_scores(self._own_metric, outputs, guesses, references))
        second = name.removeprefix("validation_") if name.startswith("validation_") else "matched"
        suffix = "" if second == "matched" else f"_{second}"
        return {f"{metric}{suffix}": value for metric, value in scores.items()}

    def _own_scores(self, source: str, outputs: np.ndarray, guesses: np.ndarray, references: np.ndarray) -> dict[str, float]:
        inputs = {"predictions": guesses.tolist(), "references": references.tolist()}
        # Ranking metrics ask for scores under another name: of two classes the log odds of the second, of more their shares.
        if outputs.shape[1] == 2:
            ranking = outputs[:, 1] - outputs[:, 0]
        elif outputs.shape[1] == 1:
            ranking = outputs[:, 0]
        else:
            powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
            ranking = powers / powers.sum(axis=1, keepdims=True)
        return own_scores(source, self.primary_metric, inputs, {"prediction_scores": ranking.tolist()})

    def try_own_metric(self) -> None:
        """Lets the user's metric score a few right answers, so that one which does not fit fails now and not after an epoch."""
        if not self._own_metric:
            return
        count = max(2, self.num_labels)
        references = np.arange(2 * count) % count
        if not self.label_names:
            self._own_scores(self._own_metric, references[:, None].astype(np.float32), references * 1.0, references * 1.0)
            return
        self._own_scores(self._own_metric, np.eye(count, dtype=np.float32)[references], references, references)


def compute_scores(names: tuple[str, ...], guesses: np.ndarray, references: np.ndarray, *, classes: int = 0) -> dict[str, float]:
    """The built-in metrics of these names; `classes` decides which F1 is meant, 0 for regression."""
    from progscale.tasks.metrics.glue import SentenceMetric

    result = SentenceMetric.of(names, classes).compute(predictions=guesses.tolist(), references=references.tolist())
    return {name: float(value) for name, value in (result or {}).items()}


def encode(tokenizer: Any, examples: Texts, max_length: int, name: str) -> Arrays:
    """Tokens of all examples: one flat array for each model input, "offsets" of the rows and "truncated", a count."""
    inputs = [column for column in ("input_ids", "token_type_ids") if column in tokenizer.model_input_names]
    parts: dict[str, list[Ragged]] = {column: [] for column in inputs}
    truncated = 0
    for begin, end in batches_with_progress(len(examples), TOKENIZE_ROWS, f"tokenising {name}"):
        pairs = None if examples.pairs is None else examples.pairs[begin:end]
        batch = tokenizer(examples.texts[begin:end], pairs, truncation=True, max_length=max_length, return_attention_mask=False)
        for column in inputs:
            parts[column].append(Ragged.from_rows(batch[column]))
        if tokenizer.is_fast:
            full = np.flatnonzero(parts["input_ids"][-1].lengths == max_length)
            truncated += sum(bool(batch.encodings[i].overflowing) for i in full)
    columns = {column: Ragged.concatenate(parts[column]) for column in inputs}
    arrays = {column: ragged.values for column, ragged in columns.items()}
    # One byte is enough for 0 and 1, and there are as many as tokens.
    if "token_type_ids" in arrays:
        arrays["token_type_ids"] = arrays["token_type_ids"].astype(np.uint8)
    return {**arrays, "offsets": columns["input_ids"].offsets, "truncated": np.asarray(truncated)}
