"""BigBird: attention to a window, to the first and last blocks of tokens and to random ones; or full attention.

With `attention_type` "block_sparse" the model turns itself into one of full attention when it meets its first batch that is
too short, and stays so: what it computes would hang on the batches before, differ between ranks and change at a resume.
So every batch is padded beyond that length, and a run whose texts are all shorter has to say "original_full".

Its model for classification has a pooler that nothing reads.
"""

from typing import Any

from progscale.config import Train
from progscale.errors import ModelError
from progscale.models.family import Family, ModelRequest, register_family


def min_tokens(config: Any) -> int:
    """One more than the longest batch that makes the model give up sparse attention; 1 with full attention."""
    if config.attention_type != "block_sparse":
        return 1
    return (5 + 2 * int(config.num_random_blocks)) * int(config.block_size) + 1


def check(request: ModelRequest, config: Any, tokenizer: Any, train: Train) -> None:
    """Refuses sparse attention for texts that are all too short for it.

    Raises:
        ModelError: they are.
    """
    if train.max_length < min_tokens(config):
        raise ModelError(
            f"train.max_length: {train.max_length}; sparse attention over blocks of {config.block_size} tokens needs at least "
            f"{min_tokens(config)}; for shorter texts take full attention: model.overrides.attention_type=original_full"
        )


register_family(
    Family(
        name="big_bird",
        model_types=("big_bird",),
        base="bert",
        embeddings=("embeddings",),
        stacks={"blocks": "encoder.layer"},
        unused=("pooler?",),
        min_tokens=min_tokens,
        check=check,
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
