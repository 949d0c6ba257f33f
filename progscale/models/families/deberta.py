"""DeBERTa (the first version); the relative-position table goes with the embeddings, as in v2 and v3."""

from progscale.models.families.deberta_v2 import max_tokens
from progscale.models.family import Family, register_family

register_family(
    Family(
        name="deberta",
        model_types=("deberta",),
        base="deberta",
        embeddings=("embeddings", "encoder.rel_embeddings?"),
        stacks={"blocks": "encoder.layer"},
        max_tokens=max_tokens,
        projections=("attention.self.in_proj",),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
