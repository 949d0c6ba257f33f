"""Longformer: attention within a window, and of some tokens to all others.

The model itself pads every batch to a multiple of the window (512 in the published ones), and gives global attention to the
first token for classification, to the question for question answering.
"""

from typing import Any

from progscale.config import Train
from progscale.errors import ModelError
from progscale.models.family import Family, ModelRequest, register_family


def check(request: ModelRequest, config: Any, tokenizer: Any, train: Train) -> None:
    """Refuses a tokenizer whose pairs do not have the three separators by which the model finds the end of the question.

    Raises:
        ModelError: the task is question answering, and they have another number of them.
    """
    if request.head != "question_answering":
        return
    separators = tokenizer("a", "b")["input_ids"].count(config.sep_token_id)
    if separators != 3:
        raise ModelError(
            f"model.tokenizer: it puts {separators} separators (id {config.sep_token_id}, the config's sep_token_id) into a "
            f"pair of texts; for question answering a Longformer needs 3, as its own tokenizer has them"
        )


register_family(
    Family(
        name="longformer",
        model_types=("longformer",),
        base="longformer",
        embeddings=("embeddings",),
        stacks={"blocks": "encoder.layer"},
        head=("pooler?",),
        check=check,
        refuses={"qlora": "it scales the queries in place, which the products with quantised weights do not allow; take lora"},
        projections=("attention.self.query", "attention.self.value"),
        sublayers={"blocks": ("attention.output.dropout", "output.dropout")},
    )
)
