"""RoBERTa and the models that share its code: XLM-R (base and large) and CamemBERT."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="roberta",
        model_types=("roberta", "xlm-roberta", "camembert"),
        base="roberta",
        embeddings=("embeddings",),
        stacks={"blocks": "encoder.layer"},
        head=("pooler?",),
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
