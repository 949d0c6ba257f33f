"""What a family says of its blocks, held against the models themselves; and what sparse attention makes of batches."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from progscale.blocks import partition
from progscale.config import Train
from progscale.data import collate, eval_batches
from progscale.errors import ModelError
from progscale.models.family import FAMILIES, ModelRequest
from progscale.tasks.base import Tokenized
from progscale.tasks.ragged import Ragged
from tests.tiny import ENCODERS, SHARED_BLOCKS, tiny_config, tiny_model

# One layer, so that a shared block runs once too.
EVERY_ENCODER = (*ENCODERS, *SHARED_BLOCKS)
HEADS = ("sequence_classification", "question_answering")


def blocks_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    family = FAMILIES.get(name)
    path = f"{family.base}.{family.stacks['blocks']}"
    return {f"{path}.{child}": module for child, module in model.get_submodule(path).named_children()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_each_projection_is_one_linear_module_of_each_block_and_no_other(name: str, head: str) -> None:
    model = tiny_model(name, head)
    blocks = blocks_of(model, name)
    assert FAMILIES.get(name).projections
    for ending in FAMILIES.get(name).projections:
        found = [path for path, module in model.named_modules() if path.endswith(f".{ending}") and isinstance(module, nn.Linear)]
        owners = [block for path in found for block in blocks if path.startswith(f"{block}.")]
        assert owners == list(blocks), found


class Stream:
    """What runs through one block: its input, what the named modules add, and where that could land.

    Args:
        block: of a model.
        sublayers: paths in it.
        change: what becomes of the named modules' outputs.
    """

    def __init__(self, block: nn.Module, sublayers: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.residuals: list[torch.Tensor] = []
        self.added: dict[str, list[torch.Tensor]] = {path: [] for path in sublayers}
        self.landings: list[torch.Tensor] = []
        block.register_forward_pre_hook(self.enter, with_kwargs=True)
        block.register_forward_hook(self.leave)
        for module in block.modules():
            if "Norm" in type(module).__name__:
                module.register_forward_hook(self.norm)
        for path in sublayers:
            block.get_submodule(path).register_forward_hook(self.sublayer(path, change))

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residuals.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.landings.append((output if isinstance(output, torch.Tensor) else output[0]).detach().clone())

    def norm(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.landings.append(args[0].detach().clone())
        self.residuals.append(output.detach().clone())

    def sublayer(self, path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            changed = change(output)
            self.added[path].append(changed.detach().clone())
            return changed

        return hook


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda output: output,
    "shifted": lambda output: output + 0.5,
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_a_sublayers_output_is_what_is_added_to_the_residual(name: str, change: str) -> None:
    """Dropout is on, so nothing lies between the module and the addition: residual + output is bit for bit what comes next.

    What comes next is a norm or the end of the block; the residual is the block's input, then what came next for the
    sublayer before, or its norm.
    """
    sublayers = FAMILIES.get(name).sublayers["blocks"]
    assert len(sublayers) == 2
    model = tiny_model(name, blocks=1, dropout=0.5).train()
    (block,) = blocks_of(model, name).values()
    stream = Stream(block, sublayers, CHANGES[change])
    tokens = torch.randint(5, 101, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    residuals = stream.residuals[:1]
    for path in sublayers:
        (added,) = stream.added[path]
        landed = [landing for landing in stream.landings if any(torch.equal(residual + added, landing) for residual in residuals)]
        assert landed, f"{path} is not what is added"
        residuals = [*landed, *stream.residuals[1:]]


@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_batches_of_any_length_and_padding(name: str) -> None:
    """A row's logits hang neither on how far it is padded nor on the rows beside it."""
    config = tiny_config(name)
    model = tiny_model(name).eval()
    pad = int(config.pad_token_id)
    row = torch.randint(5, 101, (7,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = model(input_ids=row[None], attention_mask=torch.ones(1, 7, dtype=torch.long)).logits
        for length in (8, 13, 31):
            tokens, mask = torch.full((2, length), pad), torch.zeros(2, length, dtype=torch.long)
            tokens[0, :7], mask[0, :7] = row, 1
            tokens[1], mask[1] = torch.randint(5, 101, (length,)), 1
            assert torch.allclose(model(input_ids=tokens, attention_mask=mask).logits[0], alone[0], atol=1e-5), length


# -- BigBird: sparse attention ----------------------------------------------------------------------------------------

SPARSE = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}


def test_a_short_batch_turns_a_big_bird_for_good() -> None:
    """Why every batch is padded beyond that length: up to 14 tokens here."""
    config = tiny_config("big_bird", **SPARSE)
    min_tokens = FAMILIES.get("big_bird").min_tokens
    assert min_tokens is not None and min_tokens(config) == 15
    assert min_tokens(tiny_config("big_bird")) == 1
    model = tiny_model("big_bird", **SPARSE)
    tokens = torch.randint(5, 101, (2, 15))
    model(input_ids=tokens)
    assert model.bert.attention_type == "block_sparse"  # type: ignore[union-attr]
    model(input_ids=tokens[:, :14])
    model(input_ids=tokens)
    assert model.bert.attention_type == "original_full"  # type: ignore[union-attr]


def test_batches_are_padded_to_the_least_length() -> None:
    split = Tokenized(
        {"input_ids": Ragged.from_rows([[7] * length for length in (3, 9, 5)])}, np.array([3, 9, 5]), {"labels": np.zeros(3)}
    )
    batch = collate(split, np.array([0]), {"input_ids": 1}, min_tokens=15)
    assert batch.inputs["input_ids"].tolist() == [[7] * 3 + [1] * 12]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 3 + [0] * 12]
    assert collate(split, np.array([1]), {}, min_tokens=4).inputs["input_ids"].shape == (1, 9)
    # A budget of 30 padded tokens is two rows of 15.
    sizes = [batch.inputs["input_ids"].shape for batch in eval_batches(split, 8, 1, 0, pad={}, max_tokens=30, min_tokens=15)]
    assert sizes == [(2, 15), (1, 15)]


