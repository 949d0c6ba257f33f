"""MPNet; every block reads one table of relative-position biases, which goes with the embeddings."""

from typing import Any

from progscale.models.family import Family, register_family


def max_tokens(config: Any) -> int:
    """Positions count from 2, whatever the config's pad_token_id: 514 position embeddings hold 512 tokens."""
    return int(config.max_position_embeddings) - 2


register_family(
    Family(
        name="mpnet",
        model_types=("mpnet",),
        base="mpnet",
        embeddings=("embeddings", "encoder.relative_attention_bias"),
        stacks={"blocks": "encoder.layer"},
        head=("pooler?",),
        max_tokens=max_tokens,
        projections=("attention.attn.q", "attention.attn.v"),
        sublayers={"blocks": ("attention.dropout", "output.dropout")},
    )
)
