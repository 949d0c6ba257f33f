"""DeBERTa (the first version); the relative-position table goes with the embeddings, as in v2 and v3."""

from typing import Any

from progscale.config import Train
from progscale.errors import ModelError
from progscale.models.families.deberta_v2 import max_tokens
from progscale.models.family import Family, ModelRequest, register_family


def check(request: ModelRequest, config: Any, tokenizer: Any, train: Train) -> None:
    """Refuses autocast: transformers masks bf16 scores with the least float32, which bf16 cannot hold.

    Raises:
        ModelError: the precision is bf16.
    """
    if train.precision == "bf16":
        raise ModelError(
            "train.precision: 'bf16'; transformers' DeBERTa of the first version cannot compute under autocast; take 'fp32', "
            "'bf16_params' (under DeepSpeed), or a DeBERTa v3"
        )


register_family(
    Family(
        name="deberta",
        model_types=("deberta",),
        base="deberta",
        embeddings=("embeddings", "encoder.rel_embeddings?"),
        stacks={"blocks": "encoder.layer"},
        max_tokens=max_tokens,
        check=check,
        projections=("attention.self.in_proj",),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
