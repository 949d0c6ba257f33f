"""Sequence to sequence with an encoder-decoder: summaries, translations, anything that turns one text into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from progscale.models.family import HeadKind
from progscale.tasks.base import Tokenized, register
from progscale.tasks.cache import Arrays, cached, fingerprint_texts, fingerprint_tokenizer
from progscale.tasks.files import Table
from progscale.tasks.language import (
    Documents,
    LanguageTask,
    Written,
    arrays_of,
    end_token,
    ended,
    ragged,
    say_cut,
    token_ids,
    token_losses,
)
from progscale.tasks.ragged import Ragged

if TYPE_CHECKING:
    import torch


@register("summarization")
class Summarization(LanguageTask):
    """The encoder reads `source_column` (after `source_prefix`), the decoder learns `target_column`; scored by ROUGE.

    Args:
        config: the `task` section.
        seed: decides which rows are set aside.

    Raises:
        DataError: the data cannot be used.
    """

    head: HeadKind = "seq2seq_lm"

    def __init__(self, config: Any, *, seed: int = 0) -> None:
        super().__init__("summarization", config, seed=seed)

    def wants_text(self, config: Any) -> bool:
        """Yes, unless `generate` is false."""
        return getattr(config, "generate", None) is not False

    def columns(self, table: Table) -> tuple[str, str | None]:
        """`source_column` and `target_column`."""
        return self.pair_columns(table)

    def tokenize(self, tokenizer: Any, max_length: int) -> dict[str, Tokenized]:
        """Sources of at most `max_length` tokens and targets of at most `max_target_length`; kept on disk for the next run.

        Raises:
            ModelError: the tokenizer has no end token.
        """
        self._tokenizer = tokenizer
        result = {}
        for name, documents in self.splits().items():
            assert documents.pairs is not None
            key = {
                "kind": "summarization",
                "content": fingerprint_texts(documents.texts, documents.pairs),
                "tokenizer": fingerprint_tokenizer(tokenizer),
                "special": [tokenizer.bos_token_id, end_token(tokenizer)],
                "max_length": max_length,
                "max_target_length": self.max_target_length,
            }
            arrays = cached(key, partial(encode, tokenizer, documents, max_length, self.max_target_length, name))
            say_cut(name, int(arrays["cut"]), len(documents), "sources", f"train.max_length {max_length}")
            say_cut(
                name, int(arrays["cut_targets"]), len(documents), "targets", f"task.max_target_length {self.max_target_length}"
            )
            ids, labels = ragged(arrays, "input_ids"), ragged(arrays, "labels")
            written = Written([text.strip() for text in documents.pairs])
            lengths = ids.lengths + labels.lengths
            result[name] = Tokenized({"input_ids": ids}, lengths, {"labels": labels}, written, targets=labels.lengths)
        return result

    def loss(self, outputs: Any, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the cross-entropies of each row's target tokens, float32, shape `(rows,)`."""
        return token_losses(outputs.logits, labels["labels"])

    def prompts(self, inputs: Mapping[str, torch.Tensor], rows: Sequence[int], split: Tokenized) -> dict[str, torch.Tensor]:
        """The encoder's inputs: the decoder begins by itself."""
        return {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}


def encode(tokenizer: Any, documents: Documents, max_length: int, limit: int, name: str) -> Arrays:
    """Tokens of sources and targets; both end in the end token, also where they are cut."""
    assert documents.pairs is not None
    end = end_token(tokenizer)
    found: Arrays = {}
    targets = token_ids(tokenizer, documents.pairs, f"tokenising {name}: targets", add_special_tokens=False)
    sources = token_ids(tokenizer, documents.texts, f"tokenising {name}: sources")
    for column, texts, most, cut in (("input_ids", sources, max_length, "cut"), ("labels", targets, limit, "cut_targets")):
        rows = [ended(ids, end, most) for ids in texts]
        found |= arrays_of(column, Ragged.from_rows([ids for ids, _ in rows]))
        found[cut] = np.asarray(sum(was_cut for _, was_cut in rows))
    return found
