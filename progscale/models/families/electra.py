"""ELECTRA discriminators; small ones project narrow embeddings up to the width of the blocks."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="electra",
        model_types=("electra",),
        base="electra",
        embeddings=("embeddings", "embeddings_project?"),
        stacks={"blocks": "encoder.layer"},
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
