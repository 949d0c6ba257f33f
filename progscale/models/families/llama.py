"""Llama and the decoders that share its layout: Mistral, Qwen2, Qwen2.5, Qwen3 and the first Gemma."""

from progscale.models.family import Family, register_family

register_family(
    Family(
        name="llama",
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
        # Most question-answering models of these call it otherwise.
        base=("model", "transformer"),
        embeddings=("embed_tokens",),
        stacks={"blocks": "layers"},
        head=("norm",),
        projections=("self_attn.q_proj", "self_attn.v_proj"),
        sublayers={"blocks": ("self_attn.o_proj", "mlp.down_proj")},
    )
)
