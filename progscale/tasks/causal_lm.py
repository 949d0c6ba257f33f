"""Language modelling with a decoder: whole texts, or completions of prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from progscale.errors import DataError
from progscale.models.family import HeadKind
from progscale.tasks.base import IGNORED, Tokenized, register
from progscale.tasks.cache import Arrays, cached, fingerprint_texts, fingerprint_tokenizer
from progscale.tasks.files import Table, listed
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
from progscale.tasks.ragged import Ragged, offsets_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger("progscale.data")


@register("causal_lm")
class CausalLanguageModel(LanguageTask):
    """Next-token prediction.

    With `text_columns` (one column) every token of a text is learned: the texts, each with an end token, are joined and cut
    into blocks of `train.max_length` tokens, or with `packing` false each is a row of its own. With `source_column` and
    `target_column` the model reads a prompt and learns the completion alone; with `generate` it is also scored by ROUGE.

    Args:
        config: the `task` section.
        seed: decides which rows are set aside.

    Raises:
        DataError: the data cannot be used.
    """

    head: HeadKind = "causal_lm"

    def __init__(self, config: Any, *, seed: int = 0) -> None:
        super().__init__("causal_lm", config, seed=seed)

    def columns(self, table: Table) -> tuple[str, str | None]:
        """`text_columns`, or `source_column` and `target_column`.

        Raises:
            DataError: it is not clear which column has the texts.
        """
        if self.config_value("source_column") or self.config_value("target_column"):
            return self.pair_columns(table)
        given = self.config_value("text_columns", ["text"] if "text" in table.columns else [])
        if len(given) != 1:
            raise DataError(
                f"task.text_columns: one column is needed, not {len(given)} ({', '.join(given) or 'none'}); "
                f"{table.name} has: {listed(table.columns)}{table.hint}"
            )
        return str(given[0]), None

    def tokenize(self, tokenizer: Any, max_length: int) -> dict[str, Tokenized]:
        """The splits as blocks or rows of at most `max_length` tokens; kept on disk for the next run.

        Raises:
            DataError: a split has no target token.
            ModelError: the tokenizer has no end token.
        """
        self._tokenizer = tokenizer
        end, packing = end_token(tokenizer), bool(self.config_value("packing", True))
        result = {}
        for name, documents in self.splits().items():
            kind = "pairs" if documents.pairs is not None else "blocks" if packing else "texts"
            encoders: dict[str, Callable[..., Arrays]] = {
                "pairs": partial(encode_pairs, limit=self.max_target_length),
                "blocks": encode_blocks,
                "texts": encode_texts,
            }
            key = {
                "kind": f"causal_lm {kind}",
                "content": fingerprint_texts(documents.texts, documents.pairs),
                "tokenizer": fingerprint_tokenizer(tokenizer),
                "special": [tokenizer.bos_token_id, end],
                "max_length": max_length,
                "max_target_length": self.max_target_length if kind == "pairs" else None,
            }
            arrays = cached(key, partial(encoders[kind], tokenizer, documents, max_length, name))
            result[name] = self._split(documents, arrays, name, max_length)
        return result

    def _split(self, documents: Documents, arrays: Arrays, name: str, max_length: int) -> Tokenized:
        ids = ragged(arrays, "input_ids")
        if not len(ids):
            raise DataError(f"{documents.origin}: {name} has no text of two tokens or more, so there is nothing to predict")
        say_cut(name, int(arrays["cut"]), len(documents), "texts", f"train.max_length {max_length}")
        if left_out := int(arrays["left_out"]):
            log.warning("%s: %d of %d texts have fewer than two tokens and are left out", name, left_out, len(documents))
        if documents.pairs is None:
            # What is learned is the text itself: the same array.
            return Tokenized({"input_ids": ids}, ids.lengths, {"labels": ids}, targets=ids.lengths - 1)
        say_cut(
            name, int(arrays["cut_targets"]), len(documents), "completions", f"task.max_target_length {self.max_target_length}"
        )
        prompts = arrays["prompts"]
        place = np.arange(len(ids.values)) - np.repeat(ids.offsets[:-1], ids.lengths)
        labels = np.where(place < np.repeat(prompts, ids.lengths), IGNORED, ids.values)
        written = Written([text.strip() for text in documents.pairs], prompts)
        return Tokenized(
            {"input_ids": ids}, ids.lengths, {"labels": Ragged(labels, ids.offsets)}, written, targets=ids.lengths - prompts
        )

    def loss(self, outputs: Any, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the cross-entropies of each row's targets, each predicted by the token before it; float32, shape `(rows,)`."""
        return token_losses(outputs.logits[:, :-1], labels["labels"][:, 1:])

    def prompts(self, inputs: Mapping[str, torch.Tensor], rows: Sequence[int], split: Tokenized) -> dict[str, torch.Tensor]:
        """The rows' prompts, padded on the left: a decoder goes on from the last place."""
        import torch

        column, lengths = split.columns["input_ids"], split.source.prompts[np.asarray(rows)]
        width = int(lengths.max())
        ids = np.full((len(rows), width), self._tokenizer.pad_token_id, dtype=np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[i, width - length :] = column[row][:length]
        mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int64)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def encode_blocks(tokenizer: Any, documents: Documents, max_length: int, name: str) -> Arrays:
    """All texts one after the other, each with an end token, cut into rows of `max_length` tokens; the last may be shorter."""
    end = end_token(tokenizer)
    rows = [ended(ids, end, len(ids) + 1)[0] for ids in token_ids(tokenizer, documents.texts, f"tokenising {name}")]
    stream = Ragged.from_rows(rows).values
    # A rest of one token would have no token before it.
    total = len(stream) - (len(stream) % max_length == 1)
    offsets = offsets_of(np.diff(np.append(np.arange(0, total, max_length), total)))
    found = arrays_of("input_ids", Ragged(stream[:total], offsets))
    return {**found, "cut": np.asarray(0), "left_out": np.asarray(0)}


