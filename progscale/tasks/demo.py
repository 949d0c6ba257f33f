"""The demo: sentences the project writes itself, whose label hangs on the order of the words alone.

Every sentence holds one hunter and one grazer. The label says which of them acts, so the words without their order
tell nothing: a bag of words stays at chance, an encoder has to attend across positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from progscale.tasks.base import register
from progscale.tasks.sentence import Examples, SentenceTask

HUNTERS = ("fox", "wolf", "hawk", "cat", "lynx", "owl", "snake", "bear")
GRAZERS = ("hare", "mouse", "duck", "vole", "frog", "hen", "deer", "lamb")
VERBS = ("follows", "sees", "hears", "finds", "meets", "passes", "watches", "greets")
ADJECTIVES = ("small", "old", "young", "quick", "tired", "grey", "brown", "quiet")
OPENINGS = ("today", "again", "later", "outside", "meanwhile", "here")
CLOSINGS = ("slowly", "twice", "nearby", "alone", "gladly", "briefly")

LABELS = ("hunter_acts", "grazer_acts")
TRAIN_EXAMPLES = 2400
EVAL_EXAMPLES = 600

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
VOCABULARY = (
    *SPECIAL_TOKENS.values(),
    "the",
    *HUNTERS,
    *GRAZERS,
    *VERBS,
    *ADJECTIVES,
    *OPENINGS,
    *CLOSINGS,
)

# Arguments of transformers' BertConfig: random weights, deep enough for six stages, quick on two CPU cores.
DEMO_MODEL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "initializer_range": 0.05,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}


def demo_tokenizer() -> Any:
    """The tokenizer of the demo: a PreTrainedTokenizerFast with one token for each word, built without any file."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=DEMO_MODEL["max_position_embeddings"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def demo_sentences(count: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Sentences of 5 to 9 words, and their labels `(count,)`: as many of one class as of the other, up to one."""
    labels = rng.permutation(np.arange(count) % 2)

    def words(choices: tuple[str, ...], share: float) -> list[str]:
        picked = np.asarray(choices)[rng.integers(len(choices), size=count)]
        return np.where(rng.random(count) < share, picked, "").tolist()

    hunters, grazers, verbs = words(HUNTERS, 1), words(GRAZERS, 1), words(VERBS, 1)
    openings, closings = words(OPENINGS, 0.5), words(CLOSINGS, 0.5)
    first_adjectives, second_adjectives = words(ADJECTIVES, 0.5), words(ADJECTIVES, 0.5)
    sentences = []
    for i in range(count):
        pair = (hunters[i], grazers[i]) if labels[i] == 0 else (grazers[i], hunters[i])
        first = (openings[i], "the", first_adjectives[i], pair[0], verbs[i])
        second = ("the", second_adjectives[i], pair[1], closings[i])
        sentences.append(" ".join(part for part in (*first, *second) if part))
    return sentences, labels


@register("demo")
class DemoTask(SentenceTask):
    """Who acts, the hunter or the grazer? Generated from the seed; needs no file and no network.

    Args:
        config: the `task` section; `max_train_examples` and `max_eval_examples` set the sizes.
        seed: of the sentences; the same seed gives the same data on every machine.
    """

    label_names = LABELS
    metric_names = ("accuracy",)

    def __init__(self, config: Any, *, seed: int = 0) -> None:
        super().__init__("demo", config, seed=seed)

    def read(self) -> dict[str, Examples]:
        """The splits "train" and "validation", drawn from two streams of the seed."""
        sizes = {
            "train": self.config_value("max_train_examples") or TRAIN_EXAMPLES,
            "validation": self.config_value("max_eval_examples") or EVAL_EXAMPLES,
        }
        splits = {}
        for stream, (split, size) in enumerate(sizes.items()):
            texts, labels = demo_sentences(size, np.random.default_rng([self.seed, stream]))
            splits[split] = Examples(texts, None, labels, "the demo's sentences")
        return splits
