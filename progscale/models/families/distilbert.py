"""DistilBERT."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="distilbert",
        model_types=("distilbert",),
        base="distilbert",
        embeddings=("embeddings",),
        stacks={"blocks": "transformer.layer"},
        projections=("attention.q_lin", "attention.v_lin"),
        sublayers={"blocks": ("attention.out_lin", "ffn.dropout")},
    )
)
