"""ERNIE 1.0, 2.0 and 3.0: BERT with embeddings of the task beside those of the tokens."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="ernie",
        model_types=("ernie",),
        base="ernie",
        embeddings=("embeddings",),
        stacks={"blocks": "encoder.layer"},
        head=("pooler?",),
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
