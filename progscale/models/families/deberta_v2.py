"""DeBERTa v2 and v3.

The relative-position table, its norm (`encoder.LayerNorm` is applied to the table alone, never to a hidden state)
and the convolution beside the first block go with the embeddings: every block above depends on them.
"""

from typing import Any

from progscale.models.family import Family, register_family


def max_tokens(config: Any) -> int | None:
    """Without absolute positions in the input, relative ones are clipped and no length is too long."""
    return int(config.max_position_embeddings) if config.position_biased_input else None


register_family(
    Family(
        name="deberta-v2",
        model_types=("deberta-v2",),
        base="deberta",
        embeddings=("embeddings", "encoder.rel_embeddings?", "encoder.LayerNorm?", "encoder.conv?"),
        stacks={"blocks": "encoder.layer"},
        max_tokens=max_tokens,
        projections=("attention.self.query_proj", "attention.self.value_proj"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
