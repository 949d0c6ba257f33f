"""T5, T5 v1.1 and Flan-T5: an encoder and a decoder, two stacks of blocks.

The first block of each stack holds the table of relative positions that all its blocks use: it goes with the embeddings.
"""

from collections.abc import Mapping
from typing import Any

from progscale.errors import DataError
from progscale.models.family import Family, ModelRequest, register_family


def untie(model: Any) -> None:
    """Gives a model whose output layer has weights of its own (v1.1, Flan) such weights.

    transformers 5 builds every T5 with `lm_head` tied to the embeddings, and finds out that it is not when it reads the
    weights: a model without weights would then lack a parameter that the loaded one has. What tells is
    `tie_word_embeddings: false` in the published config, which it keeps as `scale_decoder_outputs`.
    """
    from torch import nn

    head = getattr(model, "lm_head", None)
    if head is None or getattr(model.config, "scale_decoder_outputs", True):
        return
    if head.weight is model.shared.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    keys = type(model)._tied_weights_keys
    model._tied_weights_keys = {target: source for target, source in keys.items() if target != "lm_head.weight"}
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def check_rows(request: ModelRequest, config: Any, splits: Mapping[str, Any]) -> None:
    """Refuses rows that a classifier cannot read: it takes what the decoder says at the one end token of each row.

    Raises:
        DataError: naming the first of them.
    """
    if request.head != "sequence_classification":
        return
    import numpy as np

    for name, split in splits.items():
        ids = split.columns["input_ids"]
        ends = np.add.reduceat((ids.values == config.eos_token_id).astype(np.int64), ids.offsets[:-1])
        wrong = np.flatnonzero(ends != 1)
        if len(wrong):
            raise DataError(
                f"{name}: row {wrong[0]} has {ends[wrong[0]]} end tokens (id {config.eos_token_id}); a t5 classifier needs one "
                f"in each row ({len(wrong)} rows have another number): texts without '</s>', and a tokenizer that ends each so"
            )


def hand_on(
    block: Any, hidden: Any, attention_mask: Any = None, position_bias: Any = None, *rest: Any, **kw: Any
) -> tuple[Any, Any]:
    """The biases by relative position, which each block of the encoder hands on and the first one makes from its table."""
    if position_bias is None:
        position_bias = block.layer[0].SelfAttention.compute_bias(hidden.shape[1], hidden.shape[1], device=hidden.device)
    return position_bias, None


register_family(
    Family(
        name="t5",
        model_types=("t5",),
        # The classifier wraps a whole model; with a language-model head the model is its own base.
        base=("transformer", ""),
        embeddings=(
            "shared",
            "encoder.embed_tokens",
            "decoder.embed_tokens",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ),
        stacks={"encoder": "encoder.block", "decoder": "decoder.block"},
        head=("encoder.final_layer_norm", "decoder.final_layer_norm", "lm_head?", "qa_outputs?"),
        adapt=untie,
        check_rows=check_rows,
        hand_on=hand_on,
        projections=("SelfAttention.q", "SelfAttention.v", "EncDecAttention.q", "EncDecAttention.v"),
        sublayers={
            "encoder": ("layer.0.dropout", "layer.1.dropout"),
            "decoder": ("layer.0.dropout", "layer.2.dropout"),
        },
    )
)
