"""ModernBERT: rotary positions, local and global attention in turn, layer norm before each sublayer.

The norm behind the last block belongs to the head. The first block has no norm before its attention, so it is smaller than
the others.
"""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="modernbert",
        model_types=("modernbert",),
        base="model",
        embeddings=("embeddings",),
        stacks={"blocks": "layers"},
        head=("final_norm",),
        projections=("attn.Wqkv",),
        sublayers={"blocks": ("attn.out_drop", "mlp.Wo")},
    )
)
