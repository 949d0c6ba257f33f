"""RoBERTa and the models that share its code: XLM-R (base and large) and CamemBERT."""

from typing import Any

from progscale.models.family import Family, register_family


def max_tokens(config: Any) -> int:
    """Positions count from `pad_token_id` + 1, so 514 position embeddings hold 512 tokens."""
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1


register_family(
    Family(
        name="roberta",
        model_types=("roberta", "xlm-roberta", "camembert"),
        base="roberta",
        embeddings=("embeddings",),
        stacks={"blocks": "encoder.layer"},
        head=("pooler?",),
        max_tokens=max_tokens,
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