def test_sparse_attention_is_refused_where_every_text_is_too_short() -> None:
    check = FAMILIES.get("big_bird").check
    assert check is not None
    request = ModelRequest("x", head="sequence_classification")
    check(request, tiny_config("big_bird"), None, Train(max_length=3))
    check(request, tiny_config("big_bird", **SPARSE), None, Train(max_length=15))
    with pytest.raises(ModelError, match=r"train.max_length: 14; .* at least 15.*model.overrides.attention_type=original_full"):
        check(request, tiny_config("big_bird", **SPARSE), None, Train(max_length=14))


# -- Longformer: the question's end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [[0, 5, 2, 2, 6, 2], [0, 5, 2, 6, 2]])
def test_a_longformer_for_question_answering_needs_three_separators(pair: list[int]) -> None:
    check, config = FAMILIES.get("longformer").check, tiny_config("longformer")
    assert check is not None

    def tokenizer(first: str, second: str) -> Any:
        return {"input_ids": pair}

    check(ModelRequest("x", head="sequence_classification"), config, tokenizer, Train())
    ids = torch.tensor([pair])
    model = tiny_model("longformer", "question_answering")
    if pair.count(2) == 3:
        check(ModelRequest("x", head="question_answering"), config, tokenizer, Train())
        assert model(input_ids=ids).start_logits.shape == ids.shape
        return
    with pytest.raises(ModelError, match=r"model.tokenizer: it puts 2 separators \(id 2.*needs 3"):
        check(ModelRequest("x", head="question_answering"), config, tokenizer, Train())
    with pytest.raises(AssertionError, match=r"three separator tokens"):
        model(input_ids=ids)


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_computes_under_autocast_or_is_refused(name: str) -> None:
    check, train = FAMILIES.get(name).check, Train(precision="bf16")
    tokens = torch.randint(5, 101, (2, 12))

    def compute() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().sum().backward()

    model = tiny_model(name).train()
    request = ModelRequest("x", head="sequence_classification")
    if name != "deberta":
        compute()
        assert check is None or check(request, model.config, None, train) is None  # type: ignore[func-returns-value]
        return
    assert check is not None
    with pytest.raises(ModelError, match=r"train.precision: 'bf16'; .* take 'fp32'"):
        check(request, model.config, None, train)
    with pytest.raises(RuntimeError, match="overflow"):
        compute()
    check(request, model.config, None, Train(precision="bf16_params"))


