"""Activations as counted without computing are those that torch really keeps."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from progscale.blocks import FOUR_BIT, partition
from progscale.cost.activations import activation_bytes
from progscale.models.lookup import family_of
from tests.tiny import FAMILY_NAMES, tiny_model

ROWS, LENGTH = 3, 12
# Their forward pass asks what the data are.
UNKNOWN = ("longformer", "t5")
# Its mask value is no number of bfloat16.
NOT_IN_BF16 = "deberta"


def kept(model: Any, precision: str, inputs: dict[str, torch.Tensor] | None = None) -> int:
    """Bytes of what a real forward pass saves, on padded rows, beside the parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(5, 90, (ROWS, LENGTH))
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast:
            outputs = model(**(inputs or {"input_ids": tokens, "attention_mask": mask}))
        logits = outputs.logits.float().flatten(0, -2)
        torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")
    return sum(storage.nbytes() for storage in found.values())


def train_from(model: torch.nn.Module, block: int) -> frozenset[str]:
    """Freezes all below a block; the names of what is trained."""
    parts = partition(model, family_of(model)).parameters
    live = frozenset(
        name
        for name, info in parts.items()
        if not info.unused and (info.part == "head" or (info.block is not None and info.block >= block) or block == 0)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in live)
    return live


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in UNKNOWN])
def test_every_family(family: str, precision: str) -> None:
    if (family, precision) == (NOT_IN_BF16, "bf16"):
        pytest.skip("transformers' DeBERTa does not run under autocast")
    model = tiny_model(family, dropout=0.1).train()
    counts = []
    for block in (0, 1, 3):
        live = train_from(model, block)
        with torch.device("meta"):
            skeleton = tiny_model(family, dropout=0.1)
        counts.append(activation_bytes(skeleton, live, rows=ROWS, length=LENGTH, precision=precision))
        # Under autocast a cast may be kept twice or once.
        assert counts[-1] == pytest.approx(kept(model, precision), rel=0 if precision == "fp32" else 0.01)
    assert counts[0] > counts[1] > counts[2] > 0


def test_of_frozen_blocks_nothing_is_kept() -> None:
    counts = []
    for blocks in (1, 6):
        model = tiny_model("bert", blocks=blocks)
        counts.append(activation_bytes(model, train_from(model, blocks), rows=2, length=9))
    assert counts[0] == counts[1]


def test_the_model_stays_as_it_is() -> None:
    model = tiny_model("bert").eval()
    before = [(name, value.requires_grad, value.data_ptr()) for name, value in model.named_parameters()]
    assert activation_bytes(model, [], rows=2, length=9) is not None
    assert [(name, value.requires_grad, value.data_ptr()) for name, value in model.named_parameters()] == before
    assert not model.training


@pytest.mark.parametrize(("family", "head"), [("gpt2", "causal_lm"), ("llama", "causal_lm"), ("t5", "seq2seq_lm")])
def test_language_models(family: str, head: Any) -> None:
    """The logits of every token count, in float32 too."""
    model = tiny_model(family, head=head).train()
    live = train_from(model, 0)
    found = activation_bytes(model, live, rows=ROWS, length=LENGTH, target_length=5)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(5, 90, (ROWS, LENGTH))
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if family == "t5":
        inputs["decoder_input_ids"] = tokens[:, :5].clone()
    with_loss = kept(model, "fp32", inputs)
    assert found == with_loss
    assert found > 4 * vocabulary * ROWS * (5 if family == "t5" else LENGTH)


def test_eager_attention_keeps_its_matrices() -> None:
    model = tiny_model("bert", dropout=0.1)
    live = train_from(model, 0)
    eager, ours = (
        activation_bytes(model, live, rows=2, length=64, attention=attention, on_gpu=True) for attention in ("eager", "auto")
    )
    assert eager > 2 * ours


def test_no_cast_of_quantised_weights_is_kept() -> None:
    with torch.device("meta"):
        model = tiny_model("bert")
    live = frozenset(name for name, _ in model.named_parameters() if "classifier" in name or "query.bias" in name)
    whole = activation_bytes(model, live, rows=2, length=9, precision="bf16")
    matrices = [value for name, value in model.named_parameters() if "encoder" in name and value.dim() == 2]
    for matrix in matrices:
        setattr(matrix, FOUR_BIT, True)
    assert whole - activation_bytes(model, live, rows=2, length=9, precision="bf16") > sum(m.numel() for m in matrices)


def test_half_the_bytes() -> None:
    model = tiny_model("bert")
    live = train_from(model, 0)
    whole, half = (activation_bytes(model, live, rows=8, length=64, precision=kind) for kind in ("fp32", "bf16_params"))
    assert 0.4 * whole < half < 0.6 * whole


def test_a_gpu_keeps_no_matrix_of_the_attention() -> None:
    model = tiny_model("bert", dropout=0.1)
    live = train_from(model, 0)
    ours, gpu = (activation_bytes(model, live, rows=2, length=64, on_gpu=on_gpu) for on_gpu in (False, True))
    assert gpu < ours / 2


@pytest.mark.parametrize("family", UNKNOWN)
def test_what_is_not_known(family: str) -> None:
    model = tiny_model(family)
    assert activation_bytes(model, train_from(model, 0), rows=2, length=8) is None


def test_models_that_cannot_be_run_so(caplog: pytest.LogCaptureFixture) -> None:
    assert activation_bytes(torch.nn.Linear(2, 2), ["weight"], rows=2, length=8) is None
    assert activation_bytes(tiny_model("bert"), [], rows=2, length=10_000) is None
    assert not [record for record in caplog.records if record.levelno > 10], "torch's own traceback"
