"""What the language-modelling tasks share: their data, the loss of each token, prompts for generation, and scores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from progscale.errors import ConfigError, DataError, Fault, ModelError
from progscale.tasks.base import IGNORED, Tokenized
from progscale.tasks.cache import Arrays, batches_with_progress
from progscale.tasks.examples import ExampleTask
from progscale.tasks.files import Table, listed
from progscale.tasks.labels import texts_of
from progscale.tasks.metrics import own_scores
from progscale.tasks.ragged import Ragged
from progscale.tasks.sources import find_tables, rows_aside

if TYPE_CHECKING:
    import torch

TOKENIZE_ROWS = 1000
# Tokens of a target at most, where the config does not say.
MAX_TARGET_LENGTH = 128

log = logging.getLogger("progscale.data")


@dataclass(frozen=True, eq=False)
class Documents:
    """One split before tokenising.

    Attributes:
        texts: whole texts; or prompts, or sources, where `pairs` has what is to follow.
        pairs: completions or target texts; None where the texts themselves are learned.
        origin: where they come from, for messages.
    """

    texts: list[str]
    pairs: list[str] | None
    origin: str

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Documents:
        """The given examples, in the order given."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        return Documents([self.texts[row] for row in rows], pairs, self.origin)


@dataclass(frozen=True, eq=False)
class Written:
    """What scoring generated texts needs.

    Attributes:
        references: the text that each row should lead to.
        prompts: tokens of each row's prompt, int64, shape `(rows,)`; None where the whole input is the prompt.
    """

    references: list[str]
    prompts: np.ndarray | None = None


