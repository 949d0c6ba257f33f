"""BERT."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="bert",
        model_types=("bert",),
        base="bert",
        embeddings=("embeddings",),
        stacks={"blocks": "encoder.layer"},
        head=("pooler?",),
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