def encode_texts(tokenizer: Any, documents: Documents, max_length: int, name: str) -> Arrays:
    """A row for each text, with its end token where it is not cut; texts without a target are left out."""
    end, cut = end_token(tokenizer), 0
    rows = []
    for ids in token_ids(tokenizer, documents.texts, f"tokenising {name}"):
        whole, _ = ended(ids, end, len(ids) + 1)
        cut += len(whole) > max_length
        rows.append(whole[:max_length])
    kept = [row for row in rows if len(row) > 1]
    counts = {"cut": np.asarray(cut), "left_out": np.asarray(len(rows) - len(kept))}
    return {**arrays_of("input_ids", Ragged.from_rows(kept)), **counts}


def encode_pairs(tokenizer: Any, documents: Documents, max_length: int, name: str, *, limit: int) -> Arrays:
    """A row for each prompt with its completion and an end token; "prompts" are the tokens of each prompt.

    A completion is cut to `limit` tokens; then a prompt that leaves it too little room loses its beginning, but for the begin
    token: what the completion follows is the prompt's end.
    """
    assert documents.pairs is not None
    end, begin = end_token(tokenizer), tokenizer.bos_token_id
    first = token_ids(tokenizer, documents.texts, f"tokenising {name}: prompts")
    second = token_ids(tokenizer, documents.pairs, f"tokenising {name}: completions", add_special_tokens=False)
    rows, prompts, cut, cut_targets = [], [], 0, 0
    for prompt, completion in zip(list(first), second, strict=True):
        target, was_cut = ended(completion, end, limit)
        cut_targets += was_cut
        if prompt and prompt[-1] == end and len(prompt) > 1:
            prompt = prompt[:-1]  # a tokenizer that ends every text by itself
        prompt = prompt or [end if begin is None else begin]
        room = max_length - len(target)
        if len(prompt) > room:
            cut += 1
            head = prompt[:1] if prompt[0] == begin and room > 1 else []
            prompt = head + prompt[len(prompt) - (room - len(head)) :]
        rows.append(prompt + target)
        prompts.append(len(prompt))
    counts = {"cut": np.asarray(cut), "cut_targets": np.asarray(cut_targets), "left_out": np.asarray(0)}
    return {**arrays_of("input_ids", Ragged.from_rows(rows)), "prompts": np.asarray(prompts, dtype=np.int64), **counts}
