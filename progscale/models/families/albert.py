"""ALBERT: all its layers share one block, or each of `num_hidden_groups` groups of them does.

A block here is such a group. They are applied in order, so more than one can be frozen from below like blocks of their own;
one alone leaves nothing to freeze in stages.
"""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="albert",
        model_types=("albert",),
        base="albert",
        embeddings=("embeddings", "encoder.embedding_hidden_mapping_in"),
        stacks={"blocks": "encoder.albert_layer_groups"},
        head=("pooler?",),
        shared_blocks=True,
        projections=("attention.query", "attention.value"),
        # Every published model has one layer in a group's repetition (`inner_group_num`).
        sublayers={"blocks": ("albert_layers.0.attention.output_dropout", "albert_layers.0.ffn_output")},
    )
)
