"""What a model family says: how to load it, and where its embeddings, ordered blocks and head live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from progscale.registry import Registry

if TYPE_CHECKING:
    import torch

    from progscale.config import Train

HeadKind = Literal["sequence_classification", "question_answering", "causal_lm", "seq2seq_lm"]
# Heads that say the next token: their outputs are the vocabulary's, and they have no labels of their own.
LANGUAGE_MODEL_HEADS: tuple[HeadKind, ...] = ("causal_lm", "seq2seq_lm")


@dataclass(frozen=True)
class ModelRequest:
    """What is to be loaded.

    Attributes:
        name: hub id, local folder, or a well-known architecture (with random weights or on the meta device).
        head: which head the task needs.
        num_labels: outputs of a classification or regression head (1 for regression).
        label_names: names for the outputs, in order; kept in the exported config.
        problem_type: "single_label_classification", "regression", or None for question answering and language models.
        overrides: entries of the transformers config to change (`{"hidden_dropout_prob": 0.0}`).
        random_weights: build from the config alone.
        revision: hub revision.
        allow_pickle: also accept `*.bin` weights; only ever set on the command line.
        trust_remote_code: run code from the model's repository; only ever set on the command line.
        attention: transformers' implementation of attention; None leaves the choice to it. Without weights it does not matter.
    """

    name: str
    head: HeadKind
    num_labels: int = 2
    label_names: tuple[str, ...] = ()
    problem_type: str | None = "single_label_classification"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    random_weights: bool = False
    revision: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    attention: str | None = None


@dataclass(frozen=True)
class Places:
    """Where a model's parts live; the attributes are those of `Family`."""

    base: str
    embeddings: tuple[str, ...]
    stacks: Mapping[str, str]
    head: tuple[str, ...]

    def __str__(self) -> str:
        head = ", ".join((*self.head, f"all outside '{self.base}'" if self.base else "nothing else"))
        return f"blocks are {', '.join(self.stacks.values())}; embeddings {', '.join(self.embeddings) or 'none'}; head {head}"


@dataclass(frozen=True)
class Family:
    """A definition that plugs a model architecture in.

    Patterns are module or parameter paths below the base model (the model without its task head), for a model
    loaded by transformers; `*` stands for one path component. A pattern covers everything below its path. It must
    match something, unless it ends with `?`: `pooler?` may be absent, as it is in question-answering models.
    Whatever lies outside the base model is the head. An embeddings pattern that reaches into a block takes what it names
    out of the block (T5 keeps a stack's relative-position table in its first block); any other double claim is an error.

    Attributes:
        name: of the family, shown in plans and messages.
        model_types: values of `config.model_type` that belong to it.
        base: attribute of the loaded model that holds the base model ("bert"); "" when the model is its own base. Where it
            differs between heads, several: the first below which all stacks lie is taken.
        embeddings: paths that make up the embeddings (relative-position tables and projections included).
        stacks: for each stack of blocks the path of its ModuleList, e.g. `{"blocks": "encoder.layer"}`.
        head: paths below the base model that belong to the head (pooler, a final norm).
        unused: paths below the base model that no output of the heads here depends on; they stay as they are.
        adapt: mends a model that transformers has built from a config or loaded, before anything looks at its parameters.
        load: builds the model for a request; None takes transformers' auto classes.
        load_tokenizer: gives the tokenizer for a model name; None takes AutoTokenizer.
        max_tokens: the longest input in tokens that a config allows, None for no limit; without the function,
            `config.max_position_embeddings` is the limit.
        projections: what a low-rank method changes by default: endings of the module paths of the query and value
            projections in a block.
        sublayers: for each stack, paths in a block of the modules whose output is added to the residual stream (the
            self-attention's, then the feed-forward's; dropout included where it is a module); a bottleneck adapter follows each.
        min_tokens: what a config makes of the shortest batch: one of fewer tokens is padded to so many.
        check: refuses with a ModelError what this architecture cannot take, before time is spent: request, the model's
            config, tokenizer, section `train` of the run's config.
        check_rows: refuses with a DataError rows that this architecture cannot read: request, the model's config, and the
            tokenised splits by name.
        refuses: methods that this architecture cannot have, each with the reason.
        hand_on: what a block of the first stack gives beside the hidden states, made without running it: block, hidden states,
            and the other arguments of its call; needed only where that is more than None.
        shared_blocks: the model applies each of its blocks several times.
        infer: finds base, embeddings, stacks and head of a model that has been built (on the meta device, perhaps), where
            they cannot be said beforehand; the other fields stay as they are.
    """

    name: str
    model_types: tuple[str, ...]
    base: str | tuple[str, ...]
    embeddings: tuple[str, ...]
    stacks: Mapping[str, str]
    head: tuple[str, ...] = ()
    adapt: Callable[[torch.nn.Module], None] | None = None
    load: Callable[[ModelRequest], torch.nn.Module] | None = None
    load_tokenizer: Callable[[str], Any] | None = None
    max_tokens: Callable[[Any], int | None] | None = None
    projections: tuple[str, ...] = ()
    sublayers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    min_tokens: Callable[[Any], int] | None = None
    check: Callable[[ModelRequest, Any, Any, Train], None] | None = None
    check_rows: Callable[[ModelRequest, Any, Mapping[str, Any]], None] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    hand_on: Callable[..., tuple[Any, ...]] | None = None
    shared_blocks: bool = False
    unused: tuple[str, ...] = ()
    infer: Callable[[torch.nn.Module], Places] | None = None

    def resolve(self, model: torch.nn.Module) -> Family:
        """The family with its places as they are in `model`; itself, where they are known beforehand.

        Raises:
            ModelError: they cannot be found in it.
        """
        if self.infer is None:
            return self
        found = self.infer(model)
        return replace(self, base=found.base, embeddings=found.embeddings, stacks=found.stacks, head=found.head, infer=None)

    @property
    def bases(self) -> tuple[str, ...]:
        """The possible values of `base`."""
        return (self.base,) if isinstance(self.base, str) else self.base


FAMILIES: Registry[Family] = Registry("model family", "progscale.families", package="progscale.models.families")


def register_family(family: Family) -> Family:
    """Makes a family known; a user's own encoder needs this one call."""
    FAMILIES.add(family.name, family)
    return family