# -- generic: the blocks are found ------------------------------------------------------------------------------------

GENERIC = FAMILIES.get("generic")
# DeBERTa v2 applies a norm and a convolution that are registered after the blocks to what comes before them.
CARED_FOR = ("deberta-v2",)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in CARED_FOR])
def test_generic_finds_what_the_family_says(name: str, head: str) -> None:
    parts = partition(tiny_model(name, head), FAMILIES.get(name))
    found = partition(tiny_model(name, head), GENERIC)
    where = {key: (info.part, info.stack, info.block, info.tied) for key, info in parts.parameters.items()}
    assert {key: (info.part, info.stack, info.block, info.tied) for key, info in found.parameters.items()} == where
    assert found.num_blocks == parts.num_blocks


def test_generic_takes_a_table_for_embeddings_wherever_it_stands() -> None:
    parts = partition(tiny_model("deberta-v2"), GENERIC).parameters
    assert parts["deberta.encoder.rel_embeddings.weight"].part == "embeddings"
    assert parts["deberta.encoder.conv.conv.weight"].part == "head", "registered after the blocks: always trained"


def test_generic_sees_through_meta_zero3_and_peft() -> None:
    peft = pytest.importorskip("peft")
    whole = partition(tiny_model("modernbert"), GENERIC)
    with torch.device("meta"):
        assert partition(tiny_model("modernbert"), GENERIC) == whole
    model = tiny_model("modernbert")
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert partition(model, GENERIC) == whole
    config = peft.LoraConfig(r=2, target_modules=["attn.Wqkv"], modules_to_save=["classifier"])
    parts = partition(peft.get_peft_model(tiny_model("modernbert"), config), GENERIC)
    assert {info.block for name, info in parts.parameters.items() if "lora_" in name} == {0, 1, 2, 3}
    assert {info.part for name, info in parts.parameters.items() if "final_norm" in name or "classifier" in name} == {"head"}


class Layers(nn.Module):
    """A model that is its own base model."""

    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.tokens = nn.Embedding(11, 4)
        self.final_norm = nn.LayerNorm(4)
        for name, modules in lists.items():
            setattr(self, name, nn.ModuleList(modules))
        self.after = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))


def linears(count: int, width: int = 4) -> list[nn.Module]:
    return [nn.Linear(4, width) for _ in range(count)]


def test_generic_takes_the_outermost_list() -> None:
    """Experts inside the blocks are no blocks; a list without parameters is none either."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(linears(3))

    found = GENERIC.resolve(Layers(drop=[nn.Dropout(), nn.Dropout()], layers=[Block(), Block()]))
    assert (found.base, found.stacks) == ("", {"blocks": "layers"})
    assert found.embeddings == ("scale", "tokens", "after.1")
    assert found.head == ("final_norm?", "after.0?"), "one of them is the task's"
    assert found.resolve(Layers()) is found
    assert found.projections == () and found.sublayers == {}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Layers(), "this Layers has no ModuleList below its base model; it takes"),
        (
            Layers(a=linears(2), b=linears(3)),
            r"2 ModuleLists of .* hold like modules: a \(2 x Linear\), b \(3 x Linear\)",
        ),
        (
            Layers(a=[nn.Linear(4, 4), nn.LayerNorm(4)]),
            r"no ModuleList of .* holds like modules: a \(2 x LayerNorm, Linear\)",
        ),
        (Layers(a=[*linears(1), *linears(1, 5)]), r"no ModuleList of .* holds like modules: a \(2 x Linear\)"),
        (Layers(a=linears(1) * 2), r"no ModuleList of this Layers holds like modules"),
    ],
    ids=["none", "two", "classes", "shapes", "shared"],
)
def test_generic_refuses_what_is_not_clear(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        partition(model, GENERIC)
    assert "register_family" in str(caught.value)


def test_generic_refuses_layers_that_share_blocks() -> None:
    with pytest.raises(ModelError, match=r"albert_layer_groups' of .* a list of 1, but its config has num_hidden_layers 4"):
        partition(tiny_model("albert"), GENERIC)
    model = Layers(layers=linears(2))
    model.config = SimpleNamespace(num_hidden_layers=2)  # type: ignore[assignment]
    assert partition(model, GENERIC).num_blocks == {"blocks": 2}
