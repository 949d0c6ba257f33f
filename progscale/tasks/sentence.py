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
from progscale.tasks.metrics import choose_metric, own_scores
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


class SentenceTask:
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

    def __init__(self, name: str, config: Any, *, seed: int = 0) -> None:
        self.name = name
        self.config = config
        self.seed = seed
        self.primary_metric, self.higher_is_better, self._own_metric = choose_metric(
            self.config_value("metric"), self.metric_names
        )
        self._splits: dict[str, Examples] | None = None

    @property
    def num_labels(self) -> int:
        """Outputs of the head; 1 for regression."""
        return len(self.label_names) or 1

    @property
    def problem_type(self) -> str | None:
        """As transformers names it."""
        return "single_label_classification" if self.label_names else "regression"

    def config_value(self, key: str, default: Any = None) -> Any:
        """An entry of the `task` section, or `default` where it is absent or null."""
        value = getattr(self.config, key, None)
        return default if value is None else value

    def read(self) -> dict[str, Examples]:
        """The splits before tokenising: "train" and those for evaluation."""
        raise NotImplementedError

    def splits(self) -> dict[str, Examples]:
        """The splits, read once and cut to `max_train_examples` and `max_eval_examples`.

        Raises:
            DataError: what was read cannot be used.
        """
        if self._splits is None:
            limits = (self.config_value("max_train_examples"), self.config_value("max_eval_examples"))
            self._splits = {name: subset(examples, limits[name != "train"], self.seed) for name, examples in self.read().items()}
            for name, examples in self._splits.items():
                if not len(examples):
                    raise DataError(f"{examples.origin}: no rows for {name}")
                check_encodable(examples)
        return self._splits

    def check(self) -> None:
        """Reads all of the data and tries the user's metric, without a tokenizer or a model.

        Raises:
            DataError: the first fault of the data.
            ConfigError: the metric fails.
        """
        self.splits()
        self._try_own_metric()

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

    def _try_own_metric(self) -> None:
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


def subset(examples: Examples, limit: int | None, seed: int) -> Examples:
    """At most `limit` examples, drawn by the seed and left in their order (a file may be sorted by its labels)."""
    if limit is None or limit >= len(examples):
        return examples
    rows = np.sort(np.random.default_rng([seed, 7]).permutation(len(examples))[:limit])
    return examples.take(rows)


def check_encodable(examples: Examples) -> None:
    r"""Raises DataError for a text that is no valid Unicode (JSON allows half of a pair, `"\ud800"`)."""
    for column in (examples.texts, examples.pairs or []):
        try:
            "".join(column).encode()
        except UnicodeEncodeError:
            for i, text in enumerate(column):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    character = text[error.start]
                    message = f"{examples.origin}: example {i} holds U+{ord(character):04X}, which is no character"
                    raise DataError(message) from None


def encode(tokenizer: Any, examples: Examples, max_length: int, name: str) -> Arrays:
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
