"""DistilBERT."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="distilbert",
        model_types=("distilbert",),
        base="distilbert",
        embeddings=("embeddings",),
        stacks={"blocks": "transformer.layer"},
    )
)
