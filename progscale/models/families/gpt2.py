"""GPT-2. Its projections are Conv1D modules, which keep their weights as (in, out); query, key and value are one of them."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        base="transformer",
        embeddings=("wte", "wpe"),
        stacks={"blocks": "h"},
        head=("ln_f",),
        projections=("attn.c_attn",),
        sublayers={"blocks": ("attn.resid_dropout", "mlp.dropout")},
    )
)
