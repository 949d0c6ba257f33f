"""What the measurements train: settings that all sides of a comparison share, random rows, and a loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from progscale.tasks.base import Tokenized
from progscale.tasks.ragged import Ragged

LR, DECAY, CLIP = 2e-5, 0.01, 1.0
MRPC_TOKENS = 53


def row_loss(outputs: Any, labels: Any) -> torch.Tensor:
    """Cross-entropy of each row."""
    return torch.nn.functional.cross_entropy(outputs.logits.float(), labels["labels"], reduction="none")


def synthetic(rows: int, longest: int, vocabulary: int, mean: float = MRPC_TOKENS) -> Tokenized:
    """Random tokens; lengths spread about their mean as MRPC's do, 12 at the least."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(mean, 13 * mean / MRPC_TOKENS, rows).astype(np.int64), 12, longest)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(5, vocabulary, int(offsets[-1]))
    columns = {"input_ids": Ragged(tokens, offsets), "token_type_ids": Ragged(np.zeros_like(tokens), offsets)}
    return Tokenized(columns, lengths, {"labels": rng.integers(0, 2, rows)})
