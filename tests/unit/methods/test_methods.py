"""What every method owes: a row of `TABLE` is all that a new one needs here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from progscale.blocks import partition
from progscale.errors import ModelError, UserError
from progscale.export import describe, export_model, load_exported, merge_exported
from progscale.layers import dequantise, seeded
from progscale.methods import METHODS, Method, live_parameters, make_method
from progscale.methods.base import Subject
from progscale.models.family import FAMILIES, ModelRequest
from progscale.models.loading import load_model
from progscale.schedule import Stage
from progscale.tasks.demo import demo_tokenizer
from tests.harness.cases import end_token, make_engine
from tests.harness.programs import in_process
from tests.harness.refused import accepted
from tests.tiny import method_for, tiny_model

WIDTH, INNER, BLOCKS, LABELS = 16, 32, 4, 2
TOKENS = torch.arange(2 * 12).view(2, 12) + 5
INPUTS = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
CLASSIFIER = WIDTH * LABELS + LABELS
QUERY_VALUE = 2 * 2 * WIDTH


@dataclass(frozen=True)
class Expected:
    """What is known of a method on a BERT of width 16.

    Attributes:
        block: elements that it trains in a block.
        head: elements that it trains in the head.
        embeddings: whether it trains embeddings.
        merges: whether what is exported can be merged into a plain model; None where a plain model is exported.
        variants: options under which it must export as well.
    """

    block: int
    head: int
    embeddings: bool = False
    merges: bool | None = True
    variants: tuple[dict[str, Any], ...] = field(default=({},))


NORMS = 2 * 2 * WIDTH
LINEAR = 4 * (WIDTH * WIDTH + WIDTH) + 2 * WIDTH * INNER + WIDTH + INNER
POOLER = WIDTH * WIDTH + WIDTH

TABLE = {
    "full": Expected(LINEAR + NORMS, POOLER + CLASSIFIER, embeddings=True, merges=None),
    "bitfit": Expected(
        4 * WIDTH + WIDTH + INNER + 2 * WIDTH, WIDTH + CLASSIFIER, merges=None, variants=({}, {"embeddings_bias": True})
    ),
    "adapter": Expected(
        2 * (2 * WIDTH * 48 + 48 + WIDTH),
        CLASSIFIER,
        merges=False,
        variants=({}, {"size": 3, "activation": "relu", "norms": True}),
    ),
    "lora": Expected(
        8 * QUERY_VALUE,
        CLASSIFIER,
        variants=(
            {},
            {"rank": 3, "alpha": 12.0, "targets": "all-linear"},
            {"rslora": True, "targets": ["attention.output.dense"]},
            {"dora": True},
            {"init": "gaussian"},
            {"init": "orthogonal", "rank": 4},
            {"init": "pissa", "rank": 2},
            {"init": "pissa_niter_4", "rank": 2, "rslora": True},
        ),
    ),
    "qlora": Expected(
        8 * QUERY_VALUE,
        CLASSIFIER,
        variants=({}, {"double_quant": False, "quant_type": "fp4"}, {"targets": "all-linear", "rank": 2}),
    ),
}
VARIANTS = [(name, options) for name, expected in TABLE.items() for options in expected.variants]


def test_every_method_has_a_row() -> None:
    assert set(TABLE) == set(METHODS.names())


@pytest.mark.parametrize("name", TABLE)
def test_what_is_trained(name: str) -> None:
    method = method_for("bert", name)
    with torch.device("meta"):
        parts = partition(method.prepare(tiny_model("bert", blocks=BLOCKS)), FAMILIES.get("bert"))
    chosen = method.tensors(parts)
    assert chosen <= set(parts.parameters)
    for block in range(BLOCKS):
        assert parts.count(chosen & set(parts.block_names("blocks", block))) == TABLE[name].block
    assert parts.count(chosen & set(parts.names("head"))) == TABLE[name].head
    assert bool(chosen & set(parts.names("embeddings"))) == TABLE[name].embeddings


@pytest.mark.parametrize(("name", "family"), accepted(TABLE))
def test_each_family(name: str, family: str) -> None:
    """Every block and the head have something to train, names are those of the model without weights, and it begins as it was."""
    method, plain = method_for(family, name), tiny_model(family).eval()
    model = method.prepare(copy.deepcopy(plain)).eval()
    parts = partition(model, FAMILIES.get(family))
    with torch.device("meta"):
        skeleton = partition(method.prepare(tiny_model(family)), FAMILIES.get(family))
    assert list(parts.parameters) == list(skeleton.parameters)
    chosen = method.tensors(parts)
    for stack, count in parts.num_blocks.items():
        assert all(chosen & set(parts.block_names(stack, block)) for block in range(count))
        nothing = Stage(1, 0, 1, {stack: () for stack in parts.num_blocks}, embeddings=False)
    head = live_parameters(nothing, parts, method)
    assert head and all(parts.parameters[one].part == "head" for one in head)
    # Some models read what they say at their end token.
    inputs = {**INPUTS, "input_ids": torch.where(TOKENS[:, -1:] == TOKENS, end_token(plain.config) or TOKENS, TOKENS)}
    with torch.no_grad():
        difference = (model(**inputs).logits - plain(**inputs).logits).abs().max()
    assert difference < (0.05 if name == "qlora" else 1e-4)


@pytest.mark.parametrize(("name", "family"), accepted(["qlora"]))
def test_quantised_layers_compute_with_the_values_that_merging_takes(name: str, family: str) -> None:
    """No layer looks at the dtype of the codes (as T5's feed-forward does), and every weight there gets a gradient."""
    method, plain = method_for(family, name, targets="all-linear"), tiny_model(family)
    model: Any = method.prepare(plain).eval()
    whole = copy.deepcopy(model)
    dequantise(whole)
    inputs = {**INPUTS, "input_ids": torch.where(TOKENS[:, -1:] == TOKENS, end_token(plain.config) or TOKENS, TOKENS)}
    logits = model(**inputs).logits
    with torch.no_grad():
        assert (whole(**inputs).logits - logits).abs().max() < 1e-5
    logits.sum().backward()
    assert all(value.grad is not None for key, value in model.named_parameters() if ".lora_B" in key)


def trained(
    name: str, base: Path, options: dict[str, Any], save: Callable[[Any, Method[Any], ModelRequest], None]
) -> torch.Tensor:
    """Logits of a model whose trained parameters were all moved, and which `save` has saved."""
    request = ModelRequest(str(base), head="sequence_classification")
    method = make_method(name, Subject(FAMILIES.get("bert"), request.head, str(base)), options)
    with seeded(3):
        model = method.prepare(load_model(request)).eval()
        names = method.tensors(partition(model, FAMILIES.get("bert")))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in names:
                    parameter += 0.3 * torch.randn_like(parameter)
            logits: torch.Tensor = model(**INPUTS).logits
    save(model, method, request)
    return logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A published model, its classifier included."""
    tiny_model("bert", seed=4).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def export_of(name: str, base: Path, folder: Path, options: dict[str, Any] | None = None) -> torch.Tensor:
    """Exports what `trained` has made; its logits."""

    def save(model: Any, method: Method[Any], request: ModelRequest) -> None:
        engine = make_engine(model, "plain")
        names = method.exported(partition(model, FAMILIES.get("bert")))
        about = describe(method, request)
        export_model(engine, demo_tokenizer(), folder, save=method.save, names=names, about=about)

    return trained(name, base, options or {}, save)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_export(name: str, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """What is exported computes what was trained: by `load_exported`, by plain PEFT, and merged by plain transformers."""

    wanted = export_of(name, base, tmp_path / "model", options)
    with torch.no_grad():
        found = load_exported(tmp_path / "model")(**INPUTS).logits
    assert (found - wanted).abs().max() < 1e-5
    files = {path.name for path in (tmp_path / "model").iterdir()}
    merges = TABLE[name].merges
    assert ("model.safetensors" in files) == (merges is None)
    if name in ("lora", "qlora"):
        assert (plain_peft(base, tmp_path / "model")(**INPUTS).logits - wanted).abs().max() < 1e-5
    if merges:
        merge_exported(tmp_path / "model", tmp_path / "merged")
        assert (plain_transformers(tmp_path / "merged")(**INPUTS).logits - wanted).abs().max() < 1e-5
        assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
    elif merges is None:
        assert (plain_transformers(tmp_path / "model")(**INPUTS).logits - wanted).abs().max() < 1e-5
        with pytest.raises(UserError, match="exports a whole model, there is nothing to merge"):
            merge_exported(tmp_path / "model", tmp_path / "merged")
    else:
        with pytest.raises(ModelError, match="cannot be merged"):
            merge_exported(tmp_path / "model", tmp_path / "merged")


def test_a_base_model_in_pickle_files(base: Path, tmp_path: Path) -> None:
    """What the run was allowed to read, its export is read with, if that is allowed again."""
    export_of("lora", base, tmp_path / "model")
    torch.save(load_model(ModelRequest(str(base), head="sequence_classification")).state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    model, merged = str(tmp_path / "model"), str(tmp_path / "merged")
    assert "only loaded with --allow-pickle on the command line" in in_process("merge", model, merged).err
    assert in_process("merge", model, merged, "--allow-pickle").code == 0
    load_exported(model, allow_pickle=True)


@torch.no_grad()
def plain_peft(base: Path, adapter: Path) -> Any:
    """As somebody loads an adapter who knows nothing of progscale."""
    import json

    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    kwargs = {}
    if (adapter / "quantization_config.json").exists():
        kwargs["quantization_config"] = BitsAndBytesConfig(**json.loads((adapter / "quantization_config.json").read_text()))
    model = AutoModelForSequenceClassification.from_pretrained(base, **kwargs)
    for module in model.modules():
        # On some processors bitsandbytes repacks the weights for inference, which it can for multiples of 32 alone.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@torch.no_grad()
def plain_transformers(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()