class LanguageTask(ExampleTask[Documents]):
    """Base of the tasks that predict tokens over the user's own data; the loss is the mean over target tokens.

    A task says `name` and `head`, and defines `tokenize` and `columns`.

    Args:
        config: the `task` section.
        seed: decides which rows are set aside.

    Raises:
        DataError: the data cannot be used.
        ConfigError: `task.metric` does not fit.
    """

    # Outputs are the vocabulary's: there are no labels to name.
    num_labels = 0
    label_names: tuple[str, ...] = ()
    problem_type: str | None = None

    def __init__(self, name: str, config: Any, *, seed: int = 0) -> None:
        self.generates = self.wants_text(config)
        self.metric_names = (("rougeL", "rouge1", "rouge2") if self.generates else ()) + ("loss", "perplexity")
        super().__init__(name, config, seed=seed)
        if self._own_metric and not self.generates:
            raise ConfigError(
                Fault("task.metric", f"'{config.metric}' scores texts, and this run writes none; set task.generate")
            )
        self.max_target_length = int(self.config_value("max_target_length", MAX_TARGET_LENGTH))
        self._tokenizer: Any = None

    def wants_text(self, config: Any) -> bool:
        """Whether the model is scored by the text that it writes."""
        return bool(getattr(config, "generate", None))

    def columns(self, table: Table) -> tuple[str, str | None]:
        """The columns of the texts, and of what is to follow them."""
        raise NotImplementedError

    # -- data -----------------------------------------------------------------------------------------------------

    def read(self) -> dict[str, Documents]:
        """The splits "train" and "validation"."""
        train, validation = find_tables(self.config, lines=True)
        examples = self._documents(train)
        if validation is not None:
            return {"train": examples, "validation": self._documents(validation)}
        kept, aside = rows_aside(train.name, self.config_value("validation_fraction"), self.seed, len(examples))
        return {"train": examples.take(kept), "validation": examples.take(aside)}

    def _documents(self, table: Table) -> Documents:
        if not len(table):
            raise DataError(f"{table.name}: 0 rows")
        first, second = self.columns(table)
        key = "task.text_columns" if second is None else "task.source_column"
        texts = texts_of(table, first, key)
        prefix = self.config_value("source_prefix", "")
        pairs = None if second is None else texts_of(table, second, "task.target_column")
        return Documents([prefix + text for text in texts] if prefix else texts, pairs, table.name)

    def pair_columns(self, table: Table) -> tuple[str, str]:
        """`source_column` and `target_column`.

        Raises:
            DataError: one of them is missing.
        """
        source, target = self.config_value("source_column"), self.config_value("target_column")
        if source is None or target is None:
            missing = "source" if source is None else "target"
            raise DataError(f"task.{missing}_column: missing; {table.name} has: {listed(table.columns)}{table.hint}")
        return str(source), str(target)

    # -- training and scores --------------------------------------------------------------------------------------

    def predict(self, outputs: Any, rows: Sequence[int], split: Tokenized) -> list[Any]:
        """The text that the model has written for each row; None where it writes none."""
        if self.generation is None:
            return [None] * len(rows)
        texts: list[str] = self._tokenizer.batch_decode(outputs.cpu(), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def score(self, predictions: Mapping[int, Any], split: Tokenized, name: str) -> dict[str, float]:
        """ROUGE of the written texts in percent, and the user's own metric; loss and perplexity are the loop's."""
        if self.generation is None:
            return {}
        from progscale.tasks.metrics.rouge import rouge_scores

        texts, source = [predictions[row] for row in range(len(split))], split.source
        scores = rouge_scores(texts, source.references)
        if self._own_metric:
            scores |= own_scores(self._own_metric, self.primary_metric, {"predictions": texts, "references": source.references})
        return scores

    def try_own_metric(self) -> None:
        """Lets the user's metric score two texts, so that one which does not fit fails now and not after an epoch."""
        if self._own_metric:
            texts = ["a short text", "another one"]
            own_scores(self._own_metric, self.primary_metric, {"predictions": texts, "references": texts})

    @property
    def generation(self) -> dict[str, Any] | None:
        """Options of `generate`: greedy, or a beam of `num_beams`, never sampled."""
        if not self.generates:
            return None
        tokenizer = self._tokenizer
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": int(self.config_value("num_beams", 1)),
            "do_sample": False,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the model may write for a row."""
        return int(self.config_value("max_new_tokens", self.max_target_length))


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of each row's targets, float32, shape `(rows,)`.

    Args:
        logits: shape `(rows, tokens, vocabulary)`.
        labels: target of each place, shape `(rows, tokens)`; IGNORED where there is none.
    """
    from torch.nn import functional

    flat = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape).sum(dim=1)


def end_token(tokenizer: Any) -> int:
    """The token that ends a text.

    Raises:
        ModelError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token, which a language model ends a text with; give it one (eos_token)")
    return int(tokenizer.eos_token_id)


def token_ids(tokenizer: Any, texts: list[str], what: str, **options: Any) -> Iterable[list[int]]:
    """Tokens of each text, uncut; shows how far it is."""
    for begin, end in batches_with_progress(len(texts), TOKENIZE_ROWS, what):
        # The model's length is no limit here: what is too long is cut afterwards, and said once.
        yield from tokenizer(texts[begin:end], return_attention_mask=False, verbose=False, **options)["input_ids"]


def ended(ids: list[int], end: int, limit: int) -> tuple[list[int], bool]:
    """A target with its end token, cut to `limit` tokens; whether it was cut."""
    text = ids[:-1] if ids and ids[-1] == end else ids
    return [*text[: limit - 1], end], len(text) > limit - 1


def say_cut(name: str, cut: int, rows: int, what: str, limit: str) -> None:
    """Tells how many rows lose something."""
    if cut:
        log.warning("%s: %d of %d %s (%.1f %%) are longer than %s and are cut", name, cut, rows, what, 100 * cut / rows, limit)


def ragged(arrays: Arrays, name: str) -> Ragged:
    """A column of a cached split."""
    return Ragged(arrays[name], arrays[f"{name}_offsets"])


def arrays_of(name: str, column: Ragged) -> Arrays:
    """The reverse of `ragged`."""
    return {name: column.values, f"{name}_offsets": column.offsets}
