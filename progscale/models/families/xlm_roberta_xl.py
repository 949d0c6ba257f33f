"""XLM-R XL and XXL: layer norm before each sublayer, so a final norm follows the last block and belongs to the head."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="xlm-roberta-xl",
        model_types=("xlm-roberta-xl",),
        base="roberta",
        embeddings=("embeddings",),
        stacks={"blocks": "encoder.layer"},
        head=("encoder.LayerNorm", "pooler?"),
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dense")},
    )
)
